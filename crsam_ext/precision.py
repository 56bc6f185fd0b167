"""The dtypes that parameters may have, and how each is computed with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["PRECISIONS", "Precision", "compute_dtype", "has_master"]


@dataclass(frozen=True)
class Precision:
    """How rows of a dtype are computed with."""

    #: In which dtype: for narrow parameters a wider one, in which they have a master copy too.
    compute: torch.dtype
    #: Binary digits of the significand after the first; of narrow dtypes, for their stochastic rounding.
    digits: int = 0
    #: The exponent of the smallest normal number, as float32 stores it, biased by 127; likewise.
    smallest_exponent: int = 0


PRECISIONS = {
    torch.float64: Precision(torch.float64),
    torch.float32: Precision(torch.float32),
    torch.float16: Precision(torch.float32, digits=10, smallest_exponent=113),
    torch.bfloat16: Precision(torch.float32, digits=7, smallest_exponent=8),
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows of ``dtype`` are computed: float64 for float64, float32 for all others."""
    return PRECISIONS[dtype].compute


def has_master(dtype: torch.dtype) -> bool:
    """Whether parameters of ``dtype`` have a master copy, in which w is kept from step to step."""
    return dtype in PRECISIONS and PRECISIONS[dtype].compute != dtype
