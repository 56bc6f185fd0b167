"""Adapts the calls of `Operators` to the schemas of the fused kernels, one launch each.

CUDA C++ and Triton implement the same schemas, ``KERNELS``, in separate namespaces. Every parameter is a row, and
gradients stay in the memory where autograd put them. The kernels read a table of pointers, which is copied to the
device only if a pointer changed.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..ops import EPSILON, GRAM, PASSES, REGULARIZERS, Coefficients, Direction, Operators, Options
from ..precision import compute_dtype, has_master

__all__ = ["KERNELS", "FusedOperators", "Kernel", "no_device", "register"]


def _fake_sums(*columns: int) -> Callable[..., Tensor]:
    def fake(grads: list[Tensor], groups: Any, num_groups: int, *_: Any) -> Tensor:
        return grads[0].new_empty(num_groups, *columns, dtype=torch.float64)

    return fake


def _fake_coefficients(gram: Tensor | None, squared_norms: Any, scale: Any, alpha: Tensor, *_: Any) -> tuple[Any, ...]:
    return alpha.new_empty(PASSES - 1, len(alpha)), alpha.new_empty(4), alpha.new_empty(2, dtype=torch.bool)


def _fake_nothing(*_: Any) -> None:
    """The result of an operator that only writes into its arguments."""


@dataclass(frozen=True)
class Kernel:
    """The schema of an operator and its memory traffic.

    Args:
        arguments: the arguments of the schema; an exclamation mark means that the argument is written.
        results: the results of the schema.
        fake: creates the results without values, for torch.compile and similar tools.
        moves: the streams that a variant reads and writes, one letter each: ``r`` is a row in its own dtype, ``w`` a
            row in the compute dtype, ``m`` such a row only if there are masters, ``n`` only if there are none.
    """

    arguments: str
    results: str
    fake: Callable[..., Any]
    moves: Callable[..., tuple[str, str]] = lambda: ("", "")

    @property
    def schema(self) -> str:
        return f"({self.arguments}) -> {self.results}"

    @property
    def written(self) -> list[int]:
        """The positions of the arguments that are written."""
        return [i for i, argument in enumerate(self.arguments.split(", ")) if "!" in argument]

    def nbytes(self, dtype: torch.dtype, *variant: int) -> tuple[int, int]:
        """Return the bytes that are read and written per element, for rows of a dtype."""
        wide, masters = compute_dtype(dtype).itemsize, has_master(dtype)
        sizes = {"r": dtype.itemsize, "w": wide, "m": wide * masters, "n": wide * (not masters)}
        read, written = (sum(map(sizes.__getitem__, streams)) for streams in self.moves(*variant))
        return read, written


#: The operators by name. Groups are numbers. Lists of lists (``state`` and the gradients of all passes) are
#: concatenated. ``options`` are the options of all groups as numbers; ``option_tensors`` has the ones that are tensors
#: on the device. An empty tensor means missing state. ``numbers`` are factor, kappa, sigma and regularizer_ratio,
#: ``flags`` are ok and capped.
KERNELS = {
    "grad_norm": Kernel(
        "Tensor[] grads, int[] groups, int num_groups, Tensor?[] weights, Tensor[] direction, Tensor? direction_weight",
        "Tensor",
        _fake_sums(),
        lambda directions=0: ("r" + "w" * directions, ""),
    ),
    "perturbation_scale": Kernel(
        "Tensor squared_norm, Tensor rho, float epsilon",
        "Tensor",
        lambda squared_norm, rho, epsilon: torch.empty_like(squared_norm),
    ),
    "direction_weight": Kernel(
        "Tensor squared_norm, Tensor squared_direction, Tensor decay, Tensor? grad_scale, float max_ratio, "
        "float epsilon",
        "Tensor",
        lambda squared_norm, *_: squared_norm.new_empty(()),
    ),
    "perturb_": Kernel(
        "Tensor(a!)[] live, Tensor(b!)[] saved, Tensor[] grads, int[] groups, Tensor scale, bool[] adaptive, int sign, "
        "bool stochastic=False",
        "()",
        _fake_nothing,
        lambda sign: ("rrm", "rn") if sign > 0 else ("rw", "r"),
    ),
    "fd_gram": Kernel(
        "Tensor[] grads, int[] groups, int num_groups, Tensor?[] weights",
        "Tensor",
        _fake_sums(GRAM),
        lambda: ("r" * PASSES, ""),
    ),
    "fd_combine_": Kernel(
        "Tensor(a!)[] out, Tensor[] grads, int[] groups, int num_groups, Tensor?[] weights, Tensor pass_weights, "
        "Tensor factor",
        "Tensor",
        lambda out, grads, groups, num_groups, *_: _fake_sums(GRAM)(grads, groups, num_groups),
        lambda: ("r" * PASSES, "r"),
    ),
    "fd_direction_": Kernel(
        "Tensor(a!)[] out, Tensor[] grads, int[] groups, Tensor pass_weights, Tensor factor, Tensor ok",
        "()",
        _fake_nothing,
        lambda: ("r" * PASSES, "w"),
    ),
    "coefficients": Kernel(
        "Tensor? gram, Tensor[] squared_norms, Tensor scale, Tensor alpha, Tensor beta, Tensor(a!) counters, "
        "Tensor(b!)[] taken, Tensor[] part, str regularizer, Tensor[] losses, Tensor? grad_scale, "
        "float max_regularizer_ratio, float max_grad_norm",
        "(Tensor pass_weights, Tensor numbers, Tensor flags)",
        _fake_coefficients,
    ),
    "step_": Kernel(
        "Tensor(a!)[] live, Tensor(b!)[] saved, Tensor(c!)[] state, Tensor[] grads, int[] groups, Tensor[] steps, "
        "str rule, float[] options, Tensor?[] option_tensors, Tensor pass_weights, Tensor? factor, Tensor ok, "
        "Tensor[] direction, Tensor? direction_weight",
        "()",
        _fake_nothing,
        lambda passes, buffers, directions=0: ("r" * passes + "w" * (1 + buffers + directions), "rm" + "w" * buffers),
    ),
    "combine_": Kernel(
        "Tensor(a!)[] live, Tensor[] saved, Tensor[] earlier, Tensor(b!)[] last, int[] groups, Tensor pass_weights, "
        "Tensor? factor, Tensor[] direction, Tensor? direction_weight",
        "()",
        _fake_nothing,
        lambda passes, directions=0: ("r" * passes + "w" * (1 + directions), "rr"),
    ),
}

_libraries: list[torch.library.Library] = []  # definitions disappear when their library is deleted


@cache
def register(namespace: str) -> None:
    """Define the operators of a namespace for torch; the extension calls this function when it is imported."""
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    for name, kernel in KERNELS.items():
        library.define(name + kernel.schema)
        torch.library.register_fake(f"{namespace}::{name}", kernel.fake, lib=library)


def no_device() -> str | None:
    """Return why this process cannot launch a kernel; None if it can."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        torch.cuda.get_device_capability()
    except RuntimeError as error:  # for example in a process that was forked from one that uses CUDA
        return f"CUDA cannot be used in this process: {error}"
    return None


class FusedOperators(Operators):
    """See :class:`crsam_ext.ops.Operators`."""

    _ops: Any  #: has a function for each operator, with the arguments of the schema

    gather_below = 0
    fuses_gram = True

    @abstractmethod
    def _launch_mark(self, live: Tensor) -> int:
        """Return a mark from which :meth:`_launched` can tell whether a launch followed."""

    @abstractmethod
    def _launched(self, live: Tensor, before: int) -> bool:
        """Return whether ``perturb_`` was launched on ``live`` after the mark ``before``.

        Called only after an exception, so a device synchronization is acceptable.
        """

    def grad_norm(
        self,
        grads: Sequence[Tensor],
        groups: Sequence[int],
        num_groups: int,
        weights: Sequence[Tensor | None],
        direction: Direction | None = None,
    ) -> Tensor:
        return self._ops.grad_norm(grads, groups, num_groups, weights, *_direction(direction, grads))

    def perturbation_scale(self, squared_norm: Tensor, rho: Tensor) -> Tensor:
        return self._ops.perturbation_scale(squared_norm, rho, EPSILON)

    def direction_weight(
        self,
        squared_norm: Tensor,
        squared_direction: Tensor,
        decay: Tensor,
        grad_scale: Tensor | None,
        max_ratio: float,
    ) -> Tensor:
        return self._ops.direction_weight(squared_norm, squared_direction, decay, grad_scale, max_ratio, EPSILON)

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
            # One launch saves and writes. Register undo before the launch; drop it if the launch never happened.
            if sign > 0:
                undo.append((live, saved))
            self._ops.perturb_(live, saved, grads, groups, scale, adaptive, sign, stochastic)
        except BaseException:
            if not self._launched(first, before):
                del undo[known:]
            raise

    def fd_gram(
        self,
        grads: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        num_groups: int,
        weights: Sequence[Tensor | None],
    ) -> Tensor:
        return self._ops.fd_gram(list(grads), groups, num_groups, weights)

    def fd_combine_(
        self,
        out: Sequence[Tensor],
        grads: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        num_groups: int,
        weights: Sequence[Tensor | None] | None,
        pass_weights: Tensor,
        factor: Tensor,
    ) -> Tensor:
        weights = [None] * len(out) if weights is None else weights
        decision = (_on(out[0].device, x) for x in (pass_weights, factor))
        return self._ops.fd_combine_(out, list(grads), groups, num_groups, weights, *decision)

    def fd_direction_(
        self,
        out: Sequence[Tensor],
        grads: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        pass_weights: Tensor,
        factor: Tensor,
        ok: Tensor,
    ) -> None:
        decision = (_on(out[0].device, x) for x in (pass_weights, factor, ok))
        self._ops.fd_direction_(out, list(grads), groups, *decision)

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
        measures = passes == PASSES and REGULARIZERS[regularizer].measures
        assert gram is not None or not measures or losses is not None
        assert gram is not None or passes < PASSES or max_grad_norm is None
        here = [pair for pair in steps if pair[0].device == alpha.device]
        pass_weights, numbers, flags = self._ops.coefficients(
            gram,
            list(squared_norms),
            scale,
            alpha,
            beta,
            counters,
            [taken for taken, _ in here],
            [part for _, part in here],
            regularizer if passes == PASSES else "linear",
            [] if losses is None else list(losses),
            grad_scale,
            max_regularizer_ratio,
            math.inf if max_grad_norm is None else max_grad_norm,
        )
        factor, kappa, sigma, regularizer_ratio = self.host.unbind(numbers)
        ok, capped = self.host.unbind(flags)
        for taken, part in steps:
            if taken.device != alpha.device:
                taken.addcmul_(part, ok.to(part, non_blocking=True))
        return Coefficients(
            pass_weights,
            None if max_grad_norm is None and grad_scale is None else factor,
            ok,
            kappa if measures else None,
            sigma if measures else None,
            None if gram is None else regularizer_ratio,
            None if gram is None else capped,
        )

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
        device = live[0].device
        self._ops.step_(
            live,
            saved,
            [_without_none(column, live[0]) for column in state],
            _gradients(grads),
            groups,
            steps,
            options[0].rule,
            *_numbers(options, device),
            *_decision(coefficients, device),
            _on(device, coefficients.ok),
            *_direction(direction, live),
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
        *earlier, last = _gradients(grads)
        decision = _decision(coefficients, live[0].device)
        self._ops.combine_(live, saved, earlier, last, groups, *decision, *_direction(direction, live))


def _gradients(grads: Sequence[Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """Return the gradients of all passes of a full step, otherwise only the last one."""
    return list(grads) if len(grads) == PASSES else [grads[-1]]


def _without_none(rows: Sequence[Tensor | None], like: Tensor) -> Sequence[Tensor]:
    """Replace None by empty tensors, because schemas do not support written lists of optional tensors."""
    if isinstance(rows, list) and any(row is None for row in rows):
        none = like.new_empty(0)
        return [none if row is None else row for row in rows]
    return rows  # type: ignore[return-value]


def _decision(c: Coefficients, device: torch.device) -> tuple[Tensor, Tensor | None]:
    return _on(device, c.pass_weights), None if c.factor is None else _on(device, c.factor)


def _direction(direction: Direction | None, rows: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor | None]:
    return ([], None) if direction is None else (direction.rows, _on(rows[0].device, direction.weight))


def _on(device: torch.device, x: Tensor) -> Tensor:
    return x if x.device == device else x.to(device, non_blocking=True)


def _numbers(groups: Iterable[Options], device: torch.device) -> tuple[list[float], list[Tensor | None]]:
    """Return the options of all groups in one list as numbers, and in another list those that are device tensors."""
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
