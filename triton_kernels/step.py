"""The update kernels: one for the rules of `update_math`, and one that only combines gradients for other optimizers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk_table import (
    DIRECTION,
    GRADS,
    GROUP,
    LIVE,
    PASSES,
    SAVED,
    STATE,
    STEP,
    Table,
    addresses,
    chunk_of,
    compute_dtype,
    for_each,
    load,
    load_all,
    store,
)  # fmt: skip
from .launch import jit, launch
from .update_math import (
    MAXIMIZE,
    RULES,
    WORDS,
    Decision,
    added_to_gradient,
    buffers_of,
    combined,
    direction,
    options_of,
    prepared,
    resolve,
    updated,
    weights_of,
)  # fmt: skip


@triton.jit
def load_combined(grads, weights, added, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """ghat times the factor, from the gradients of all passes, or from one gradient and an optional direction.

    added: the address and weight of the direction, or empty.
    """
    loaded = load_all(grads, where, mask, dtype, width)
    if len(grads) == PASSES:
        return combined(weights, loaded)
    elif len(added) > 0:
        h = load(added[0], where, mask, compute_dtype(dtype), width)
        return weights[PASSES - 1] * tl.fma(added[1], h, loaded[0])
    else:
        return weights[PASSES - 1] * loaded[0]


@triton.jit
def restore(arguments, sums, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """Process one tile: live = w."""
    live, saved = arguments
    store(live, where, mask, load(saved, where, mask, compute_dtype(dtype), width), dtype, width)
    return sums


@triton.jit
def step(arguments, sums, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """Process one tile: apply an update rule."""
    live, saved, state, grads, weights, added, rule = arguments[:7]
    master: tl.constexpr = compute_dtype(dtype)
    kept = mask & (state[0] != 0)
    w = load(saved, where, mask, master, width)
    old = load_all(state, where, kept, master, width)
    g = load_combined(grads, weights, added, where, mask, dtype, width)
    w, new = updated(rule, w, old, g, arguments[7])  # the rule's name; Triton variables cannot hold strings
    for i in tl.static_range(len(state)):
        store(state[i], where, kept, new[i], master, width)
    store(live, where, mask, w, dtype, width)
    if master != dtype:
        store(saved, where, mask, w, master, width)
    return sums


@triton.jit
def combine(arguments, sums, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """Process one tile: write ghat over the last gradient."""
    grads, weights, added = arguments
    last = grads[len(grads) - 1]
    store(last, where, mask, load_combined(grads, weights, added, where, mask, dtype, width), dtype, width)
    return sums


@triton.jit
def keep_direction(arguments, sums, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """Process one tile: write ghat - g0, or 0 if the step is skipped."""
    grads, weights, ok, out = arguments
    loaded = load_all(grads, where, mask & ok, dtype, width)
    h = tl.where(ok, direction(weights, loaded), 0.0)
    store(out, where, mask, h, compute_dtype(dtype), width)
    return sums


@jit
def step_kernel(
    rows, chunks, option_table, pass_weights, factor, ok, direction_weight, num_groups,
    RULE: tl.constexpr, GIVEN: tl.constexpr, dtype: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """Apply an update rule, with the number of gradients GIVEN: all or one.

    In float32, with three gradients and n state buffers: reads w, the state and the gradients, writes the state and
    live: 20 + 8 n bytes per element; with one gradient and a direction, 16 + 8 n. If not ok, the step is skipped:
    live = w, and nothing else changes.
    """
    row, index = chunk_of(rows, chunks)
    live, saved = tl.load(row + LIVE), tl.load(row + SAVED)
    if tl.load(ok) != 0:
        group, taken = tl.load(row + GROUP), tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32)))
        own = option_table + group * options_of(RULE) * WORDS
        master: tl.constexpr = compute_dtype(dtype)
        weights = weights_of(group, num_groups, pass_weights, factor, master)
        maximized = resolve(own + WORDS * MAXIMIZE, master) != 0
        weights = weights[: PASSES - 1] + (tl.where(maximized, -weights[PASSES - 1], weights[PASSES - 1]),)
        state = addresses(row + STATE, buffers_of(RULE))
        rule = prepared(own, taken, state[0] != 0, master, RULE)
        grads = addresses(row + GRADS, GIVEN)
        added = added_to_gradient(row, direction_weight, dtype)
        for_each(step, (live, saved, state, grads, weights, added, rule, RULE), (), row, index, dtype, VECTORS)
    elif live != saved:
        for_each(restore, (live, saved), (), row, index, dtype, VECTORS)


@jit
def combine_kernel(
    rows, chunks, pass_weights, factor, direction_weight, num_groups,
    GIVEN: tl.constexpr, dtype: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """Write ghat over the last gradient, and restore live = w.

    In float32: reads g0, g+, g-, w, writes g-, live: 24 bytes per element.
    """
    row, index = chunk_of(rows, chunks)
    if GIVEN == PASSES or factor is not None or direction_weight is not None:
        weights = weights_of(tl.load(row + GROUP), num_groups, pass_weights, factor, compute_dtype(dtype))
        added = added_to_gradient(row, direction_weight, dtype)
        for_each(combine, (addresses(row + GRADS, GIVEN), weights, added), (), row, index, dtype, VECTORS)
    live, saved = tl.load(row + LIVE), tl.load(row + SAVED)
    if live != saved:
        for_each(restore, (live, saved), (), row, index, dtype, VECTORS)


@jit
def fd_direction_kernel(rows, chunks, pass_weights, factor, ok, num_groups, dtype: tl.constexpr, VECTORS: tl.constexpr):
    """Write h = ghat - g0, times the factor; 0 if the step is skipped.

    In float32: reads g0, g+, g-, writes the direction: 16 bytes per element.
    """
    row, index = chunk_of(rows, chunks)
    weights = weights_of(tl.load(row + GROUP), num_groups, pass_weights, factor, compute_dtype(dtype))
    arguments = (addresses(row + GRADS, PASSES), weights, tl.load(ok) != 0, tl.load(row + DIRECTION))
    for_each(keep_direction, arguments, (), row, index, dtype, VECTORS)


def launch_step(
    rule: str,
    dtype: torch.dtype,
    table: Table,
    options: Tensor,
    decision: Decision,
    ok: Tensor,
    direction_weight: Tensor | None,
    given: int,
) -> None:
    """Launch an update rule. given: the number of gradients, PASSES or 1. options: WORDS words for each option."""
    launch(
        step_kernel, table, dtype, table.rows, table.chunks, options, *decision, ok, direction_weight, table.num_groups,
        registers=RULES[rule].registers, RULE=rule, GIVEN=given,
    )  # fmt: skip


def launch_combine(
    dtype: torch.dtype, table: Table, decision: Decision, direction_weight: Tensor | None, given: int
) -> None:
    """last gradient <- ghat, live <- w."""
    arguments = (table.rows, table.chunks, *decision, direction_weight, table.num_groups)
    launch(combine_kernel, table, dtype, *arguments, GIVEN=given)


def launch_fd_direction(dtype: torch.dtype, table: Table, decision: Decision, ok: Tensor) -> None:
    """direction <- (ghat - g0) times the factor; 0 if the step is skipped."""
    launch(fd_direction_kernel, table, dtype, table.rows, table.chunks, *decision, ok, table.num_groups)
