"""The operators as CUDA C++ kernels (csrc/)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import extension
from .fused import KERNELS, FusedOperators, no_device

__all__ = ["CudaOperators", "why_unavailable"]


def why_unavailable() -> str | None:
    """Return why the kernels cannot run on this machine; None if they can."""
    reason = extension.why_missing()
    if reason is not None:
        return reason
    architectures = extension.load().build_info()["architectures"]
    if not architectures:
        return extension.why_not_built()
    reason = no_device()
    if reason is not None:
        return reason
    oldest = min(float(a.removesuffix("+PTX")) for a in architectures.split(";"))
    major, minor = torch.cuda.get_device_capability()
    if major + minor / 10 < oldest:
        return f"the GPU has compute capability {major}.{minor}; the CUDA extension was built for {architectures}"
    return None


class CudaOperators(FusedOperators):
    """The operators of the extension, :mod:`crsam_ext._C`."""

    name = "cuda"

    def __init__(self) -> None:
        self.host = extension.load()
        self._ops = SimpleNamespace(**{name: _direct(self.host, name) for name in KERNELS})

    def _launch_mark(self, live: Tensor) -> int:
        return live._version  # the operator bumps it after the launch

    def _launched(self, live: Tensor, before: int) -> bool:
        return live._version != before


def _direct(module: Any, name: str) -> Callable[..., Any]:
    """Return an operator that calls the extension directly, or the dispatcher while torch.compile traces it."""
    direct, registered = getattr(module, name), getattr(torch.ops.crsam, name)

    def operator(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return registered(*map(_flat, arguments))
        return direct(*arguments)

    return operator


def _flat(argument: Any) -> Any:
    """Concatenate a list of lists, as schemas expect; return any other argument unchanged."""
    if isinstance(argument, (list, tuple)) and argument and isinstance(argument[0], (list, tuple)):
        return [tensor for tensors in argument for tensor in tensors]
    return argument
