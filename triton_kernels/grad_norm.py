"""The squared norm of the gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk_table import ADAPTIVE, GRADS, LIVE, Table, chunk_of, compute_dtype, for_each, load
from .launch import jit, launch
from .reduce import group_sum
from .update_math import added_to_gradient


@triton.jit
def add_squares(arguments, sums, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """Process one tile of a sum of squares."""
    grad, live, adaptive, added = arguments
    g = load(grad, where, mask, dtype, width)
    if len(added) > 0:
        g = tl.fma(added[1], load(added[0], where, mask, compute_dtype(dtype), width), g)
    w = load(live, where, mask & adaptive, dtype, width)
    x = tl.where(adaptive, w * g, g)
    return (sums[0] + tl.sum(x * x, 1),)


@jit
def grad_norm_kernel(
    rows, chunks, group_begin, tickets, num_groups, partial, norms, direction_weight,
    dtype: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """Compute |g|^2 per group, or | |w| g |^2 if weighted, or |g + x h|^2 with a direction h.

    Reads g, and w or h if given: 4 or 8 bytes per element in float32.
    """
    row, index = chunk_of(rows, chunks)
    added = added_to_gradient(row, direction_weight, dtype)
    arguments = (tl.load(row + GRADS), tl.load(row + LIVE), tl.load(row + ADAPTIVE) != 0, added)
    sums = (tl.zeros([VECTORS], compute_dtype(dtype)),)
    # Keep four vectors in flight; by default, the compiler often chooses one.
    sums = for_each(add_squares, arguments, sums, row, index, dtype, VECTORS, 4)
    group_sum(sums, row, group_begin, tickets, num_groups, partial, norms, 1)


def launch_grad_norm(dtype: torch.dtype, table: Table, direction_weight: Tensor | None, norms: Tensor) -> None:
    """norms [groups] <- squared norm of the gradient, times `live` if `adaptive`, or plus the weighted direction."""
    launch(grad_norm_kernel, table, dtype, *table[:4], norms.shape[0], table.partial, norms, direction_weight)
