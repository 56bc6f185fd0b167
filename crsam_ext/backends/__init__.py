"""Which implementation of the operators runs, and why the others do not."""

from __future__ import annotations

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


def load(name: str, *, compile: bool = False) -> Operators:
    """The operators of a backend.

    Args:
        name: "auto" (the first available one), "cuda", "triton" or "torch".
        compile: run the torch backend's operators through ``torch.compile``.
    Raises:
        ValueError: for an unknown name, or ``compile`` with a backend that is compiled already.
        RuntimeError: if the backend is not available, with the reason.
    """
    available = available_backends()
    if name not in ("auto", *available):
        raise ValueError(f"unknown backend {name!r}; choose from {', '.join(('auto', *available))}")
    chosen = next(b for b, why in available.items() if why == "available") if name == "auto" else name
    if available[chosen] != "available":
        raise RuntimeError(f"backend {chosen!r} is {available[chosen]}")
    if compile and chosen != "torch":
        raise ValueError(f"compile=True is for the torch backend; {chosen!r} is compiled already")
    return cuda.CudaOperators() if chosen == "cuda" else TorchOperators(compile)
