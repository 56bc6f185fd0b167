"""Which implementation of the operators runs, and why the others do not."""

from __future__ import annotations

from collections.abc import Collection

from ..ops import Operators
from . import cuda
from .torch import TorchOperators

__all__ = ["available_backends", "load"]


def available_backends() -> dict[str, str]:
    """For each backend, in order of preference, "available" or "unavailable: " and the reason."""
    reasons = {
        "cuda": cuda.why_unavailable(),
        "triton": "the Triton kernels are not part of this version",
        "torch": None,
    }
    return {name: "available" if why is None else f"unavailable: {why}" for name, why in reasons.items()}


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
        fits = {"torch"} if compile or set(devices) - {"cuda"} else set(available)
        name = next(backend for backend, why in available.items() if why == "available" and backend in fits)
    if available[name] != "available":
        raise RuntimeError(f"backend {name!r} is {available[name]}")
    if compile and name != "torch":
        raise ValueError(f"compile=True is for the torch backend; {name!r} is compiled already")
    return cuda.CudaOperators() if name == "cuda" else TorchOperators(compile)
