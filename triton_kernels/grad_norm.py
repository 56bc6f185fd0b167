"""The squared norm of the gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk_table import ADAPTIVE, GRADS, LIVE, Table, chunk_of, compute_dtype, for_each, load
from .launch import jit, launch
from .reduce import group_sum


@triton.jit
def add_squares(arguments, sums, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """One tile of a sum of squares."""
    grad, live, adaptive = arguments
    g = load(grad, where, mask, dtype, width)
    w = load(live, where, mask & adaptive, dtype, width)
    x = tl.where(adaptive, w * g, g)
    return (sums[0] + tl.sum(x * x, 1),)


@jit
def grad_norm_kernel(
    rows, chunks, group_begin, tickets, num_groups, partial, norms, dtype: tl.constexpr, VECTORS: tl.constexpr
):
    """|g|^2 per group, or | |w| g |^2 where weighted.

    Reads g, and w where weighted: 4 bytes an element in float32.
    """
    row, index = chunk_of(rows, chunks)
    arguments = (tl.load(row + GRADS), tl.load(row + LIVE), tl.load(row + ADAPTIVE) != 0)
    sums = (tl.zeros([VECTORS], compute_dtype(dtype)),)
    # Four vectors on the way: left to itself, the compiler often makes it one.
    sums = for_each(add_squares, arguments, sums, row, index, dtype, VECTORS, 4)
    group_sum(sums, row, group_begin, tickets, num_groups, partial, norms, 1)


def launch_grad_norm(dtype: torch.dtype, table: Table, norms: Tensor) -> None:
    """norms [groups] <- squared norm of the gradient, times `live` where `adaptive`."""
    launch(grad_norm_kernel, table, dtype, *table[:4], norms.shape[0], table.partial, norms)
