"""The operators as CUDA C++ kernels (csrc/)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..ops import Column, known_of
from .fused import FAKES, FusedOperators

__all__ = ["CudaOperators", "extension", "why_unavailable"]


def why_unavailable() -> str | None:
    """Why the kernels cannot run here; None if they can."""
    if find_spec("crsam_ext._C") is None:
        built = find_spec("crsam_ext._build") is not None
        reason = str(import_module("crsam_ext._build").REASON) if built else ""  # setup.py keeps it
        return reason or "the CUDA extension is missing; install crsam_ext from its sources"
    try:
        info = import_module("crsam_ext._C").build_info()
    except ImportError as error:
        return f"the CUDA extension does not load, build it again: {str(error).splitlines()[0]}"
    own = {"version": import_module("crsam_ext").__version__, "torch": torch.__version__}
    for name, version in own.items():
        if info[name] != version:
            return f"the CUDA extension was built for {name} {info[name]}, not {version}: build it again"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    oldest = min(float(a.removesuffix("+PTX")) for a in info["architectures"].split(";"))
    major, minor = torch.cuda.get_device_capability()
    if major + minor / 10 < oldest:
        return (
            f"the GPU has compute capability {major}.{minor}; the CUDA extension was built for {info['architectures']}"
        )
    return None


def extension() -> Any:
    """The compiled module."""
    return import_module("crsam_ext._C")


class CudaOperators(FusedOperators):
    """The operators of :mod:`crsam_ext._C`."""

    name = "cuda"

    def __init__(self) -> None:
        self._extension = extension()
        _register_fakes()
        self._ops = SimpleNamespace(**{name: self._direct(name) for name in FAKES})

    def take_gradients(self, params: Column) -> Column | None:
        taken = self._extension.take_gradients(params)
        if taken is None:
            return None
        grads = Column(taken[0])
        grads.known = taken[1]
        return grads

    def set_gradients(self, params: list[Tensor], grads: list[Tensor | None] | None) -> None:
        self._extension.set_gradients(params, grads)

    def layout(self, tensors: list[Tensor]) -> Any:
        return self._extension.layout(tensors)

    def mark_written(self, params: Column) -> None:
        self._extension.mark_written(known_of(params, self._extension.Tensors))

    def _direct(self, name: str) -> Callable[..., Any]:
        """An operator of the extension, for which a list that is a `Column` is converted once, not in every call."""
        direct, registered = getattr(self._extension, name), getattr(torch.ops.crsam, name)
        tensors, integers = self._extension.Tensors, self._extension.Integers
        makers = {"List[Tensor]": tensors, "List[Optional[Tensor]]": tensors, "List[int]": integers}
        kinds = [str(argument.type) for argument in registered.default._schema.arguments]
        conversions = [(i, makers[kind]) for i, kind in enumerate(kinds) if kind in makers]

        def operator(*arguments: Any) -> Any:
            if torch.compiler.is_compiling():
                return registered(*arguments)
            given = list(arguments)
            for i, make in conversions:
                given[i] = known_of(given[i], make)
            return direct(*given)

        return operator

    def _launch_mark(self, live: Tensor) -> int:
        return live._version  # which the operator bumps after the launch

    def _launched(self, live: Tensor, before: int) -> bool:
        return live._version != before


@cache
def _register_fakes() -> None:
    for name, fake in FAKES.items():
        torch.library.register_fake(f"crsam::{name}", fake)
