"""The elementwise formulas. All other files in this folder move data to and from them.

Multiply-adds are written as fma, so that the result does not depend on which operations a compiler contracts. Division
and square root are rounded as IEEE 754 requires, which is not Triton's default in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .chunk_table import DIRECTION, PASSES, compute_dtype, digits, smallest_exponent
from .launch import MORE_REGISTERS, REGISTERS

# An option takes four words of the option table: the address of a float32, the address of a float64, a value, and
# 1 - value, both in float64. The value is used if both addresses are 0.
WORDS = tl.constexpr(4)


@triton.jit
def root(x):
    """The square root; Triton's function depends on the dtype."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def quotient(x, y):
    """x / y; Triton's function depends on the dtype."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def resolve(option, dtype: tl.constexpr):
    """The value x of an option."""
    single, wide = tl.load(option), tl.load(option + 1)
    value = tl.load(option + 2).to(tl.float64, bitcast=True)
    from_single = tl.load(single.to(tl.pointer_type(tl.float32)), mask=single != 0, other=0)
    from_wide = tl.load(wide.to(tl.pointer_type(tl.float64)), mask=wide != 0, other=0)
    return tl.where(single != 0, from_single.to(dtype), tl.where(wide != 0, from_wide, value).to(dtype))


@triton.jit
def resolve_complement(option, dtype: tl.constexpr):
    """1 - x, subtracted in float64 unless x is float32: in float32, 1 - 0.999 has only four correct digits."""
    single, wide = tl.load(option), tl.load(option + 1)
    complement = tl.load(option + 3).to(tl.float64, bitcast=True)
    from_single = tl.load(single.to(tl.pointer_type(tl.float32)), mask=single != 0, other=0)
    from_wide = tl.load(wide.to(tl.pointer_type(tl.float64)), mask=wide != 0, other=0)
    return tl.where(single != 0, 1 - from_single.to(dtype), tl.where(wide != 0, 1 - from_wide, complement).to(dtype))


@triton.jit
def one_minus_power(x, t):
    """1 - (1 - x)^t, to full precision for small x, in the dtype of x.

    This is -expm1(t log1p(-x)). Kahan's formulas for expm1 and log1p need only exp and log: an error in 1 - x or in
    exp(y) cancels between numerator and denominator. Computed in float64, once per program.
    """
    small = x.to(tl.float64)
    u = 1 - small
    log1p = tl.where(u == 1, -small, tl.log(u) * (small / tl.where(u == 1, 1.0, 1 - u)))
    y = t.to(tl.float64) * log1p
    e = tl.exp(y)
    inside = (e != 1) & (e > 0)
    expm1 = tl.where(inside, (e - 1) * (y / tl.log(tl.where(inside, e, 2.0))), tl.where(e == 1, y, e - 1))
    return (-expm1).to(x.dtype)


@triton.jit
def perturbed(w, g, scale, adaptive):
    """w + s g (SAM) or w + s w^2 g (ASAM)"""
    return tl.fma(scale, tl.where(adaptive, w * w * g, g), w)


@triton.jit
def hashed(w, g):
    """Hash the bits of w and g to 13 random bits with the finalizer of MurmurHash3.

    w + e and w - e use the same bits; the next step uses others.
    """
    h = w.to(tl.uint32, bitcast=True) ^ (g.to(tl.uint32, bitcast=True) * 0x9E3779B1)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return (h ^ (h >> 16)) >> 19


@triton.jit
def dithered(x, random, dtype: tl.constexpr):
    """Round x stochastically to `dtype`.

    Adds q u and rounds down, where q is the distance between neighboring numbers in `dtype`, and u the random number in
    [0, 1). The probability of rounding up is the part that is cut off, divided by q. All operations except x + q u are
    exact. Below SMALLEST, q stays constant, although `dtype` may be finer there.
    """
    DIGITS: tl.constexpr = digits(dtype)
    SMALLEST: tl.constexpr = smallest_exponent(dtype)
    exponent = tl.maximum((x.to(tl.uint32, bitcast=True) >> 23) & 255, SMALLEST)
    q = ((exponent - DIGITS) << 23).to(tl.float32, bitcast=True)
    inverse = ((254 + DIGITS - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.floor(tl.fma(x, inverse, random.to(tl.float32) * 2.0**-13)) * q


@triton.jit
def basis(grads):
    """g0 and the differences, d1 = g+ - g-,  d2 = (g+ - g0) + (g- - g0)."""
    return grads[0], grads[1] - grads[2], (grads[1] - grads[0]) + (grads[2] - grads[0])


class Decision(NamedTuple):
    """The results of `coefficients`."""

    pass_weights: Tensor  #: [PASSES - 1, groups]
    factor: Tensor | None  #: 0-dim


@triton.jit
def weights_of(group, num_groups, pass_weights, factor, dtype: tl.constexpr):
    """The weights of the passes for one group, and the factor, in the compute dtype."""
    weights = ()
    for i in tl.static_range(PASSES - 1):
        weights = weights + (tl.load(pass_weights + i * num_groups + group).to(dtype),)
    one = tl.full([], 1.0, dtype)
    if factor is not None:
        one = tl.load(factor).to(dtype)
    return weights + (one,)


@triton.jit
def with_differences(weights, start, grads):
    """start + sum of c_i (g_i - g0); weights: of each pass after the first, then c."""
    for i in tl.static_range(PASSES - 1, 0, -1):
        start = tl.fma(weights[i - 1], grads[i] - grads[0], start)
    return start


@triton.jit
def combined(weights, grads):
    """ghat = c (g+ + sum of c_i (g_i - g0))"""
    return weights[PASSES - 1] * with_differences(weights, grads[1], grads)


@triton.jit
def direction(weights, grads):
    """h = c ((g+ - g0) + sum of c_i (g_i - g0)), the difference of ghat and g0"""
    return weights[PASSES - 1] * with_differences(weights, grads[1] - grads[0], grads)


@triton.jit
def added_to_gradient(row, direction_weight, dtype: tl.constexpr):
    """The address and the weight of a row's direction; empty if there is no weight."""
    if direction_weight is None:
        return ()
    else:
        return tl.load(row + DIRECTION), tl.load(direction_weight).to(compute_dtype(dtype))


# The update rules. Each rule has two functions. The first one computes the numbers that the second one needs, from the
# options of a group, the number of steps of the row, and whether the row has state. If the row has no state, the state
# is 0 on entry and its new value is discarded. `maximize` is always the first option.
MAXIMIZE = tl.constexpr(0)

SGD_LR = tl.constexpr(1)
SGD_MOMENTUM = tl.constexpr(2)
SGD_DAMPENING = tl.constexpr(3)
SGD_WEIGHT_DECAY = tl.constexpr(4)
SGD_NESTEROV = tl.constexpr(5)

ADAM_LR = tl.constexpr(1)
ADAM_BETA1 = tl.constexpr(2)
ADAM_BETA2 = tl.constexpr(3)
ADAM_EPS = tl.constexpr(4)
ADAM_WEIGHT_DECAY = tl.constexpr(5)
ADAM_DECOUPLED_WEIGHT_DECAY = tl.constexpr(6)


@triton.jit
def sgd_of(options, step, has_state, dtype: tl.constexpr):
    """The numbers of torch.optim.SGD for one group. Its first momentum is the gradient itself, without dampening."""
    momentum = tl.where(has_state, resolve(options + WORDS * SGD_MOMENTUM, dtype), 0.0)
    dampened = has_state & (step > 1)
    return (
        resolve(options + WORDS * SGD_LR, dtype),
        momentum,
        tl.where(dampened, resolve_complement(options + WORDS * SGD_DAMPENING, dtype), 1.0),
        resolve(options + WORDS * SGD_WEIGHT_DECAY, dtype),
        resolve(options + WORDS * SGD_NESTEROV, dtype) != 0,
    )


@triton.jit
def sgd(rule, w, state, g):
    """w and the state, m, after a step of torch.optim.SGD; without momentum, m is the gradient.

    g += weight_decay w,  m = momentum m + (1 - dampening) g,  w -= lr m, or with nesterov w -= lr (g + momentum m)
    """
    lr, momentum, undamped, weight_decay, nesterov = rule
    m = state[0]
    g = tl.where(weight_decay != 0, tl.fma(weight_decay, w, g), g)
    m = tl.fma(undamped, g, momentum * m)
    return tl.fma(-lr, tl.where(nesterov, tl.fma(momentum, m, g), m), w), (m,)


@triton.jit
def adam_of(options, step, dtype: tl.constexpr):
    """The numbers of torch.optim.Adam and AdamW for one group."""
    lr = resolve(options + WORDS * ADAM_LR, dtype)
    rest1 = resolve_complement(options + WORDS * ADAM_BETA1, dtype)
    rest2 = resolve_complement(options + WORDS * ADAM_BETA2, dtype)
    weight_decay = resolve(options + WORDS * ADAM_WEIGHT_DECAY, dtype)
    decoupled = resolve(options + WORDS * ADAM_DECOUPLED_WEIGHT_DECAY, dtype) != 0
    one = tl.full([], 1.0, dtype)
    return (
        resolve(options + WORDS * ADAM_BETA1, dtype),
        resolve(options + WORDS * ADAM_BETA2, dtype),
        rest1,
        rest2,
        root(one_minus_power(rest2, step)),
        resolve(options + WORDS * ADAM_EPS, dtype),
        quotient(lr, one_minus_power(rest1, step)),
        tl.where(decoupled, 0.0, weight_decay),
        tl.where(decoupled, tl.fma(-lr, weight_decay, one), one),
    )


@triton.jit
def adam(rule, w, state, g):
    """w and the state, m and v, after a step of torch.optim.Adam or AdamW.

    m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
    w = (1 - lr weight_decay) w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    Adam first computes g += weight_decay w, and has no factor on w.
    """
    beta1, beta2, rest1, rest2, root_correction2, eps, step_size, weight_decay, shrink = rule
    m, v = state
    g = tl.where(weight_decay != 0, tl.fma(weight_decay, w, g), g)
    m = tl.fma(beta1, m, rest1 * g)
    v = tl.fma(beta2, v, rest2 * g * g)
    denominator = quotient(root(v), root_correction2) + eps
    return tl.fma(-step_size, quotient(m, denominator), shrink * w), (m, v)


@triton.jit
def prepared(options, step, has_state, dtype: tl.constexpr, RULE: tl.constexpr):
    """The numbers of a rule for one group."""
    if RULE == "sgd":
        return sgd_of(options, step, has_state, dtype)
    else:
        return adam_of(options, step, dtype)


@triton.jit
def updated(rule, w, state, g, RULE: tl.constexpr):
    """w and the state after a step of a rule."""
    if RULE == "sgd":
        return sgd(rule, w, state, g)
    else:
        return adam(rule, w, state, g)


class Rule(NamedTuple):
    """The sizes of an update rule."""

    options: int  #: options per group
    buffers: int  #: state buffers
    registers: int = REGISTERS  #: maximum number of registers per thread


#: The rules by the name in their options.
RULES = {"sgd": Rule(options=6, buffers=1), "adam": Rule(options=7, buffers=2, registers=MORE_REGISTERS)}


@triton.constexpr_function
def options_of(rule):
    """The number of options per group."""
    return RULES[rule].options


@triton.constexpr_function
def buffers_of(rule):
    """The number of state buffers."""
    return RULES[rule].buffers
