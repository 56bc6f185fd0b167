"""The compared implementations of the work between the gradients of a step. All give the same result.

A peer is a function of the parameters and a :class:`Case`. It returns a list of phases, one for each pass of the step.
A phase is a function of that pass's gradients. tests/test_benchmarks.py compares all peers in float64. To add one,
write a function and add it to `PEERS`. The bytes of peers made of PyTorch's operators are counted automatically.

As everywhere in this project, float16 and bfloat16 parameters have float32 masters: w is the master, and the perturbed
or updated master is rounded into the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from crsam_ext import CRSAM, available_backends
from crsam_ext.precision import compute_dtype, has_master

__all__ = ["PEERS", "Case", "available", "make"]

RHO, ALPHA, BETA, EPSILON = 0.1, 0.1, 0.01, 1e-12
BASES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
}
CLASSES = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}

Phase = Callable[[Sequence[Tensor]], None]


class Case(NamedTuple):
    """The settings of a comparison."""

    method: str  #: "crsam" (three passes) or "sam" (two)
    base: str  #: "sgd" (with momentum) or "adamw"

    @property
    def passes(self) -> int:
        return 3 if self.method == "crsam" else 2


def _masters(params: Sequence[Parameter]) -> list[Tensor]:
    """Return the tensors that the base optimizer updates: float32 copies of 16-bit parameters, or the parameters
    themselves."""
    wide = compute_dtype(params[0].dtype)
    return list(params) if params[0].dtype == wide else [Parameter(p.detach().to(wide)) for p in params]


def loop(params: list[Parameter], case: Case) -> list[Phase]:
    """Compute the formulas tensor by tensor, with cloned gradients, as released implementations do."""
    masters = _masters(params)
    base = CLASSES[case.base](masters, foreach=False, **BASES[case.base])
    narrow = masters[0] is not params[0]
    kept: list[list[Tensor]] = []
    e: list[Tensor] = []

    def move(times: float) -> None:
        for p, w, x in zip(params, masters, e, strict=True):
            p.copy_(w.add(x, alpha=times)) if narrow else p.add_(x, alpha=times)

    def first(grads: Sequence[Tensor]) -> None:
        kept.append([g.to(w.dtype, copy=True) for g, w in zip(grads, masters, strict=True)])
        norm = torch.stack([g.norm() for g in kept[0]]).norm()
        e.extend(g * (RHO / (norm + EPSILON)) for g in kept[0])
        move(1.0)

    def second(grads: Sequence[Tensor]) -> None:
        kept.append([g.to(w.dtype, copy=True) for g, w in zip(grads, masters, strict=True)])
        move(-1.0 if narrow else -2.0)

    def last(grads: Sequence[Tensor]) -> None:
        if case.passes == 3:
            if not narrow:
                move(1.0)
            for w, g0, gp, g in zip(masters, *kept, grads, strict=True):
                gm = g.to(w.dtype, copy=True)
                w.grad = gp + ALPHA * (gp + gm - 2 * g0) + BETA * (gp - gm)
        else:
            if not narrow:
                move(-1.0)
            for w, g in zip(masters, grads, strict=True):
                w.grad = g.to(w.dtype)
        base.step()
        if narrow:
            move(0.0)
        kept.clear()
        e.clear()

    return [first, second, last] if case.passes == 3 else [first, last]


def foreach(params: list[Parameter], case: Case) -> list[Phase]:
    """Compute the same with ``torch._foreach`` operations, with as few operations and copies as possible."""
    masters = _masters(params)
    base = CLASSES[case.base](masters, foreach=True, **BASES[case.base])
    w = [m.detach() for m in masters]
    live = [p.detach() for p in params]
    narrow = w[0].dtype != live[0].dtype
    saved: list[Tensor] = w if narrow else [torch.empty_like(x) for x in w]
    kept: list[list[Tensor]] = []
    e: list[Tensor] = []

    def wide(grads: Sequence[Tensor]) -> list[Tensor]:
        return [g.to(saved[0].dtype) for g in grads]

    def first(grads: Sequence[Tensor]) -> None:
        kept.append(wide(grads))
        norm = torch.stack(torch._foreach_norm(kept[0])).norm()
        e.extend(torch._foreach_mul(kept[0], RHO / (norm + EPSILON)))
        if narrow:
            torch._foreach_copy_(live, torch._foreach_add(saved, e))
        else:
            torch._foreach_copy_(saved, live)
            torch._foreach_add_(live, e)

    def second(grads: Sequence[Tensor]) -> None:
        kept.append(wide(grads))
        torch._foreach_copy_(live, torch._foreach_sub(saved, e))

    def last(grads: Sequence[Tensor]) -> None:
        g = wide(grads)
        if case.passes == 3:
            # (1 + a + b) g+ + (a - b) g- - 2 a g0
            total = torch._foreach_mul(kept[1], 1 + ALPHA + BETA)
            torch._foreach_add_(total, g, alpha=ALPHA - BETA)
            torch._foreach_add_(total, kept[0], alpha=-2 * ALPHA)
            g = list(total)
        if not narrow:
            torch._foreach_copy_(live, saved)
        for m, x in zip(masters, g, strict=True):
            m.grad = x
        base.step()
        if narrow:
            torch._foreach_copy_(live, saved)
        kept.clear()
        e.clear()

    return [first, second, last] if case.passes == 3 else [first, last]


# One flat buffer for all parameters ----------------------------------------------------------------------------------


def _flat_first(live: Tensor, saved: Tensor, g: Tensor) -> Tensor:
    wide = g.to(saved.dtype)
    scale = RHO / (wide.square().sum(dtype=torch.float64).sqrt() + EPSILON)
    if live.dtype == saved.dtype:
        saved.copy_(live)
    live.copy_(torch.addcmul(saved, wide, scale.to(saved.dtype)))
    return scale


def _flat_second(live: Tensor, saved: Tensor, g: Tensor, scale: Tensor) -> None:
    live.copy_(torch.addcmul(saved, g.to(saved.dtype), -scale.to(saved.dtype)))


def _flat_last(live: Tensor, saved: Tensor, state: list[Tensor], grads: list[Tensor], t: Tensor) -> None:
    wide = [g.to(saved.dtype) for g in grads]
    g = wide[-1]
    if len(wide) == 3:
        g = wide[1] + ALPHA * (wide[1] + wide[2] - 2 * wide[0]) + BETA * (wide[1] - wide[2])
    if len(state) == 1:
        o = BASES["sgd"]
        state[0].mul_(o["momentum"]).add_(g + o["weight_decay"] * saved)
        w = saved - o["lr"] * state[0]
    else:
        o = BASES["adamw"]
        beta1, beta2 = o["betas"]
        m, v = state
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = v.sqrt() / (1 - beta2**t).sqrt() + o["eps"]
        w = (1 - o["lr"] * o["weight_decay"]) * saved - (o["lr"] / (1 - beta1**t)) * (m / denominator)
    if live.dtype != saved.dtype:
        saved.copy_(w)
    live.copy_(w)


def _flat(params: list[Parameter], case: Case, compile: bool) -> list[Phase]:
    device, dtype = params[0].device, params[0].dtype
    wide = compute_dtype(dtype)
    total = sum(p.numel() for p in params)
    live = torch.cat([p.detach().reshape(-1) for p in params])
    for p, view in zip(params, live.split([p.numel() for p in params]), strict=True):
        p.data = view.view(p.shape)
    saved = live.to(wide, copy=True)
    state = [torch.zeros(total, dtype=wide, device=device) for _ in range(1 if case.base == "sgd" else 2)]
    buffers = [torch.empty_like(live) for _ in range(case.passes)]
    t = torch.zeros((), dtype=torch.float64, device=device)
    first_, second_, last_ = (
        torch.compile(f, fullgraph=True) if compile else f for f in (_flat_first, _flat_second, _flat_last)
    )
    scale = torch.empty(0)

    def gather(grads: Sequence[Tensor], index: int) -> Tensor:
        return torch.cat([g.reshape(-1) for g in grads], out=buffers[index])

    def first(grads: Sequence[Tensor]) -> None:
        nonlocal scale
        scale = first_(live, saved, gather(grads, 0))

    def second(grads: Sequence[Tensor]) -> None:
        gather(grads, 1)
        second_(live, saved, buffers[0], scale)

    def last(grads: Sequence[Tensor]) -> None:
        gather(grads, case.passes - 1)
        t.add_(1)
        last_(live, saved, state, buffers, t)

    return [first, second, last] if case.passes == 3 else [first, last]


def flat_eager(params: list[Parameter], case: Case) -> list[Phase]:
    """Use flat buffers, into which gradients are gathered, and PyTorch's operators."""
    return _flat(params, case, compile=False)


def flat_compiled(params: list[Parameter], case: Case) -> list[Phase]:
    """Do the same as :func:`flat_eager`, fused by ``torch.compile``, with one call per phase."""
    return _flat(params, case, compile=True)


# Optimizers ---------------------------------------------------------------------------------------------------------


def _phase(params: list[Parameter], call: Callable[..., None]) -> Phase:
    """Return a phase that assigns the gradients and makes one of the calls of a step."""

    def run(grads: Sequence[Tensor]) -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        call(zero_grad=True)

    return run


def _crsam(**options: Any) -> Callable[[list[Parameter], Case], list[Phase]]:
    def make(params: list[Parameter], case: Case) -> list[Phase]:
        """Use this project's optimizer through first_step, second_step and third_step."""
        weights = {"alpha": ALPHA, "beta": BETA} if case.passes == 3 else {"alpha": 0.0, "beta": 0.0}
        optimizer = CRSAM(params, CLASSES[case.base], rho=RHO, **weights, **options, **BASES[case.base])

        calls = (optimizer.first_step, optimizer.second_step, optimizer.third_step)[: case.passes]
        return [_phase(params, call) for call in calls]

    return make


def pytorch_optimizer_sam(params: list[Parameter], case: Case) -> list[Phase]:
    """Use SAM from the package pytorch_optimizer."""
    from pytorch_optimizer import SAM

    optimizer = SAM(params, CLASSES[case.base], rho=RHO, perturb_eps=EPSILON, **BASES[case.base])

    return [_phase(params, optimizer.first_step), _phase(params, optimizer.second_step)]


def base_alone(params: list[Parameter], case: Case) -> list[Phase]:
    """Use torch's fused SGD or AdamW with the last gradient: the floor of the last phase. It does not compute SAM, so
    its result is not compared."""
    optimizer = CLASSES[case.base](params, fused=True, **BASES[case.base])

    def last(grads: Sequence[Tensor]) -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()

    return [*[lambda grads: None] * (case.passes - 1), last]


#: Peers by name. All but `base_alone` compute the same result.
PEERS: dict[str, Callable[[list[Parameter], Case], list[Phase]]] = {
    "loop": loop,
    "foreach": foreach,
    "flat": flat_eager,
    "flat, compiled": flat_compiled,
    "pytorch_optimizer": pytorch_optimizer_sam,
    "torch, base alone": base_alone,
    "crsam_ext torch": _crsam(backend="torch"),
    "crsam_ext torch, compiled": _crsam(backend="torch", compile=True),
    "crsam_ext triton": _crsam(backend="triton"),
    "crsam_ext cuda": _crsam(backend="cuda"),
}


def available(name: str, case: Case, dtype: torch.dtype) -> bool:
    """Return whether a peer runs on this machine and computes the case."""
    backend = name.removeprefix("crsam_ext ").partition(",")[0]
    if name.startswith("crsam_ext"):
        return available_backends()[backend] == "available"
    if name == "pytorch_optimizer":
        return case.method == "sam" and not has_master(dtype)
    # torch's fused CPU kernels have no effect on 16-bit parameters.
    return name != "torch, base alone" or not has_master(dtype)


def make(name: str, params: list[Parameter], case: Case) -> list[Phase]:
    """Return the phases of a peer, each run without recording gradients."""
    return [torch.no_grad()(phase) for phase in PEERS[name](params, case)]
