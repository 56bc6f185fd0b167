"""Kernels that work on a few numbers per group."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from crsam_ext import ops

from .chunk_table import GRAM
from .launch import jit, launch_one

LANES = tl.constexpr(128)  # number of groups or step counters that are read at a time
CLIP_EPSILON = tl.constexpr(ops.CLIP_EPSILON)
PRODUCTS = tl.constexpr(ops.GRAM - ops.PASSES)  # number of inner products without h


@jit
def perturbation_scale_kernel(squared_norm, rho, epsilon: tl.float64, scale, num_groups):
    """scale = rho / (sqrt(sum of squared norms) + epsilon), per group. One program."""
    lane = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float64)
    for first in range(0, num_groups, LANES):
        total += tl.load(squared_norm + first + lane, mask=first + lane < num_groups, other=0)
    norm = tl.sqrt(tl.sum(total, 0))
    for first in range(0, num_groups, LANES):
        known = first + lane < num_groups
        tl.store(scale + first + lane, tl.load(rho + first + lane, mask=known) / (norm + epsilon), mask=known)


@jit
def direction_weight_kernel(
    squared_norm, squared_direction, decay, grad_scale, max_ratio: tl.float64, epsilon: tl.float64, weight, num_groups
):
    """weight = min(decay * grad_scale, max_ratio |g| / (|h| + epsilon)); grad_scale is 1 if None. One program."""
    lane = tl.arange(0, LANES)
    of_g, of_h = tl.zeros([LANES], tl.float64), tl.zeros([LANES], tl.float64)
    for first in range(0, num_groups, LANES):
        known = first + lane < num_groups
        of_g += tl.load(squared_norm + first + lane, mask=known, other=0)
        of_h += tl.load(squared_direction + first + lane, mask=known, other=0)
    most = max_ratio * tl.sqrt(tl.sum(of_g, 0)) / (tl.sqrt(tl.sum(of_h, 0)) + epsilon)
    decayed = tl.load(decay)
    if grad_scale is not None:
        decayed *= tl.load(grad_scale)
    tl.store(weight, tl.where(most > decayed, decayed, most))  # NaN stays NaN


@triton.jit
def quadratic_form(gram, known, x, y, z):
    """The squared norm of x g0 + y d1 + z d2 of each group, from its row of the Gram matrix."""
    g00 = tl.load(gram, mask=known, other=0)
    g01 = tl.load(gram + 1, mask=known, other=0)
    g02 = tl.load(gram + 2, mask=known, other=0)
    g11 = tl.load(gram + 3, mask=known, other=0)
    g12 = tl.load(gram + 4, mask=known, other=0)
    g22 = tl.load(gram + 5, mask=known, other=0)
    return x * x * g00 + y * y * g11 + z * z * g22 + 2 * (x * y * g01 + x * z * g02 + y * z * g12)


@triton.jit
def norm_of(squared):
    """The square root of a squared norm, which rounding can make slightly negative. NaN stays NaN."""
    return tl.sqrt(tl.where(squared < 0, 0.0, squared))


@triton.jit
def weight_of(weight, curvature, known, REGULARIZER: tl.constexpr):
    """a from alpha and kappa, or b from beta and sigma.

    linear: alpha. log: alpha / kappa, or 0 if kappa is not positive.
    """
    x = tl.load(weight, mask=known, other=0)
    if REGULARIZER == "log":
        x = tl.where(curvature > 0, x / curvature, 0.0)
    return x


@jit
def coefficients_kernel(
    gram, norms, scale, alpha, beta, losses, grad_scale, counters, taken, part, counts,
    pass_weights, numbers, flags, num_groups, max_regularizer_ratio: tl.float64, max_grad_norm: tl.float64,
    REGULARIZER: tl.constexpr,
):  # fmt: skip
    """Compute a, b, the clip factor and whether the step is finite, from sums over all elements; advance the counters.

    One program, because the inputs are a few numbers per group. See `Operators.coefficients` for the mathematics.
    """
    lane = tl.arange(0, LANES)
    zero = tl.zeros([LANES], tl.float64)

    # Sums over groups: of all inputs, to detect NaN and Inf; of the last pass's squared norm; of kappa and sigma.
    everything, last_norm, kappas, sigmas = zero, zero, zero, zero
    for first in range(0, num_groups, LANES):
        group = first + lane
        known = group < num_groups
        for i in tl.static_range(len(norms)):
            norm = tl.load(norms[i] + group, mask=known, other=0)
            everything += norm
            if i == len(norms) - 1:
                last_norm += norm
        if gram is not None:
            for k in tl.static_range(GRAM):
                everything += tl.load(gram + GRAM * group + k, mask=known, other=0)
            s = tl.load(scale + group, mask=known, other=0)
            eg0 = tl.load(gram + GRAM * group + PRODUCTS + 0, mask=known, other=0)
            ed1 = tl.load(gram + GRAM * group + PRODUCTS + 1, mask=known, other=0)
            ed2 = tl.load(gram + GRAM * group + PRODUCTS + 2, mask=known, other=0)
            kappas += s * ed1
            sigmas += s * (2 * eg0 + ed2 / 3)
    total = tl.sum(everything, 0)
    sound = tl.abs(total) < float("inf")  # False for NaN
    unscale = tl.full([], 1.0, tl.float64)
    if grad_scale is not None:  # the scale of gradients and norms; e is not scaled
        unscale /= tl.load(grad_scale)
    curvature, difference = tl.sum(kappas, 0) / 2 * unscale, tl.sum(sigmas, 0) * unscale
    if len(losses) == 3:
        loss, ascent, descent = tl.load(losses[0]), tl.load(losses[1]), tl.load(losses[2])
        curvature = ascent + descent - 2 * loss
        difference = ascent - descent

    # The weights before the cap, and the norms of a d2 + b d1 and of g+ = g0 + d1 / 2 + d2 / 2.
    regularizers, ascents = zero, zero
    if gram is not None:
        for first in range(0, num_groups, LANES):
            group = first + lane
            known = group < num_groups
            a = weight_of(alpha + group, curvature, known, REGULARIZER)
            b = weight_of(beta + group, difference, known, REGULARIZER)
            regularizers += quadratic_form(gram + GRAM * group, known, 0.0, b, a)
            ascents += quadratic_form(gram + GRAM * group, known, 1.0, 0.5, 0.5)
    ratio = tl.full([], 0.0, tl.float64)
    if gram is not None:
        ratio = norm_of(tl.sum(regularizers, 0)) / norm_of(tl.sum(ascents, 0))
    too_large = ratio > max_regularizer_ratio
    cap = tl.where(too_large, max_regularizer_ratio / ratio, 1.0)

    # The weights after the cap, and the norm of ghat = g0 + (1/2 + b) d1 + (1/2 + a) d2.
    ghats = zero
    for first in range(0, num_groups, LANES):
        group = first + lane
        known = group < num_groups
        a = weight_of(alpha + group, curvature, known, REGULARIZER) * cap
        b = weight_of(beta + group, difference, known, REGULARIZER) * cap
        tl.store(pass_weights + group, a + b, mask=known)  # a d2 + b d1 = (a + b) (g+ - g0) + (a - b) (g- - g0)
        tl.store(pass_weights + num_groups + group, a - b, mask=known)
        if gram is not None:
            ghats += quadratic_form(gram + GRAM * group, known, 1.0, b + 0.5, a + 0.5)
    squared = tl.sum(last_norm, 0)
    if gram is not None:
        squared = tl.sum(ghats, 0)
    clip = max_grad_norm / (norm_of(squared) * unscale + CLIP_EPSILON)
    unclipped = (clip > 1) | (max_grad_norm == float("inf"))
    tl.store(numbers, tl.where(unclipped, 1.0, clip) * unscale)  # in the order of `Coefficients`
    tl.store(numbers + 1, curvature)
    tl.store(numbers + 2, difference)
    tl.store(numbers + 3, ratio)
    tl.store(flags, sound.to(tl.uint8))
    tl.store(flags + 1, too_large.to(tl.uint8))

    # Atomic: with a plain load and store, threads could load a value that another thread has already stored.
    tl.atomic_add(counters, (sound == 0).to(tl.int64), sem="relaxed")
    if REGULARIZER != "linear":
        tl.atomic_add(counters + 1, (sound & (curvature <= 0)).to(tl.int64), sem="relaxed")
        tl.atomic_add(counters + 2, (sound & (difference <= 0)).to(tl.int64), sem="relaxed")
    tl.atomic_add(counters + 3, (sound & too_large).to(tl.int64), sem="relaxed")
    for i in tl.static_range(len(taken)):
        count = counts[i] * sound.to(tl.int32)
        for first in range(0, count, LANES):
            known = first + lane < count
            steps = tl.load(taken[i] + first + lane, mask=known) + tl.load(part[i] + first + lane, mask=known)
            tl.store(taken[i] + first + lane, steps, mask=known)


def launch_perturbation_scale(squared_norm: Tensor, rho: Tensor, epsilon: float, scale: Tensor) -> None:
    """scale [groups] <- rho / (norm + epsilon)"""
    launch_one(perturbation_scale_kernel, (), scale.device, squared_norm, rho, epsilon, scale, scale.shape[0])


def launch_direction_weight(
    squared_norm: Tensor,
    squared_direction: Tensor,
    decay: Tensor,
    grad_scale: Tensor | None,
    max_ratio: float,
    epsilon: float,
    weight: Tensor,
) -> None:
    """weight (0-dim) <- min(decay * grad_scale, max_ratio |g| / (|h| + epsilon)); grad_scale is 1 if None."""
    numbers = (squared_norm, squared_direction, decay, grad_scale, max_ratio, epsilon)
    launch_one(direction_weight_kernel, (), weight.device, *numbers, weight, squared_norm.shape[0])


def launch_coefficients(
    gram: Tensor | None,
    norms: Sequence[Tensor],
    scale: Tensor,
    alpha: Tensor,
    beta: Tensor,
    losses: Sequence[Tensor],
    grad_scale: Tensor | None,
    counters: Tensor,
    taken: Sequence[Tensor],
    part: Sequence[Tensor],
    max_regularizer_ratio: float,
    max_grad_norm: float,
    regularizer: str,
    pass_weights: Tensor,
    numbers: Tensor,
    flags: Tensor,
) -> None:
    """pass_weights, numbers and flags (uint8) <- the results of the operator; counters and taken advance.

    norms: [groups] for each pass whose norm was computed; may be empty. losses: three 0-dim tensors, or empty to
    compute kappa and sigma from the gradients. grad_scale: 0-dim, the scale of all gradients. max_grad_norm: infinite
    for no clipping. part: 1 for each entry of `taken` that takes part in this step.
    """
    counts = tuple(x.numel() for x in taken)
    # Triton specializes on the content of tuples: on numbers, and on whether an address is a multiple of 16.
    tuples = tuple(norms), tuple(losses), tuple(taken), tuple(part)
    aligned = [tuple(x.data_ptr() % 16 == 0 for x in tensors) for tensors in tuples]
    norms, losses, taken, part = tuples
    launch_one(
        coefficients_kernel, (counts, *aligned), alpha.device,
        gram, norms, scale, alpha, beta, losses, grad_scale, counters, taken, part, counts,
        pass_weights, numbers, flags, alpha.numel(), max_regularizer_ratio, max_grad_norm, REGULARIZER=regularizer,
    )  # fmt: skip
