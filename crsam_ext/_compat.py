"""Interfaces that are private to torch, in one place: what is relied on, and what happens without it.

They were tried with torch 2.14; ``tests/test_compat.py`` has a test for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.dlpack import from_dlpack

__all__ = ["attributes_of", "mark_stepped", "segment", "storage_is_shared"]

# What torch keeps on an optimizer for itself: hooks, and the names of profiler ranges.
_TORCHS_OWN = ("_optimizer_", "_zero_grad_profile_name", "_warned_capturable_if_run_uncaptured")


def storage_is_shared(storage: torch.UntypedStorage) -> bool:
    """Whether tensors other than the caller's one refer to ``storage``: views, ``detach()``, a NumPy array.

    False where torch does not tell.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    return count is not None and count(storage._cdata) > 2  # the tensor, and ``storage`` itself


def segment(flat: Tensor, start: int, numel: int) -> Tensor:
    """A part of a 1-D tensor, with a storage of its own over that memory.

    safetensors and Accelerate take tensors of one storage for one tied tensor, of which they save one or refuse to save
    any, and torch.save writes storages whole. That DLPack makes a storage of just the part is not documented.
    """
    return from_dlpack(flat[start : start + numel])


def mark_stepped(optimizer: Optimizer) -> None:
    """Tell a scheduler that the optimizer has made a step; otherwise it warns that it comes too early."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def attributes_of(optimizer: Optimizer) -> dict[str, Any]:
    """The attributes of an optimizer that belong into a copy: all but those that torch makes anew."""
    return {name: value for name, value in vars(optimizer).items() if not name.startswith(_TORCHS_OWN)}
