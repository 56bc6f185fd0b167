"""The perturbation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crsam_ext.precision import has_master

from .chunk_table import ADAPTIVE, GRADS, GROUP, LIVE, SAVED, Table, chunk_of, compute_dtype, for_each, load, store
from .launch import jit, launch
from .update_math import dithered, hashed, perturbed


@triton.jit
def moved(w, g, scale, adaptive, stochastic: tl.constexpr, dtype: tl.constexpr):
    """w + e, before it is rounded or, for float16 and bfloat16, stochastically rounded.

    Then the step is made from w as the model has read it, rounded, and its end is rounded up or down at random, so that
    on average the model moves by e, however small that is.
    """
    if stochastic and compute_dtype(dtype) != dtype:
        rounded = w.to(dtype).to(compute_dtype(dtype))
        return dithered(perturbed(rounded, g, scale, adaptive), hashed(w, g), dtype)
    else:
        return perturbed(w, g, scale, adaptive)


@triton.jit
def save_and_perturb(arguments, sums, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """One tile of a launch that saves w first.

    For float16 and bfloat16 `saved` is a master that normally rounds to `live`, and holds then more digits of w. Where
    it does not, someone has changed the parameter since the last step, and w is `live`. Writes are rare, so vectors in
    which nothing has changed are left out.
    """
    live, saved, grad, scale, adaptive, stochastic = arguments
    master: tl.constexpr = compute_dtype(dtype)
    g = load(grad, where, mask, dtype, width)
    w = load(live, where, mask, dtype, width)
    if master == dtype:
        store(saved, where, mask, w, master, width)
    else:
        kept = load(saved, where, mask, master, width)
        changed = kept.to(dtype).to(master) != w
        w = tl.where(changed, w, kept)
        store(saved, where, mask & (tl.max(changed.to(tl.int32), 1, keep_dims=True) != 0), w, master, width)
    store(live, where, mask, moved(w, g, scale, adaptive, stochastic, dtype), dtype, width)
    return sums


@triton.jit
def perturb(arguments, sums, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """One tile of a launch that finds w saved."""
    live, saved, grad, scale, adaptive, stochastic = arguments
    g = load(grad, where, mask, dtype, width)
    w = load(saved, where, mask, compute_dtype(dtype), width)
    store(live, where, mask, moved(w, g, scale, adaptive, stochastic, dtype), dtype, width)
    return sums


@jit
def perturb_kernel(
    rows, chunks, scale, marker, number: tl.int64,
    SAVE: tl.constexpr, STOCHASTIC: tl.constexpr, dtype: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """live = w + s g, or w + s w^2 g (ASAM), where w is `saved`.   In float32: reads w, g, writes live: 12 bytes.

    SAVE: first saves w.   In float32: reads live, g, writes saved, live: 16 bytes.

    The first program leaves the number of the launch, for whoever must know after an exception whether there was one.
    """
    if tl.program_id(0) == 0:
        tl.store(marker, number)
    row, index = chunk_of(rows, chunks)
    s = tl.load(scale + tl.load(row + GROUP)).to(compute_dtype(dtype))
    live, saved, grad = tl.load(row + LIVE), tl.load(row + SAVED), tl.load(row + GRADS)
    adaptive = tl.load(row + ADAPTIVE) != 0
    if SAVE:
        for_each(save_and_perturb, (live, saved, grad, s, adaptive, STOCHASTIC), (), row, index, dtype, VECTORS)
    else:
        for_each(perturb, (live, saved, grad, -s, adaptive, STOCHASTIC), (), row, index, dtype, VECTORS)


def launch_perturb(
    dtype: torch.dtype, table: Table, scale: Tensor, sign: int, stochastic: bool, marker: Tensor, number: int
) -> None:
    """live <- w + sign e. With sign +1, w is saved first. marker [1] <- number, once the launch runs.

    Float16 and bfloat16 may be rounded stochastically.
    """
    arguments = (table.rows, table.chunks, scale, marker, number)
    launch(perturb_kernel, table, dtype, *arguments, SAVE=sign > 0, STOCHASTIC=stochastic and has_master(dtype))
