"""The updates: SGD, Adam and AdamW, and the gradient for any other optimizer."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk_table import (
    FIRST,
    GRAD,
    GRAD_ASCENT,
    GRAD_DESCENT,
    GROUP,
    LIVE,
    SAVED,
    SECOND,
    STEP,
    Table,
    chunk_of,
    compute_dtype,
    for_each,
    load,
    store,
)  # fmt: skip
from .launch import REGISTERS_OF_ADAM, jit, launch
from .update_math import (
    ADAM_MAXIMIZE,
    ADAM_OPTIONS,
    SGD_MAXIMIZE,
    SGD_OPTIONS,
    WORDS,
    adam,
    adam_rule,
    combined,
    resolve,
    sgd,
    sgd_rule,
)  # fmt: skip


class Decision(NamedTuple):
    """What `coefficients` has decided."""

    a: Tensor  #: [groups]
    b: Tensor  #: [groups]
    factor: Tensor | None  #: 0-dim


@triton.jit
def weights_of(group, a, b, factor, dtype: tl.constexpr):
    """a, b and the factor of one group, in the compute dtype."""
    one = tl.full([], 1.0, dtype)
    if factor is not None:
        one = tl.load(factor).to(dtype)
    return tl.load(a + group).to(dtype), tl.load(b + group).to(dtype), one


@triton.jit
def gradients_of(row, DIFFERENCES: tl.constexpr):
    """The addresses of all three gradients, or of one."""
    if DIFFERENCES:
        return tl.load(row + GRAD), tl.load(row + GRAD_ASCENT), tl.load(row + GRAD_DESCENT)
    else:
        return (tl.load(row + GRAD),)


@triton.jit
def load_combined(grads, weights, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """ghat times the factor, from three gradients or from one."""
    g = load(grads[0], where, mask, dtype, width)
    if len(grads) == 3:
        ascent = load(grads[1], where, mask, dtype, width)
        return combined(weights, g, ascent, load(grads[2], where, mask, dtype, width))
    else:
        return weights[2] * g


@triton.jit
def store_parameters(live, saved, where, mask, w, dtype: tl.constexpr, width: tl.constexpr):
    """w into `live`, and into the master where there is one."""
    store(live, where, mask, w, dtype, width)
    if compute_dtype(dtype) != dtype:
        store(saved, where, mask, w, compute_dtype(dtype), width)


@triton.jit
def restore(arguments, sums, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """One tile of live = w."""
    live, saved = arguments
    store(live, where, mask, load(saved, where, mask, compute_dtype(dtype), width), dtype, width)
    return sums


@triton.jit
def sgd_step(arguments, sums, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """One tile of a step of SGD."""
    live, saved, momentum_buffer, grads, weights, rule = arguments
    master: tl.constexpr = compute_dtype(dtype)
    kept = mask & (momentum_buffer != 0)
    w = load(saved, where, mask, master, width)
    m = load(momentum_buffer, where, kept, master, width)
    w, m = sgd(rule, w, m, load_combined(grads, weights, where, mask, dtype, width))
    store(momentum_buffer, where, kept, m, master, width)
    store_parameters(live, saved, where, mask, w, dtype, width)
    return sums


@triton.jit
def adamw_step(arguments, sums, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """One tile of a step of Adam."""
    live, saved, exp_avg, exp_avg_sq, grads, weights, rule = arguments
    master: tl.constexpr = compute_dtype(dtype)
    w = load(saved, where, mask, master, width)
    m = load(exp_avg, where, mask, master, width)
    v = load(exp_avg_sq, where, mask, master, width)
    w, m, v = adam(rule, w, m, v, load_combined(grads, weights, where, mask, dtype, width))
    store(exp_avg, where, mask, m, master, width)
    store(exp_avg_sq, where, mask, v, master, width)
    store_parameters(live, saved, where, mask, w, dtype, width)
    return sums


@triton.jit
def combine(arguments, sums, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """One tile of ghat over the last gradient."""
    grads, weights = arguments
    last = grads[len(grads) - 1]
    store(last, where, mask, load_combined(grads, weights, where, mask, dtype, width), dtype, width)
    return sums


@jit
def sgd_step_kernel(
    rows, chunks, option_table, a, b, factor, ok,
    DIFFERENCES: tl.constexpr, dtype: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """torch.optim.SGD, see `sgd`.   In float32: reads w, m, g0, g+, g-, writes m, live: 28 bytes an element.

    A step that is not ok is skipped: live = w, and nothing else changes.
    """
    row, index = chunk_of(rows, chunks)
    live, saved, momentum_buffer = tl.load(row + LIVE), tl.load(row + SAVED), tl.load(row + FIRST)
    if tl.load(ok) != 0:
        group, step = tl.load(row + GROUP), tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32)))
        own = option_table + group * SGD_OPTIONS * WORDS
        wide_dtype: tl.constexpr = compute_dtype(dtype)
        wa, wb, wf = weights_of(group, a, b, factor, wide_dtype)
        wf = tl.where(resolve(own + WORDS * SGD_MAXIMIZE, wide_dtype) != 0, -wf, wf)
        rule = sgd_rule(own, step, momentum_buffer != 0, wide_dtype)
        arguments = (live, saved, momentum_buffer, gradients_of(row, DIFFERENCES), (wa, wb, wf), rule)
        for_each(sgd_step, arguments, (), row, index, dtype, VECTORS)
    elif live != saved:
        for_each(restore, (live, saved), (), row, index, dtype, VECTORS)


@jit
def adamw_step_kernel(
    rows, chunks, option_table, a, b, factor, ok,
    DIFFERENCES: tl.constexpr, dtype: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """torch.optim.Adam and AdamW, see `adam`.

    In float32: reads w, m, v, g0, g+, g-, writes m, v, live: 36 bytes an element. A step that is not ok is skipped:
    live = w, and nothing else changes.
    """
    row, index = chunk_of(rows, chunks)
    live, saved = tl.load(row + LIVE), tl.load(row + SAVED)
    if tl.load(ok) != 0:
        group, step = tl.load(row + GROUP), tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32)))
        own = option_table + group * ADAM_OPTIONS * WORDS
        wide_dtype: tl.constexpr = compute_dtype(dtype)
        wa, wb, wf = weights_of(group, a, b, factor, wide_dtype)
        wf = tl.where(resolve(own + WORDS * ADAM_MAXIMIZE, wide_dtype) != 0, -wf, wf)
        rule = adam_rule(own, step, wide_dtype)
        exp_avg, exp_avg_sq = tl.load(row + FIRST), tl.load(row + SECOND)
        arguments = (live, saved, exp_avg, exp_avg_sq, gradients_of(row, DIFFERENCES), (wa, wb, wf), rule)
        for_each(adamw_step, arguments, (), row, index, dtype, VECTORS)
    elif live != saved:
        for_each(restore, (live, saved), (), row, index, dtype, VECTORS)


@jit
def combine_kernel(rows, chunks, a, b, factor, DIFFERENCES: tl.constexpr, dtype: tl.constexpr, VECTORS: tl.constexpr):
    """ghat over the last gradient, and live = w.

    In float32: reads g0, g+, g-, w, writes g-, live: 24 bytes an element.
    """
    row, index = chunk_of(rows, chunks)
    if DIFFERENCES or factor is not None:
        weights = weights_of(tl.load(row + GROUP), a, b, factor, compute_dtype(dtype))
        for_each(combine, (gradients_of(row, DIFFERENCES), weights), (), row, index, dtype, VECTORS)
    live, saved = tl.load(row + LIVE), tl.load(row + SAVED)
    if live != saved:
        for_each(restore, (live, saved), (), row, index, dtype, VECTORS)


def launch_sgd_step(
    dtype: torch.dtype, table: Table, options: Tensor, decision: Decision, ok: Tensor, differences: bool
) -> None:
    """differences: whether all three gradients are given; with one only, it is `grad`. options: see `update_math`."""
    arguments = (table.rows, table.chunks, options, *decision, ok)
    launch(sgd_step_kernel, table, dtype, *arguments, DIFFERENCES=differences)


def launch_adamw_step(
    dtype: torch.dtype, table: Table, options: Tensor, decision: Decision, ok: Tensor, differences: bool
) -> None:
    """As `launch_sgd_step`."""
    arguments = (table.rows, table.chunks, options, *decision, ok)
    launch(adamw_step_kernel, table, dtype, *arguments, registers=REGISTERS_OF_ADAM, DIFFERENCES=differences)


def launch_combine(dtype: torch.dtype, table: Table, decision: Decision, differences: bool) -> None:
    """ghat over the last gradient, w into live."""
    launch(combine_kernel, table, dtype, table.rows, table.chunks, *decision, DIFFERENCES=differences)
