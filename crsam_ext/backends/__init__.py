"""Which implementation of the operators runs, and why the others do not."""

from __future__ import annotations

from collections.abc import Collection

from ..ops import Operators
from . import cuda, triton
from .torch import TorchOperators

__all__ = ["available_backends", "load", "passed_over"]


def available_backends() -> dict[str, str]:
    """For each backend, in order of preference, "available" or "unavailable: " and the reason."""
    reasons = {
        "cuda": cuda.why_unavailable(),
        "triton": triton.why_unavailable(),
        "torch": None,
    }
    return {name: "available" if why is None else f"unavailable: {why}" for name, why in reasons.items()}


def passed_over(*, compile: bool = False, devices: Collection[str] = ()) -> dict[str, str]:
    """The backends that "auto" prefers to the one it takes, and why it cannot take them; arguments as of `load`."""
    reasons = {}
    for name, verdict in available_backends().items():
        if name != "torch" and verdict == "available":
            elsewhere = sorted(set(devices) - {"cuda"})
            if compile:
                verdict = "is compiled already, and compile=True was asked for"
            elif elsewhere:
                verdict = f"does not run on {', '.join(elsewhere)}"
            elif name == "triton" and triton.interpreted():
                verdict = "is interpreted, which is for debugging"
        if verdict == "available":
            break
        reasons[name] = verdict
    return reasons


def load(name: str, *, compile: bool = False, devices: Collection[str] = ()) -> Operators:
    """The operators of a backend.

    Args:
        name: "cuda", "triton", "torch", or "auto": the first one that is available and runs on ``devices``.
        compile: run the torch backend's operators through ``torch.compile``.
        devices: types of the devices that the parameters are on.
    Raises:
        ValueError: for an unknown name, or ``compile`` with a backend that is compiled already.
        RuntimeError: if the backend is not available, with the reason.
    """
    available = available_backends()
    if name not in ("auto", *available):
        raise ValueError(f"unknown backend {name!r}; choose from {', '.join(('auto', *available))}")
    if name == "auto":
        reasons = passed_over(compile=compile, devices=devices)
        name = next(backend for backend in available if backend not in reasons)
    if available[name] != "available":
        raise RuntimeError(f"backend {name!r} is {available[name]}")
    if compile and name != "torch":
        raise ValueError(f"compile=True is for the torch backend; {name!r} is compiled already")
    if name == "torch":
        return TorchOperators(compile)
    return cuda.CudaOperators() if name == "cuda" else triton.TritonOperators()
