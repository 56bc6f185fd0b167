"""The Gram matrix of the gradient and its finite differences, and ghat."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk_table import (
    ADAPTIVE,
    GRADS,
    GRAM,
    GROUP,
    LIVE,
    PASSES,
    SAVED,
    Table,
    addresses,
    chunk_of,
    compute_dtype,
    for_each,
    load,
    load_all,
    store,
)  # fmt: skip
from .launch import MORE_REGISTERS, jit, launch
from .reduce import group_sum
from .update_math import Decision, basis, combined, weights_of


@triton.jit
def add_products(arguments, sums, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """Process one tile of the sums. Only ASAM loads w; the arithmetic is always the same and cheaper than a branch."""
    grads, saved, adaptive, out, weights = arguments
    loaded = load_all(grads, where, mask, dtype, width)
    vectors = basis(loaded)
    w = load(saved, where, mask & adaptive, compute_dtype(dtype), width)
    h = tl.where(adaptive, w * w * vectors[0], vectors[0])
    new = ()
    for x in tl.static_range(PASSES):
        for y in tl.static_range(x, PASSES):
            new = new + (sums[len(new)] + tl.sum(vectors[x] * vectors[y], 1),)
    for x in tl.static_range(PASSES):
        new = new + (sums[len(new)] + tl.sum(h * vectors[x], 1),)
    if len(weights) > 0:
        store(out, where, mask, combined(weights, loaded), dtype, width)
    return new


@jit
def fd_gram_kernel(
    rows, chunks, group_begin, tickets, num_groups, partial, gram, pass_weights, factor,
    COMBINES: tl.constexpr, dtype: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """Compute, per group, the inner products of (g0, d1, d2), and of h with each of them; h is g0, or w^2 g0 (ASAM).

    Reads g0, g+, g-, and w for ASAM: 12 bytes per element in float32 (16 with w). COMBINES: also writes ghat times the
    factor to the row's LIVE, which may be the memory of g-: 16 bytes.
    """
    row, index = chunk_of(rows, chunks)
    weights = ()
    if COMBINES:
        weights = weights_of(tl.load(row + GROUP), num_groups, pass_weights, factor, compute_dtype(dtype))
    adaptive = tl.load(row + ADAPTIVE) != 0
    arguments = (addresses(row + GRADS, PASSES), tl.load(row + SAVED), adaptive, tl.load(row + LIVE), weights)
    sums = ()
    for _ in tl.static_range(GRAM):
        sums = sums + (tl.zeros([VECTORS], compute_dtype(dtype)),)
    sums = for_each(add_products, arguments, sums, row, index, dtype, VECTORS)
    group_sum(sums, row, group_begin, tickets, num_groups, partial, gram, GRAM)


def launch_fd_gram(dtype: torch.dtype, table: Table, gram: Tensor) -> None:
    """gram [groups, GRAM] <- inner products of (g0, d1, d2), then of h with each; see `fd_gram_kernel`."""
    launch(fd_gram_kernel, table, dtype, *table[:4], gram.shape[0], table.partial, gram, None, None, COMBINES=False)


def launch_fd_combine(dtype: torch.dtype, table: Table, decision: Decision, gram: Tensor) -> None:
    """gram as for `launch_fd_gram`, and live <- ghat times the factor."""
    arguments = (*table[:4], gram.shape[0], table.partial, gram, *decision)
    launch(fd_gram_kernel, table, dtype, *arguments, registers=MORE_REGISTERS, COMBINES=True)
