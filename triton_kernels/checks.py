"""Argument checks of the operators, with one-line errors: operator, argument, actual value, expected value."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

# The names of dtypes in PyTorch's C++ messages, so that both backends raise the same errors.
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
    """Return the name of a dtype for a message."""
    return _NAMES.get(dtype, str(dtype))


# An operator, its argument, and optionally a row: ("step_", "grads[1]", 3). Formatted only for an error.
Argument = tuple[str, str] | tuple[str, str, int]


def place(argument: Argument) -> str:
    """Format an argument of an operator, for example "step_: grads[1][3]"."""
    op, name, *row = argument
    return f"{op}: {name}" + "".join(f"[{index}]" for index in row)


def check_tensor(
    tensor: Tensor | None, argument: Argument, device: torch.device, dtype: torch.dtype, numel: int
) -> None:
    """Check a tensor that a kernel reads or writes through a pointer."""
    if tensor is None:
        raise RuntimeError(f"{place(argument)} is None")
    if tensor.device != device:
        raise RuntimeError(f"{place(argument)} is on {tensor.device}, not on {device}")
    if tensor.dtype != dtype:
        raise RuntimeError(f"{place(argument)} is {name_of(tensor.dtype)}, not {name_of(dtype)}")
    if tensor.numel() != numel:
        raise RuntimeError(f"{place(argument)} has {tensor.numel()} elements, not {numel}")
    if not tensor.is_contiguous():
        raise RuntimeError(f"{place(argument)} is not contiguous")


def check_count(found: int, argument: Argument, expected: int) -> None:
    """Check the length of a list."""
    if found != expected:
        raise RuntimeError(f"{place(argument)} has {found} entries, not {expected}")


def check_groups(numbers: bytes, limits: tuple[int, int], op: str, num_groups: int) -> None:
    """Check that all groups are in range; usually the smallest and the largest are enough."""
    if not 0 < num_groups < 2**31:
        raise RuntimeError(f"{op}: num_groups is {num_groups}, not from 1 to {2**31 - 1}")
    if limits[0] >= 0 and limits[1] < num_groups:
        return
    for row, group in enumerate(array("q", numbers)):
        if not 0 <= group < num_groups:
            raise RuntimeError(f"{op}: groups[{row}] is {group}, not from 0 to {num_groups - 1}")
