"""The operators in PyTorch, for CPUs and for devices without fused kernels; ``torch.compile`` can fuse them.

On a CPU these operators are bound by memory bandwidth, and an eager expression such as ``g + a * d`` would write every
intermediate result to memory and read it back. So each row is processed in blocks that fit into the cache, with scratch
blocks that are allocated once. Only gradients, parameters and state travel through memory. With ``compile=True``,
``torch.compile`` fuses the same functions, one row at a time.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import GRAM, PASSES, Coefficients, Direction, Operators, Options, scalar
from ..precision import PRECISIONS, compute_dtype

__all__ = ["TorchOperators"]

# Elements in a block. On a CPU, the roughly eight blocks in use should stay in the last-level cache, and many elements
# should share the cost of a call (1 to 2 us); the speed hardly changes from 2^18 to 2^20. The block also limits the
# length of float32 sums: the error of torch.dot is below 1e-6 for this length, and 1e-4 for 2^24. On other devices, a
# block only limits the size of scratch.
_CPU_BLOCK = 2**19
_DEVICE_BLOCK = 2**22
# Elements per norm in the compute dtype. One call computes the norms of all pieces of a row, so the pieces can be
# short, and the error of squared norms is below 1e-7.
_PIECE = 2**14


def _block(device: torch.device) -> int:
    return _CPU_BLOCK if device.type == "cpu" else _DEVICE_BLOCK


class Scratch:
    """Numbered scratch blocks of one length, allocated on first use."""

    def __init__(self, allocate: Callable[[int, torch.dtype], Tensor], dtype: torch.dtype) -> None:
        self._allocate, self._dtype = allocate, dtype
        self._blocks: dict[tuple[int, torch.dtype], Tensor] = {}

    def __call__(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        key = (index, dtype or self._dtype)
        if key not in self._blocks:
            self._blocks[key] = self._allocate(*key)
        return self._blocks[key]


def _up(x: Tensor, scratch: Scratch, index: int) -> Tensor:
    """Return ``x`` in the compute dtype, without a copy if it already has this dtype."""
    return x if x.dtype == compute_dtype(x.dtype) else scratch(index).copy_(x)


def _differences(grads: Sequence[Tensor], scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """Return g0 in the compute dtype, d1 in scratch 3 and d2 in scratch 4; the gradients may use scratch 0 to 2."""
    g0, gp, gm = (_up(g, scratch, i) for i, g in enumerate(grads))
    d1, d2 = scratch(3), scratch(4)
    torch.sub(gp, g0, out=d2)
    torch.sub(gm, g0, out=d1)
    d2.add_(d1)
    torch.sub(gp, gm, out=d1)
    return g0, d1, d2


def _regularized(
    grads: Sequence[Tensor],
    direction: Tensor | None,
    weights: Sequence[Tensor],
    factor: Tensor | None,
    scratch: Scratch,
) -> Tensor:
    """Return factor * (g+ + sum of c_i (g_i - g0)) for a full step, otherwise factor * (last gradient + omega h).

    The result is in scratch 4, or it is the last gradient itself. The last entry of ``weights`` is omega, the weight of
    the direction h. The differences are exact if the gradients are within a factor of two (Sterbenz).
    """
    if len(grads) == PASSES:
        g0, gp = (_up(g, scratch, i) for i, g in enumerate(grads[:2]))
        ascent = torch.sub(gp, g0, out=scratch(4))
        g = torch.addcmul(gp, ascent, weights[0], out=ascent)
        for other, weight in zip(grads[2:], weights[1:-1], strict=True):
            g.addcmul_(torch.sub(_up(other, scratch, 2), g0, out=scratch(3)), weight)
    else:
        g = _up(grads[-1], scratch, 0)
        if direction is not None:
            g = torch.addcmul(g, direction, weights[-1], out=scratch(4))
    return g if factor is None else torch.mul(g, factor, out=scratch(4))


def _write(live: Tensor, saved: Tensor, new: Tensor, ok: Tensor | None) -> None:
    """Write ``new`` into the parameter if ``ok``, otherwise ``saved``."""
    if live.dtype == saved.dtype:
        live.copy_(new) if ok is None else torch.where(ok, new, saved, out=live)
    else:
        if ok is not None:
            torch.where(ok, new, saved, out=saved)
        else:
            saved.copy_(new)
        live.copy_(saved)


def _save(live: Tensor, saved: Tensor, scratch: Scratch) -> Tensor:
    """Copy changes of ``live`` since the last step into ``saved``, and return the copy of w that is cheaper to read."""
    if live.dtype == saved.dtype:
        saved.copy_(live)
        return live
    rounded = scratch(0, live.dtype).copy_(saved)
    if live.device.type == "cpu":
        # Usually nothing changed. This test takes a tenth of the time of where(), because torch does not vectorize
        # loops over bool.
        bits = rounded.view(torch.int16), live.view(torch.int16)
        if not any(torch.bitwise_xor(*bits, out=scratch(1, torch.int16)).aminmax()):
            return saved
    unchanged = torch.eq(rounded, live, out=scratch(1, torch.bool))
    return torch.where(unchanged, saved, scratch(2).copy_(live), out=saved)


def _perturb(
    live: Tensor, w: Tensor, g: Tensor, scale: Tensor, scratch: Scratch, adaptive: bool, stochastic: bool
) -> None:
    g = e = _up(g, scratch, 0)
    rounds = live.dtype != w.dtype
    start = scratch(3).copy_(live.copy_(w)) if rounds and stochastic else w
    if adaptive:
        e = torch.mul(start, start, out=scratch(1)).mul_(g)
    if not rounds:
        torch.addcmul(start, e, scale, out=live)
        return
    moved = torch.addcmul(start, e, scale, out=scratch(2))
    live.copy_(_dithered(moved, _hashed(w, g), live.dtype) if stochastic else moved)


def _hashed(w: Tensor, g: Tensor) -> Tensor:
    """Hash float32 w and g to 13 random bits with the finalizer of MurmurHash3; int32."""
    h = g.view(torch.int32) * -0x61C8864F ^ w.view(torch.int32)  # torch cannot shift uint32, so the bits are masked
    h = (h ^ (h >> 16 & 0xFFFF)) * -0x7A143595
    h = (h ^ (h >> 13 & 0x7FFFF)) * -0x3D4D51CB
    return (h ^ (h >> 16 & 0xFFFF)) >> 19 & 0x1FFF


def _dithered(x: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """Round x stochastically to ``dtype``, see csrc/cuda/update_math.cuh.

    The probability of rounding up is the part that is cut off, divided by the distance between neighboring numbers.
    """
    digits, smallest = PRECISIONS[dtype].digits, PRECISIONS[dtype].smallest_exponent
    exponent = (x.view(torch.int32) >> 23 & 255).clamp_(min=smallest)
    q = (exponent - digits << 23).view(torch.float32)
    inverse = (254 + digits - exponent << 23).view(torch.float32)
    return torch.floor(x * inverse + random * 2.0**-13) * q


def _norms(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the norms of the pieces of a row, computed in ``dtype``."""
    rest = x.numel() % _PIECE
    pieces = [x.view(-1, _PIECE)] if rest == 0 else [x[:-rest].view(-1, _PIECE), x[None, -rest:]]
    return [torch.linalg.vector_norm(piece, dim=1, dtype=dtype) for piece in pieces if piece.numel()]


def _sum_of_products(x: Tensor, y: Tensor, blind: bool = True) -> Tensor:
    return (x.double() * y.double()).sum()


def _dot(x: Tensor, y: Tensor, blind: bool) -> Tensor:
    """Return x . y summed in its own dtype, or in float64 if that overflows.

    If ``blind``, overflow is not checked, because reading the result would synchronize.
    """
    product = torch.dot(x, y)
    return product if blind or math.isfinite(product) else _sum_of_products(x, y)


def _gram(
    g0: Tensor,
    gp: Tensor,
    gm: Tensor,
    w: Tensor | None,
    *,
    scalars: Sequence[Tensor],
    scratch: Scratch,
    inner: Callable[..., Tensor],
    blind: bool,
) -> Tensor:
    g0, d1, d2 = _differences((g0, gp, gm), scratch)
    products = [inner(x, y, blind) for x, y in ((g0, g0), (g0, d1), (g0, d2), (d1, d1), (d1, d2), (d2, d2))]
    if w is None:
        return torch.stack(products + products[:3])
    h = torch.mul(w, w, out=scratch(1)).mul_(g0)
    return torch.stack(products + [inner(h, x, blind) for x in (g0, d1, d2)])


def _sgd(
    live: Tensor,
    saved: Tensor,
    buffer: Tensor | None,
    direction: Tensor | None,
    *grads: Tensor,
    scalars: Sequence[Tensor],
    scratch: Scratch,
    clip: bool,
    decay: bool,
    dampen: bool,
    nesterov: bool,
    select: bool,
) -> None:
    *weights, factor, ok, weight_decay, momentum, undamped, neg_lr = scalars
    keep = ok != 0 if select else None
    g = _regularized(grads, direction, weights, factor if clip else None, scratch)
    if decay:
        g = torch.addcmul(g, saved, weight_decay, out=scratch(4))
    if buffer is not None:
        m = buffer if keep is None else scratch(3)
        if dampen:
            torch.mul(buffer, momentum, out=m).addcmul_(g, undamped)
        else:
            torch.addcmul(g, buffer, momentum, out=m)
        if keep is not None:
            torch.where(keep, m, buffer, out=buffer)
        g = torch.addcmul(g, m, momentum, out=scratch(4)) if nesterov else m
    in_place = keep is None and live.dtype == saved.dtype
    w = torch.addcmul(saved, g, neg_lr, out=live if in_place else scratch(3))
    if not in_place:
        _write(live, saved, w, keep)


def _adam(
    live: Tensor,
    saved: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    direction: Tensor | None,
    *grads: Tensor,
    scalars: Sequence[Tensor],
    scratch: Scratch,
    clip: bool,
    decay: bool,
    decoupled: bool,
    select: bool,
) -> None:
    *weights, factor, ok, weight_decay, rest1, beta2, rest2, root_correction2, eps, neg_step_size = scalars
    keep = ok != 0 if select else None
    g = _regularized(grads, direction, weights, factor if clip else None, scratch)
    if decay and not decoupled:
        g = torch.addcmul(g, saved, weight_decay, out=scratch(4))
    # Scratch 0 to 3 are free now, except that g may be in scratch 0 and is needed until v is computed.
    m = exp_avg.lerp_(g, rest1) if keep is None else torch.lerp(exp_avg, g, rest1, out=scratch(1))
    v = exp_avg_sq.mul_(beta2) if keep is None else torch.mul(exp_avg_sq, beta2, out=scratch(2))
    v.addcmul_(torch.mul(g, g, out=scratch(3)), rest2)
    if keep is not None:
        torch.where(keep, m, exp_avg, out=exp_avg)
        torch.where(keep, v, exp_avg_sq, out=exp_avg_sq)
    denominator = torch.sqrt(v, out=scratch(3)).div_(root_correction2).add_(eps)
    update = torch.div(m, denominator, out=scratch(3))
    w = torch.mul(saved, weight_decay, out=scratch(4)) if decay and decoupled else saved
    _write(live, saved, torch.addcmul(w, update, neg_step_size, out=scratch(3)), keep)


class Rule(NamedTuple):
    """An update rule."""

    #: The formula. Its positional arguments are live, saved, *state, direction, *grads; its keyword arguments are
    #: scalars (the numbers of the row's group), scratch, clip, select, and the result of `static`.
    body: Callable[..., None]
    #: Returns the options of a group that select a variant of the code.
    static: Callable[[Any], dict[str, bool]]
    #: Returns the numbers, [groups] each, that the formula reads, in its order. The arguments are the options of all
    #: groups, the number of steps, and a tensor whose dtype and device the numbers get.
    numbers: Callable[[Sequence[Any], Tensor, Tensor], list[Tensor]]


def _sgd_numbers(options: Sequence[Any], step: Tensor, like: Tensor) -> list[Tensor]:
    # torch's first momentum is the gradient itself, undamped.
    undamped = 1 - _column([o.dampening for o in options], like) * (step > 1).to(like)
    return [
        _column([o.weight_decay for o in options], like),
        _column([o.momentum for o in options], like),
        undamped,
        -_column([o.lr for o in options], like),
    ]


def _adam_numbers(options: Sequence[Any], step: Tensor, like: Tensor) -> list[Tensor]:
    lr, beta1, beta2, weight_decay, eps, decoupled = (
        _column(values, like)
        for values in zip(
            *((o.lr, *o.betas, o.weight_decay, o.eps, o.decoupled_weight_decay) for o in options), strict=True
        )
    )
    decay = torch.where(decoupled != 0, 1 - lr * weight_decay, weight_decay)
    t = step.to(like)
    correction1, correction2 = 1 - beta1**t, 1 - beta2**t
    return [decay, 1 - beta1, beta2, 1 - beta2, correction2.sqrt(), eps, -lr / correction1]


#: The rules by the name in their options.
RULES = {
    "sgd": Rule(
        _sgd,
        lambda o: {"decay": o.weight_decay != 0, "dampen": o.dampening != 0, "nesterov": o.nesterov},
        _sgd_numbers,
    ),
    "adam": Rule(
        _adam,
        lambda o: {"decay": o.weight_decay != 0, "decoupled": o.decoupled_weight_decay},
        _adam_numbers,
    ),
}


def _combine(
    live: Tensor,
    saved: Tensor,
    direction: Tensor | None,
    *grads: Tensor,
    scalars: Sequence[Tensor],
    scratch: Scratch,
    clip: bool,
) -> None:
    *weights, factor = scalars
    if len(grads) == PASSES or clip or direction is not None:
        grads[-1].copy_(_regularized(grads, direction, weights, factor if clip else None, scratch))
    if live is not saved:
        live.copy_(saved)


def _combine_into(out: Tensor, *grads: Tensor, scalars: Sequence[Tensor], scratch: Scratch) -> None:
    *weights, factor = scalars
    out.copy_(_regularized(grads, None, [*weights, factor], factor, scratch))


def _direction_into(out: Tensor, *grads: Tensor, scalars: Sequence[Tensor], scratch: Scratch, select: bool) -> None:
    *weights, factor, ok = scalars
    g0, *others = (_up(g, scratch, i) for i, g in enumerate(grads))
    h = torch.sub(others[0], g0, out=scratch(3))
    total = torch.addcmul(h, h, weights[0], out=scratch(4))
    for other, weight in zip(others[1:], weights[1:], strict=True):
        total.addcmul_(torch.sub(other, g0, out=scratch(3)), weight)
    if select:
        torch.where(ok != 0, total.mul_(factor), torch.zeros_like(factor), out=out)
    else:
        torch.mul(total, factor, out=out)


class TorchOperators(Operators):
    """See :class:`crsam_ext.ops.Operators`.

    Args:
        compile: fuse the operators with ``torch.compile`` instead of processing rows in blocks.
    """

    name = "torch"
    fuses_gram = False
    # A call costs tens of microseconds. Gathering this many elements costs about the same and leaves few rows.
    gather_below = 2**17

    def __init__(self, compile: bool = False) -> None:
        self.compile = compile
        self._memory: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}
        self._scratches: dict[tuple[torch.device, torch.dtype, int], Scratch] = {}
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    # Running a function over a row -----------------------------------------------------------------------------------

    def _scratch(self, device: torch.device, dtype: torch.dtype, size: int) -> Scratch:
        """Return scratch for blocks of ``size`` elements that compute in ``dtype``; all sizes share memory."""

        def allocate(index: int, dtype: torch.dtype) -> Tensor:
            key = (device, index, dtype)
            if key not in self._memory:
                self._memory[key] = torch.empty(_block(device), dtype=dtype, device=device)
            return self._memory[key][:size]

        key = (device, dtype, size)
        if key not in self._scratches:
            self._scratches[key] = Scratch(allocate, dtype)
        return self._scratches[key]

    def _blocks(self, tensors: Sequence[Tensor | None]) -> Iterator[tuple[Sequence[Any], Scratch]]:
        """Yield a row in blocks, each with scratch blocks of its length."""
        like = next(t for t in tensors if t is not None)
        device, dtype, size = like.device, compute_dtype(like.dtype), like.numel()
        block = _block(device)
        if size <= block:
            yield tensors, self._scratch(device, dtype, size)
            return
        pieces = [None if t is None else t.split(block) for t in tensors]
        for index in range(-(-size // block)):
            members = [None if p is None else p[index] for p in pieces]
            yield members, self._scratch(device, dtype, min(block, size - index * block))

    def _run(
        self, body: Callable[..., Any], tensors: Sequence[Tensor | None], scalars: Tensor, **static: Any
    ) -> list[Any]:
        """Apply ``body`` to a row, compiled as a whole or block by block, and return the result of each call."""
        if self.compile:
            like = next(t for t in tensors if t is not None)
            dtypes = tuple(None if t is None else t.dtype for t in tensors)
            key = (body, like.device.type, dtypes, tuple(static.items()))
            compiled = self._compiled.get(key) or self._compiled.setdefault(key, _compile(body, static))
            return [compiled(tensors, scalars)]
        values = scalars.unbind()
        return [body(*p, scalars=values, scratch=scratch, **static) for p, scratch in self._blocks(tensors)]

    @staticmethod
    def _table(columns: Sequence[Tensor], row: Tensor) -> list[Tensor]:
        """Turn per-group float64 tensors into one vector per group, in the compute dtype on the device of ``row``."""
        table = torch.stack([c.expand(columns[0].shape) for c in columns], 1)
        return list(table.to(row.device, compute_dtype(row.dtype), non_blocking=True).unbind())

    def _skips(self, ok: Tensor, live: Sequence[Tensor], saved: Sequence[Tensor]) -> bool:
        """Restore w and return True if the step is skipped and ``ok`` can be read.

        On a CPU, reading the flag is free, and a branch saves two selections per element. On other devices, and if
        compiled, the flag is not read, and the formulas select.
        """
        if self.selects(live[0]) or bool(ok):
            return False
        for p, w in zip(live, saved, strict=True):
            p.copy_(w)
        return True

    def selects(self, row: Tensor) -> bool:
        return self.compile or row.device.type != "cpu"

    # The operators ---------------------------------------------------------------------------------------------------

    def grad_norm(
        self,
        grads: Sequence[Tensor],
        groups: Sequence[int],
        num_groups: int,
        weights: Sequence[Tensor | None],
        direction: Direction | None = None,
    ) -> Tensor:
        added: Sequence[Tensor | None] = [None] * len(grads)
        number = scalar(0.0)
        if direction is not None:
            added, number = direction.rows, direction.weight.to(grads[0].device, compute_dtype(grads[0].dtype))

        def sums(dtype: torch.dtype) -> Tensor:
            norms: list[list[Tensor]] = [[] for _ in range(num_groups)]
            for g, group, w, h in zip(grads, groups, weights, added, strict=True):
                if w is None and h is None:
                    norms[group] += _norms(g, dtype)
                    continue
                for (x, v, y), scratch in self._blocks((g, w, h)):
                    x = _up(x, scratch, 0)
                    if y is not None:
                        x = torch.addcmul(x, y, number, out=scratch(1))
                    if v is not None:
                        x = torch.mul(x, v, out=scratch(1))
                    norms[group] += _norms(x, dtype)
            zero = torch.zeros((), dtype=torch.float64, device=first.device)
            return torch.stack([torch.cat(n).double().square_().sum() if n else zero for n in norms])

        first = grads[0]
        result = sums(compute_dtype(first.dtype))
        if self.selects(first) or all(map(math.isfinite, result.tolist())):
            return result
        return sums(torch.float64)  # in case squares overflowed

    def perturb_(
        self,
        live: Sequence[Tensor],
        saved: Sequence[Tensor],
        grads: Sequence[Tensor],
        groups: Sequence[int],
        scale: Tensor,
        adaptive: Sequence[bool],
        sign: int,
        undo: list[tuple[Sequence[Tensor], Sequence[Tensor]]],
        stochastic: bool = False,
    ) -> None:
        # Never compiled. A block that was just saved is still in the cache, so fusing would gain nothing on a CPU, and
        # ``undo`` must be extended between saving and writing. The two functions cannot be compiled separately either:
        # torch.compile removes the conversion to 16 bits and back with which `_save` detects changes.
        table = self._table([scale * sign], live[0])
        for *row, group in zip(live, saved, grads, groups, strict=True):
            for (p, w, g), scratch in self._blocks(row):
                start = w
                if sign > 0:
                    start = _save(p, w, scratch)
                    undo.append(([p], [w]))
                _perturb(p, start, g, table[group], scratch, adaptive[group], stochastic)

    def fd_gram(
        self,
        grads: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        num_groups: int,
        weights: Sequence[Tensor | None],
    ) -> Tensor:
        first = grads[0][0]
        inner, blind = _sum_of_products if self.compile else _dot, self.selects(first)
        products: list[list[Tensor]] = [[] for _ in range(num_groups)]
        no_scalars = torch.empty(0, dtype=torch.float64, device="cpu")
        for *gradients, w, group in zip(*grads, weights, groups, strict=True):
            products[group] += self._run(_gram, (*gradients, w), no_scalars, inner=inner, blind=blind)
        zero = torch.zeros(GRAM, dtype=torch.float64, device=first.device)
        return torch.stack([torch.stack(p).sum(0, dtype=torch.float64) if p else zero for p in products])

    def fd_combine_(
        self,
        out: Sequence[Tensor],
        grads: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        num_groups: int,
        weights: Sequence[Tensor | None] | None,
        pass_weights: Tensor,
        factor: Tensor,
    ) -> None:
        table = self._table([*pass_weights.unbind(), factor], out[0])
        for row, (o, group) in enumerate(zip(out, groups, strict=True)):
            self._run(_combine_into, (o, *(g[row] for g in grads)), table[group])

    def fd_direction_(
        self,
        out: Sequence[Tensor],
        grads: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        pass_weights: Tensor,
        factor: Tensor,
        ok: Tensor,
    ) -> None:
        if not self.selects(out[0]) and not bool(ok):
            for h in out:
                h.zero_()
            return
        table = self._table([*pass_weights.unbind(), factor, ok.to(factor)], out[0])
        for row, (h, group) in enumerate(zip(out, groups, strict=True)):
            self._run(_direction_into, (h, *(g[row] for g in grads)), table[group], select=self.selects(h))

    def step_(
        self,
        live: Sequence[Tensor],
        saved: Sequence[Tensor],
        state: Sequence[Sequence[Tensor | None]],
        grads: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        steps: Sequence[Tensor],
        options: Sequence[Options],
        coefficients: Coefficients,
        direction: Direction | None = None,
    ) -> None:
        if self._skips(coefficients.ok, live, saved):
            return
        c, rule, like = coefficients, RULES[options[0].rule], coefficients.pass_weights
        weights = _all_weights(c, direction)
        common = [*weights, _signed_factor(c, options), c.ok.to(like)]
        added = [None] * len(live) if direction is None else direction.rows
        tables: dict[int, list[Tensor]] = {}
        for row, (p, w, group, step) in enumerate(zip(live, saved, groups, steps, strict=True)):
            if id(step) not in tables:
                tables[id(step)] = self._table([*common, *rule.numbers(options, step, like)], p)
            o = options[group]
            self._run(
                rule.body,
                (p, w, *(buffer[row] for buffer in state), added[row], *(g[row] for g in grads)),
                tables[id(step)][group],
                clip=c.factor is not None or o.maximize,
                select=self.selects(p),
                **rule.static(o),
            )

    def combine_(
        self,
        live: Sequence[Tensor],
        saved: Sequence[Tensor],
        grads: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        coefficients: Coefficients,
        direction: Direction | None = None,
    ) -> None:
        weights, factor = _all_weights(coefficients, direction), coefficients.factor
        added = [None] * len(live) if direction is None else direction.rows
        table = self._table([*weights, torch.ones_like(weights[0]) if factor is None else factor], live[0])
        for row, (p, w, group) in enumerate(zip(live, saved, groups, strict=True)):
            tensors = (p, w, added[row], *(g[row] for g in grads))
            self._run(_combine, tensors, table[group], clip=factor is not None)


def _all_weights(c: Coefficients, direction: Direction | None) -> list[Tensor]:
    """Return the weights of the differences and of the direction, for each group."""
    weights = list(c.pass_weights.unbind())
    added = torch.zeros_like(weights[0]) if direction is None else direction.weight.expand_as(weights[0])
    return [*weights, added]


def _column(values: Sequence[float | Tensor], like: Tensor) -> Tensor:
    """Stack one number or 0-dim tensor per group into a tensor with the dtype and device of ``like``."""
    if any(isinstance(v, Tensor) for v in values):
        return torch.stack([scalar(v).to(like, non_blocking=True).reshape(()) for v in values])
    return torch.tensor(values, dtype=like.dtype, device="cpu").to(like.device, non_blocking=True)


def _signed_factor(coefficients: Coefficients, options: Sequence[Options]) -> Tensor:
    """Return the clip factor of each group, negative if the group is maximized."""
    sign = _column([-1.0 if o.maximize else 1.0 for o in options], coefficients.pass_weights)
    return sign if coefficients.factor is None else sign * coefficients.factor


def _compile(body: Callable[..., Any], static: dict[str, Any]) -> Callable[..., Any]:
    """Fuse ``body`` with torch.compile for rows of any length; scratch blocks become registers."""

    def whole_row(tensors: Sequence[Tensor | None], scalars: Tensor) -> Any:
        like = next(t for t in tensors if t is not None)
        dtype = compute_dtype(like.dtype)

        def scratch(_: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(like.shape, dtype=dtype, device=like.device)

        return body(*tensors, scalars=scalars.unbind(), scratch=scratch, **static)

    # Dynamo caches compiled code, and counts recompilations, per code object. So each variant gets its own code object.
    variant = types.FunctionType(
        whole_row.__code__.replace(co_name=body.__name__), globals(), body.__name__, None, whole_row.__closure__
    )
    return torch.compile(variant, dynamic=True, fullgraph=True)
