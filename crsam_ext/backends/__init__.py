"""Selects the implementation of the operators, and reports why others are unavailable."""

from __future__ import annotations

from collections.abc import Collection

from ..ops import Operators
from . import cuda, triton
from .torch import TorchOperators

__all__ = ["available_backends", "load", "passed_over"]


def available_backends() -> dict[str, str]:
    """Return for each backend, in order of preference, "available" or "unavailable: " with the reason."""
    reasons = {
        "cuda": cuda.why_unavailable(),
        "triton": triton.why_unavailable(),
        "torch": None,
    }
    return {name: "available" if why is None else f"unavailable: {why}" for name, why in reasons.items()}


def passed_over(*, compile: bool = False, devices: Collection[str] = ()) -> dict[str, str]:
    """Return the backends that "auto" passes over, with the reasons; the arguments are those of `load`."""
    reasons = {}
    for name, verdict in available_backends().items():
        if name != "torch" and verdict == "available":
            elsewhere = sorted(set(devices) - {"cuda"})
            if compile:
                verdict = "is already compiled, but compile=True was requested"
            elif elsewhere:
                verdict = f"does not run on {', '.join(elsewhere)}"
            elif name == "triton" and triton.interpreted():
                verdict = "is interpreted, which is for debugging"
        if verdict == "available":
            break
        reasons[name] = verdict
    return reasons


def load(name: str, *, compile: bool = False, devices: Collection[str] = ()) -> Operators:
    """Return the operators of a backend.

    Args:
        name: "cuda", "triton", "torch", or "auto" for the first one that is available and runs on ``devices``.
        compile: run the operators of the torch backend through ``torch.compile``.
        devices: the device types of the parameters.
    Raises:
        ValueError: if the name is unknown, or if ``compile`` is combined with another backend than "torch".
        RuntimeError: if the backend is unavailable; the message gives the reason.
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
        raise ValueError(f"compile=True is for the torch backend; {name!r} is already compiled")
    if name == "torch":
        return TorchOperators(compile)
    return cuda.CudaOperators() if name == "cuda" else triton.TritonOperators()
