"""The operators as CUDA C++ kernels (csrc/), one launch each: from arguments of `Operators` to those of the schemas.

A row is one parameter, and gradients stay where autograd left them: the kernels read a table of pointers, which is
copied to the device only when a pointer has changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..ops import EPSILON, AdamOptions, Coefficients, Operators, SGDOptions

__all__ = ["CudaOperators", "why_unavailable"]


def why_unavailable() -> str | None:
    """Why the kernels cannot run here; None if they can."""
    if find_spec("crsam_ext._C") is None:
        built = find_spec("crsam_ext._build") is not None
        reason = str(import_module("crsam_ext._build").REASON) if built else ""  # setup.py keeps it
        return reason or "the CUDA extension is missing; install crsam_ext from its sources"
    try:
        info = import_module("crsam_ext._C").build_info()
    except ImportError as error:
        return f"the CUDA extension does not load, build it again: {str(error).splitlines()[0]}"
    own = {"version": import_module("crsam_ext").__version__, "torch": torch.__version__}
    for name, version in own.items():
        if info[name] != version:
            return f"the CUDA extension was built for {name} {info[name]}, not {version}: build it again"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    oldest = min(float(a.removesuffix("+PTX")) for a in info["architectures"].split(";"))
    major, minor = torch.cuda.get_device_capability()
    if major + minor / 10 < oldest:
        return (
            f"the GPU has compute capability {major}.{minor}; the CUDA extension was built for {info['architectures']}"
        )
    return None


class CudaOperators(Operators):
    """See :class:`crsam_ext.ops.Operators`."""

    name = "cuda"
    gather_below = 0

    def __init__(self) -> None:
        _register_fakes()

    def grad_norm(
        self, grads: Sequence[Tensor], groups: Sequence[int], num_groups: int, weights: Sequence[Tensor | None]
    ) -> Tensor:
        return torch.ops.crsam.grad_norm(grads, groups, num_groups, weights)

    def perturbation_scale(self, squared_norm: Tensor, rho: Tensor) -> Tensor:
        return torch.ops.crsam.perturbation_scale(squared_norm, rho, EPSILON)

    def perturb_(
        self,
        live: Sequence[Tensor],
        saved: Sequence[Tensor],
        grads: Sequence[Tensor],
        groups: Sequence[int],
        scale: Tensor,
        adaptive: Sequence[bool],
        sign: int,
        undo: list[tuple[Tensor, Tensor]],
    ) -> None:
        scale = scale.to(live[0].device, non_blocking=True)
        before = live[0]._version
        try:
            torch.ops.crsam.perturb_(live, saved, grads, groups, scale, adaptive, sign)
        finally:
            # One launch saves and writes. The version tells whether it was made, also when Ctrl-C strikes in between.
            if sign > 0 and live[0]._version != before:
                undo += zip(live, saved, strict=True)

    def fd_gram(
        self,
        grad: Sequence[Tensor],
        grad_ascent: Sequence[Tensor],
        grad_descent: Sequence[Tensor],
        groups: Sequence[int],
        num_groups: int,
        weights: Sequence[Tensor | None],
    ) -> Tensor:
        return torch.ops.crsam.fd_gram(grad, grad_ascent, grad_descent, groups, num_groups, weights)

    def coefficients(
        self,
        gram: Tensor | None,
        squared_norms: Sequence[Tensor],
        scale: Tensor,
        alpha: Tensor,
        beta: Tensor,
        *,
        counters: Tensor,
        steps: Sequence[tuple[Tensor, Tensor]],
        passes: int,
        regularizer: str,
        losses: tuple[Tensor, Tensor, Tensor] | None,
        max_regularizer_ratio: float,
        max_grad_norm: float | None,
    ) -> Coefficients:
        log = passes == 3 and regularizer == "log"
        assert gram is not None or not log or losses is not None
        assert gram is not None or passes < 3 or max_grad_norm is None
        here = [pair for pair in steps if pair[0].device == alpha.device]
        values, flags = torch.ops.crsam.coefficients(
            gram,
            list(squared_norms),
            scale,
            alpha,
            beta,
            counters,
            [taken for taken, _ in here],
            [part for _, part in here],
            passes,
            log,
            [] if losses is None else list(losses),
            max_regularizer_ratio,
            math.inf if max_grad_norm is None else max_grad_norm,
        )
        ok, capped = flags.unbind()
        for taken, part in steps:
            if taken.device != alpha.device:
                taken.addcmul_(part, ok.to(part, non_blocking=True))
        groups = len(alpha)
        factor, kappa, sigma, ratio = values[2 * groups :].unbind()
        return Coefficients(
            values[:groups],
            values[groups : 2 * groups],
            None if max_grad_norm is None else factor,
            ok,
            kappa if log else None,
            sigma if log else None,
            None if gram is None else ratio,
            None if gram is None else capped,
        )

    def sgd_step_(
        self,
        live: Sequence[Tensor],
        saved: Sequence[Tensor],
        momentum_buffer: Sequence[Tensor | None],
        grads: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        steps: Sequence[Tensor],
        options: Sequence[SGDOptions],
        coefficients: Coefficients,
    ) -> None:
        none = live[0].new_empty(0)
        values = [(o.lr, o.momentum, o.dampening, o.weight_decay, o.nesterov, o.maximize) for o in options]
        torch.ops.crsam.sgd_step_(
            live,
            saved,
            [none if m is None else m for m in momentum_buffer],
            *_gradients(grads),
            groups,
            steps,
            *_options(values, live[0].device),
            *_decision(coefficients, live[0].device),
            coefficients.ok.to(live[0].device, non_blocking=True),
        )

    def adamw_step_(
        self,
        live: Sequence[Tensor],
        saved: Sequence[Tensor],
        exp_avg: Sequence[Tensor],
        exp_avg_sq: Sequence[Tensor],
        grads: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        steps: Sequence[Tensor],
        options: Sequence[AdamOptions],
        coefficients: Coefficients,
    ) -> None:
        values = [(o.lr, *o.betas, o.eps, o.weight_decay, o.decoupled_weight_decay, o.maximize) for o in options]
        torch.ops.crsam.adamw_step_(
            live,
            saved,
            exp_avg,
            exp_avg_sq,
            *_gradients(grads),
            groups,
            steps,
            *_options(values, live[0].device),
            *_decision(coefficients, live[0].device),
            coefficients.ok.to(live[0].device, non_blocking=True),
        )

    def combine_(
        self,
        live: Sequence[Tensor],
        saved: Sequence[Tensor],
        grads: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        coefficients: Coefficients,
    ) -> None:
        torch.ops.crsam.combine_(live, saved, *_gradients(grads), groups, *_decision(coefficients, live[0].device))


def _gradients(grads: Sequence[Sequence[Tensor]]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """All three gradients, or that of the last pass alone."""
    if len(grads) == 3:
        return grads[0], grads[1], grads[2]
    return grads[-1], [], []


def _decision(c: Coefficients, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    a, b = (x.to(device, non_blocking=True) for x in (c.a, c.b))
    return a, b, None if c.factor is None else c.factor.to(device, non_blocking=True)


def _options(
    groups: Iterable[Sequence[float | Tensor]], device: torch.device
) -> tuple[list[float], list[Tensor | None]]:
    """Options of all groups in a row, as numbers, and those that lie on the device as tensors."""
    numbers: list[float] = []
    tensors: list[Tensor | None] = []
    for value in (value for group in groups for value in group):
        on_host = not isinstance(value, Tensor) or value.device.type == "cpu" != device.type
        numbers.append(float(value) if on_host else 0.0)
        tensors.append(None if on_host else _number(value, device))
    return numbers, tensors


def _number(value: Any, device: torch.device) -> Tensor:
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    return value.detach().to(device, dtype, non_blocking=True)


# What the operators return, for torch.compile and its like: those that write into their arguments return nothing.


def _fake_sums(*columns: int) -> Any:
    def fake(grads: list[Tensor], *arguments: Any) -> Tensor:
        num_groups = next(x for x in arguments if isinstance(x, int))
        return grads[0].new_empty(num_groups, *columns, dtype=torch.float64)

    return fake


def _fake_coefficients(gram: Tensor | None, squared_norms: Any, scale: Any, alpha: Tensor, *_: Any) -> Any:
    return alpha.new_empty(2 * len(alpha) + 4), alpha.new_empty(2, dtype=torch.bool)


@cache
def _register_fakes() -> None:
    fakes = {
        "grad_norm": _fake_sums(),
        "fd_gram": _fake_sums(9),
        "perturbation_scale": lambda squared_norm, rho, epsilon: torch.empty_like(squared_norm),
        "coefficients": _fake_coefficients,
        **{name: lambda *_: None for name in ("perturb_", "sgd_step_", "adamw_step_", "combine_")},
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"crsam::{name}", fake)
