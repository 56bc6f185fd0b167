"""The operators as fused kernels, one launch each: from arguments of `Operators` to those of the schemas.

CUDA C++ and Triton implement the same schemas, each in a namespace of its own: csrc/ops.cpp says what they mean. A row
is one parameter, and gradients stay where autograd left them: the kernels read a table of pointers, which is copied to
the device only when a pointer has changed.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..ops import EPSILON, AdamOptions, Coefficients, Operators, SGDOptions

__all__ = ["FAKES", "FusedOperators", "no_device", "register_fakes"]


def no_device() -> str | None:
    """Why no kernel can be launched from this process; None if a GPU is there."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        torch.cuda.get_device_capability()
    except RuntimeError as error:  # a process that was forked from one that uses CUDA, for example
        return f"CUDA cannot be used in this process: {error}"
    return None


class FusedOperators(Operators):
    """See :class:`crsam_ext.ops.Operators`."""

    _ops: Any  #: functions by the operators' names, with the arguments of the schemas

    gather_below = 0
    fuses_gram = True

    @abstractmethod
    def _launch_mark(self, live: Tensor) -> int:
        """A number that tells :meth:`_launched` what came before."""

    @abstractmethod
    def _launched(self, live: Tensor, before: int) -> bool:
        """Whether ``perturb_`` was launched on ``live`` since ``before``; asked after an exception, so it may wait."""

    def grad_norm(
        self, grads: Sequence[Tensor], groups: Sequence[int], num_groups: int, weights: Sequence[Tensor | None]
    ) -> Tensor:
        return self._ops.grad_norm(grads, groups, num_groups, weights)

    def perturbation_scale(self, squared_norm: Tensor, rho: Tensor) -> Tensor:
        return self._ops.perturbation_scale(squared_norm, rho, EPSILON)

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
        first = live[0]
        scale = _on(first.device, scale)
        before, known = self._launch_mark(first), len(undo)
        try:
            # One launch saves and writes: undo must not wait until it returns, nor stay if it is never made.
            if sign > 0:
                undo.append((live, saved))
            self._ops.perturb_(live, saved, grads, groups, scale, adaptive, sign, stochastic)
        except BaseException:
            if not self._launched(first, before):
                del undo[known:]
            raise

    def fd_gram(
        self,
        grad: Sequence[Tensor],
        grad_ascent: Sequence[Tensor],
        grad_descent: Sequence[Tensor],
        groups: Sequence[int],
        num_groups: int,
        weights: Sequence[Tensor | None],
    ) -> Tensor:
        return self._ops.fd_gram(grad, grad_ascent, grad_descent, groups, num_groups, weights)

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
        grad_scale: Tensor | None,
        max_regularizer_ratio: float,
        max_grad_norm: float | None,
    ) -> Coefficients:
        log = passes == 3 and regularizer == "log"
        assert gram is not None or not log or losses is not None
        assert gram is not None or passes < 3 or max_grad_norm is None
        here = [pair for pair in steps if pair[0].device == alpha.device]
        values, flags = self._ops.coefficients(
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
            grad_scale,
            max_regularizer_ratio,
            math.inf if max_grad_norm is None else max_grad_norm,
        )
        a, b, factor, kappa, sigma, ratio, ok, capped = self.host.split_decision(values, flags)
        for taken, part in steps:
            if taken.device != alpha.device:
                taken.addcmul_(part, ok.to(part, non_blocking=True))
        return Coefficients(
            a,
            b,
            None if max_grad_norm is None and grad_scale is None else factor,
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
        if isinstance(momentum_buffer, list) and any(m is None for m in momentum_buffer):
            none = live[0].new_empty(0)  # the schemas know no list of optional tensors that are written
            momentum_buffer = [none if m is None else m for m in momentum_buffer]
        device = live[0].device
        self._ops.sgd_step_(
            live,
            saved,
            momentum_buffer,
            *_gradients(grads),
            groups,
            steps,
            *_options(options, device),
            *_decision(coefficients, device),
            _on(device, coefficients.ok),
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
        device = live[0].device
        self._ops.adamw_step_(
            live,
            saved,
            exp_avg,
            exp_avg_sq,
            *_gradients(grads),
            groups,
            steps,
            *_options(options, device),
            *_decision(coefficients, device),
            _on(device, coefficients.ok),
        )

    def combine_(
        self,
        live: Sequence[Tensor],
        saved: Sequence[Tensor],
        grads: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        coefficients: Coefficients,
    ) -> None:
        self._ops.combine_(live, saved, *_gradients(grads), groups, *_decision(coefficients, live[0].device))


def _gradients(grads: Sequence[Sequence[Tensor]]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """All three gradients, or that of the last pass alone."""
    if len(grads) == 3:
        return grads[0], grads[1], grads[2]
    return grads[-1], [], []


def _decision(c: Coefficients, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    return _on(device, c.a), _on(device, c.b), None if c.factor is None else _on(device, c.factor)


def _on(device: torch.device, x: Tensor) -> Tensor:
    return x if x.device == device else x.to(device, non_blocking=True)


def _options(
    groups: Iterable[SGDOptions | AdamOptions], device: torch.device
) -> tuple[list[float], list[Tensor | None]]:
    """Options of all groups in a row, as numbers, and those that lie on the device as tensors."""
    numbers: list[float] = []
    tensors: list[Tensor | None] = []
    for value in (value for group in groups for value in group.numbers):
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


#: For each operator the function that makes its results, without values.
FAKES: Mapping[str, Any] = {
    "grad_norm": _fake_sums(),
    "fd_gram": _fake_sums(9),
    "perturbation_scale": lambda squared_norm, rho, epsilon: torch.empty_like(squared_norm),
    "coefficients": _fake_coefficients,
    **{name: lambda *_: None for name in ("perturb_", "sgd_step_", "adamw_step_", "combine_")},
}


@cache
def register_fakes(namespace: str) -> None:
    """Register the fakes of the operators of a namespace; the extension calls it as it is imported."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
