"""The operators as CUDA C++ kernels (csrc/)."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from .fused import FAKES, FusedOperators

__all__ = ["CudaOperators", "why_unavailable"]


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


class CudaOperators(FusedOperators):
    """The operators of :mod:`crsam_ext._C`."""

    name = "cuda"
    namespace = "crsam"

    def __init__(self) -> None:
        super().__init__()
        _register_fakes()

    def _launch_mark(self, live: Tensor) -> int:
        return live._version  # which the operator bumps after the launch

    def _launched(self, live: Tensor, before: int) -> bool:
        return live._version != before


@cache
def _register_fakes() -> None:
    for name, fake in FAKES.items():
        torch.library.register_fake(f"crsam::{name}", fake)
