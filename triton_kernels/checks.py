"""What an operator demands of its arguments, said in one line where it is not met."""

from __future__ import annotations

import torch
from torch import Tensor

# The names that PyTorch's C++ side gives them, so that both backends say the same.
_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.bool: "Bool",
}


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype in a message."""
    return _NAMES.get(dtype, str(dtype))


def check(condition: bool, message: str) -> None:
    """Raise RuntimeError unless the condition is met."""
    if not condition:
        raise RuntimeError(message)


def check_tensor(tensor: Tensor | None, name: str, device: torch.device, dtype: torch.dtype, numel: int) -> None:
    """A tensor that a kernel reads or writes through a pointer."""
    if tensor is None:
        raise RuntimeError(f"{name} is None")
    if tensor.device != device:
        raise RuntimeError(f"{name} is on {tensor.device}, not on {device}")
    if tensor.dtype != dtype:
        raise RuntimeError(f"{name} is {name_of(tensor.dtype)}, not {name_of(dtype)}")
    if tensor.numel() != numel:
        raise RuntimeError(f"{name} has {tensor.numel()} elements, not {numel}")
    if not tensor.is_contiguous():
        raise RuntimeError(f"{name} is not contiguous")


def check_count(found: int, name: str, expected: int) -> None:
    """A list has as many entries as it should."""
    if found != expected:
        raise RuntimeError(f"{name} has {found} entries, not {expected}")


def check_groups(limits: tuple[int, int], num_groups: int) -> None:
    """Every group exists: the least and the greatest do."""
    if not 0 < num_groups < 2**31:
        raise RuntimeError(f"num_groups is {num_groups}")
    for group in limits:
        if not 0 <= group < num_groups:
            raise RuntimeError(f"group {group} is not one of {num_groups}")
