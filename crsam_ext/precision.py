"""The dtypes that parameters may have, and the dtype in which each is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["PRECISIONS", "Precision", "compute_dtype", "has_master"]


@dataclass(frozen=True)
class Precision:
    """How rows of a dtype are computed."""

    #: The dtype of the computation. For 16-bit parameters it is wider, and they have a master copy in it.
    compute: torch.dtype
    #: Explicit bits of the significand; only for 16-bit dtypes, for stochastic rounding.
    digits: int = 0
    #: The exponent of the smallest normal number, with the bias of float32 (127); only for 16-bit dtypes.
    smallest_exponent: int = 0


PRECISIONS = {
    torch.float64: Precision(torch.float64),
    torch.float32: Precision(torch.float32),
    torch.float16: Precision(torch.float32, digits=10, smallest_exponent=113),
    torch.bfloat16: Precision(torch.float32, digits=7, smallest_exponent=8),
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which rows of ``dtype`` are computed: float64 for float64, else float32."""
    return PRECISIONS[dtype].compute


def has_master(dtype: torch.dtype) -> bool:
    """Whether parameters of ``dtype`` have a master copy, which holds w between steps."""
    return dtype in PRECISIONS and PRECISIONS[dtype].compute != dtype
