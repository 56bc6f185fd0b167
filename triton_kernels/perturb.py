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
    """w + e before rounding; for float16 and bfloat16, stochastic rounding is optional.

    With stochastic rounding, e is added to w as the model reads it, rounded. The sum is rounded up or down at random,
    so that the model moves by e on average, even if e is very small.
    """
    if stochastic and compute_dtype(dtype) != dtype:
        rounded = w.to(dtype).to(compute_dtype(dtype))
        return dithered(perturbed(rounded, g, scale, adaptive), hashed(w, g), dtype)
    else:
        return perturbed(w, g, scale, adaptive)


@triton.jit
def save_and_perturb(arguments, sums, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """Process one tile: save w, then perturb.

    For float16 and bfloat16, `saved` is a master. Normally it rounds to `live` and contains more digits of w. If it
    does not round to `live`, the user changed the parameter since the last step, and w is `live`. Such changes are
    rare, so vectors of the master without a change are not written.
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
    """Process one tile: perturb; w is already saved."""
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
    """Write live = w + s g, or w + s w^2 g (ASAM), where w is `saved`. In float32: reads w, g, writes live: 12 bytes.

    SAVE: first saves w. In float32: reads live, g, writes saved, live: 16 bytes.

    The first program stores the number of the launch in `marker`. After an exception, it shows whether the launch ran.
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
    """live <- w + sign e. With sign +1, w is saved first. marker [1] <- number, when the launch runs.

    `stochastic` applies to float16 and bfloat16.
    """
    arguments = (table.rows, table.chunks, scale, marker, number)
    launch(perturb_kernel, table, dtype, *arguments, SAVE=sign > 0, STOCHASTIC=stochastic and has_master(dtype))
