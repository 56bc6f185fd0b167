"""Interfaces that are private to torch, each with what the rest of the package does without it."""

from __future__ import annotations

import torch

__all__ = ["storage_is_shared"]


def storage_is_shared(storage: torch.UntypedStorage) -> bool:
    """Whether tensors other than the caller's one refer to ``storage``: views, ``detach()``, a NumPy array.

    False where torch does not tell; torch has told since 2.1.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    return count is not None and count(storage._cdata) > 2  # the tensor, and ``storage`` itself
