"""From tensors to addresses: checks, device, table, launch. csrc/ops.cpp says what the arguments mean."""

from __future__ import annotations

import struct
import threading
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from operator import or_
from typing import Any

import torch
from torch import Tensor

from crsam_ext.host import Column, Groups

from .checks import check, check_count, check_groups, check_tensor, name_of
from .chunk_table import (
    ADAPTIVE,
    ALIGNED,
    CHUNK,
    COLUMNS,
    FIRST,
    GRAD,
    GRAD_ASCENT,
    GRAD_DESCENT,
    GROUP,
    LIVE,
    NUMEL,
    SAVED,
    SECOND,
    STEP,
    Table,
)
from .coefficients import launch_coefficients, launch_perturbation_scale
from .fd_gram import launch_fd_gram
from .grad_norm import launch_grad_norm
from .launch import DTYPES, guard
from .perturb import launch_perturb
from .step import Decision, launch_adamw_step, launch_combine, launch_sgd_step
from .table_cache import TableCache
from .update_math import ADAM_OPTIONS, SGD_OPTIONS

_cache = TableCache()
_PLAIN = (list, tuple)  # sequences that nobody has looked at
# Columns of the table.
_LIVE, _SAVED, _FIRST, _SECOND, _GRAD, _GRAD_ASCENT, _GRAD_DESCENT, _STEP, _NUMEL, _GROUP, _ADAPTIVE, _ALIGNED = (
    column.value
    for column in (
        LIVE, SAVED, FIRST, SECOND, GRAD, GRAD_ASCENT, GRAD_DESCENT, STEP, NUMEL, GROUP, ADAPTIVE, ALIGNED
    )
)  # fmt: skip
_COLUMNS, _CHUNK = COLUMNS.value, CHUNK.value
_ADDRESSES = (_LIVE, _SAVED, _FIRST, _SECOND, _GRAD, _GRAD_ASCENT, _GRAD_DESCENT)
_MASTERS = (_SAVED, _FIRST, _SECOND)  # in the compute dtype


class Rows:
    """The rows of one call: its lists of tensors, checked, and the table of their addresses.

    Args:
        groups, num_groups: the group of each row, and how many there are.
        lists: column of the table, name and tensors of each; the first gives the rows their number, lengths, dtype
            and device.
        optional: the same of a list in which some may be missing, or have no elements.
        steps: how many steps each row has taken.
        adaptive: for each group, whether its perturbation is that of ASAM.
        weighted: whether instead it is that of the rows that ``optional`` has.
    """

    def __init__(
        self,
        groups: Sequence[int],
        num_groups: int,
        *lists: tuple[int, str, Sequence[Tensor]],
        optional: tuple[int, str, Sequence[Tensor | None]] | None = None,
        steps: Sequence[Tensor] | None = None,
        adaptive: Sequence[bool] = (),
        weighted: bool = False,
    ) -> None:
        _, name, like = lists[0]
        if not like:
            raise RuntimeError(f"{name} is empty")
        first = _column(like)
        kind: tuple[torch.dtype, torch.device] = first.kind or (like[0].dtype, like[0].device)
        self.dtype, self.device = kind
        if self.dtype not in DTYPES:
            raise RuntimeError(f"rows are {name_of(self.dtype)}, not float64, float32, float16 or bfloat16")
        master = (torch.float64 if self.dtype == torch.float64 else torch.float32), self.device
        found: Any = Groups(groups) if type(groups) in _PLAIN else groups
        check_count(len(groups), "groups", len(like))
        check_groups(found.limits, num_groups)
        self.groups, self.num_groups, self.numels = found.numbers, num_groups, first.numels
        self._columns: list[tuple[int, bytes]] = []
        for column, name, tensors in lists:
            found, expected = _column(tensors), master if column in _MASTERS else kind
            if found.kind != expected or found.numels != self.numels:
                self._check(found, name, expected)
            self._columns.append((column, found.addresses))
        self._adaptive: Sequence[bool] = tuple(adaptive) if any(adaptive) else ()
        self._weights = b""  # addresses, where there are any
        if optional is not None:
            column, name, some = optional
            found, expected = _column(some), master if column in _MASTERS else kind
            if found.addresses != bytes(len(self.numels)):
                if found.kind != expected or found.numels != self.numels:
                    self._check(found, name, expected, optional=True)
                self._columns.append((column, found.addresses))
                self._weights = found.addresses if weighted else b""
        if steps is not None:
            check_count(len(steps), "steps", len(like))
            found = _column(steps)
            if found.kind != (torch.float32, self.device) or found.numels != struct.pack("q", 1) * len(steps):
                for step in steps:
                    check_tensor(step, "steps", self.device, torch.float32, 1)
            self._columns.append((_STEP, found.addresses))

    @property
    def empty(self) -> bool:
        return not any(self.numels)

    def table(self) -> Table:
        """The table on the device."""
        # These stay from step to step, so the part that depends on them alone, which is long, is not built again.
        lengths = (self.num_groups, self.numels, self.groups)
        key = (lengths, self._adaptive, self._weights, *self._columns)

        def table_of(content: Tensor) -> Table:
            return Table(content.view(torch.int64), *_cache.get(lengths, self.device, self._layout, self._parts))

        return _cache.get(key, self.device, self._content, table_of)

    def _check(self, column: Any, name: str, kind: tuple[torch.dtype, torch.device], optional: bool = False) -> None:
        check_count(len(column), name, len(self.numels) // 8)
        for tensor, n in zip(column, array("q", self.numels), strict=True):
            if not (optional and (tensor is None or not tensor.numel())):
                check_tensor(tensor, name, self.device, kind[0], n)

    def _order(self) -> list[int]:
        """The rows by group."""
        groups = array("q", self.groups)
        return sorted(range(len(groups)), key=groups.__getitem__)

    def _content(self) -> bytes:
        order, groups = self._order(), array("q", self.groups)
        columns = {_NUMEL: array("q", self.numels), _GROUP: groups}
        columns.update((column, array("q", addresses)) for column, addresses in self._columns)
        bits = [0] * len(order)
        for column in columns.keys() & _ADDRESSES:
            bits = list(map(or_, bits, columns[column]))
        columns[_ALIGNED] = array("q", (not x % 16 for x in bits))
        if self._weights:
            columns[_ADAPTIVE] = array("q", map(bool, array("q", self._weights)))
        elif self._adaptive:
            columns[_ADAPTIVE] = array("q", (self._adaptive[group] for group in groups))
        content = array("q", bytes(8 * _COLUMNS * len(order)))
        for column, values in columns.items():
            content[column::_COLUMNS] = array("q", map(values.__getitem__, order))
        return content.tobytes()

    def _parts(self, layout: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        begin = 8 * (self.num_groups + 1)
        end = len(layout) - 4 * self.num_groups
        chunks = layout[begin:end].view(torch.int32).view(-1, 2)
        partial = torch.empty(9 * len(chunks), dtype=torch.float64, device=self.device)
        return chunks, layout[:begin].view(torch.int64), layout[end:].view(torch.int32), partial, len(chunks)

    def _layout(self) -> bytes:
        """What depends on lengths and groups alone: group_begin, chunks, tickets."""
        begin, chunks = [0] * (self.num_groups + 1), array("i")
        numels, groups = array("q", self.numels), array("q", self.groups)
        for row, i in enumerate(self._order()):
            count = -(-numels[i] // _CHUNK)
            begin[groups[i] + 1] += count
            chunks.extend(chain.from_iterable((row, index) for index in range(count)))
        check(len(chunks) // 2 <= 2**31 - 1, "too many elements for one launch")
        for group in range(self.num_groups):
            begin[group + 1] += begin[group]
        return array("q", begin).tobytes() + chunks.tobytes() + bytes(4 * self.num_groups)


def _column(tensors: Sequence[Tensor | None]) -> Any:
    """What there is to know about a list of tensors."""
    return Column(tensors) if type(tensors) in _PLAIN else tensors


def _numbers(tensor: Tensor, name: str, device: torch.device, count: int) -> Tensor:
    check_tensor(tensor, name, device, torch.float64, count)
    return tensor


def grad_norm(
    grads: Sequence[Tensor], groups: Sequence[int], num_groups: int, weights: Sequence[Tensor | None]
) -> Tensor:
    """Squared norm of the gradient per group."""
    rows = Rows(groups, num_groups, (_GRAD, "grads", grads), optional=(_LIVE, "weights", weights), weighted=True)
    if rows.empty:
        return torch.zeros(num_groups, dtype=torch.float64, device=rows.device)
    with guard(rows.device):
        table = rows.table()
        norms = table.partial.new_empty(num_groups)
        launch_grad_norm(rows.dtype, table, norms)
    return norms


def perturbation_scale(squared_norm: Tensor, rho: Tensor, epsilon: float) -> Tensor:
    """rho / (norm + epsilon) per group."""
    device, groups = squared_norm.device, squared_norm.numel()
    scale = torch.empty_like(squared_norm)
    with guard(device):
        launch_perturbation_scale(
            _numbers(squared_norm, "squared_norm", device, groups), _numbers(rho, "rho", device, groups), epsilon, scale
        )
    return scale


class _Launches(threading.local):
    """How often this thread has launched the perturbation, and the number of the last launch that a device has run."""

    def __init__(self) -> None:
        self.count = 0
        self.markers: dict[torch.device, Tensor] = {}

    def next(self, device: torch.device) -> tuple[Tensor, int]:
        """Where the device enters the number of the next launch, and the number."""
        if device not in self.markers:
            self.markers[device] = torch.zeros(1, dtype=torch.int64, device=device)
        self.count += 1
        return self.markers[device], self.count


_launches = _Launches()


def perturbations_launched() -> int:
    """How often this thread has set out to launch the perturbation."""
    return _launches.count


def last_perturbation(device: torch.device) -> int:
    """The number of the last one that a device has run for this thread. Waits for the device."""
    marker = _launches.markers.get(device)
    return 0 if marker is None else int(marker.item())


def perturb_(
    live: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
    groups: Sequence[int],
    scale: Tensor,
    adaptive: Sequence[bool],
    sign: int,
    stochastic: bool = False,
) -> None:
    """w + sign e into `live`; with sign +1, w is saved first."""
    if not live:
        return
    check(sign in (1, -1), f"sign is {sign}")
    num_groups = scale.numel()
    check_count(len(adaptive), "adaptive", num_groups)
    lists = (_LIVE, "live", live), (_SAVED, "saved", saved), (_GRAD, "grads", grads)
    rows = Rows(groups, num_groups, *lists, adaptive=adaptive)
    if rows.empty:
        return
    _numbers(scale, "scale", rows.device, num_groups)
    with guard(rows.device):
        table = rows.table()
        launch_perturb(rows.dtype, table, scale, sign, stochastic, *_launches.next(rows.device))


def fd_gram(
    grad: Sequence[Tensor],
    grad_ascent: Sequence[Tensor],
    grad_descent: Sequence[Tensor],
    groups: Sequence[int],
    num_groups: int,
    weights: Sequence[Tensor | None],
) -> Tensor:
    """Gram matrix of the gradient and its differences, per group."""
    check_count(len(grad_ascent), "grad_ascent", len(grad))
    gradients = _gradients(grad, grad_ascent, grad_descent)
    rows = Rows(groups, num_groups, *gradients, optional=(_SAVED, "weights", weights), weighted=True)
    if rows.empty:
        return torch.zeros(num_groups, 9, dtype=torch.float64, device=rows.device)
    with guard(rows.device):
        table = rows.table()
        gram = table.partial.new_empty(num_groups, 9)
        launch_fd_gram(rows.dtype, table, gram)
    return gram


def coefficients(
    gram: Tensor | None,
    squared_norms: Sequence[Tensor],
    scale: Tensor,
    alpha: Tensor,
    beta: Tensor,
    counters: Tensor,
    taken: Sequence[Tensor],
    part: Sequence[Tensor],
    passes: int,
    log: bool,
    losses: Sequence[Tensor],
    grad_scale: Tensor | None,
    max_regularizer_ratio: float,
    max_grad_norm: float,
) -> tuple[Tensor, Tensor]:
    """What a step does with its gradients: values, and flags."""
    device, groups = alpha.device, alpha.numel()
    check_count(len(part), "part", len(taken))
    check_tensor(counters, "counters", device, torch.int64, 4)
    if gram is not None:
        _numbers(gram, "gram", device, 9 * groups)
    for norm in squared_norms:
        _numbers(norm, "squared_norms", device, groups)
    for name, tensor in (("scale", scale), ("alpha", alpha), ("beta", beta)):
        _numbers(tensor, name, device, groups)
    if losses:
        check_count(len(losses), "losses", 3)
    for loss in losses:
        _numbers(loss, "losses", device, 1)
    if grad_scale is not None:
        _numbers(grad_scale, "grad_scale", device, 1)
    for steps, taking in zip(taken, part, strict=True):
        check_tensor(steps, "taken", device, torch.float32, steps.numel())
        check_tensor(taking, "part", device, torch.float32, steps.numel())
    values = alpha.new_empty(2 * groups + 4)
    flags = alpha.new_empty(2, dtype=torch.bool)
    with guard(device):
        launch_coefficients(
            gram, squared_norms, scale, alpha, beta, losses, grad_scale, counters, taken, part, values,
            flags.view(torch.uint8),
            max_regularizer_ratio, max_grad_norm, log and passes == 3,
        )  # fmt: skip
    return values, flags


def _decision(rows: Rows, a: Tensor, b: Tensor, factor: Tensor | None) -> Decision:
    _numbers(a, "a", rows.device, a.numel())
    _numbers(b, "b", rows.device, a.numel())
    return Decision(a, b, None if factor is None else _numbers(factor, "factor", rows.device, 1))


def _options(options: Sequence[float], tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """The options of all groups on the device, WORDS for each."""
    check_count(len(tensors), "option_tensors", len(options))
    words: list[float] = []
    for value, tensor in zip(options, tensors, strict=True):
        if tensor is None:
            words += (0, 0, value, 1 - value)
            continue
        wide = tensor.dtype == torch.float64
        check_tensor(tensor, "option_tensors", device, torch.float64 if wide else torch.float32, 1)
        words += (0, tensor.data_ptr(), 0, 0) if wide else (tensor.data_ptr(), 0, 0, 0)
    content = struct.pack("qqdd" * len(options), *words)
    return _cache.get(("options", content), device, lambda: content, lambda table: table.view(torch.int64))


def _gradients(
    grad: Sequence[Tensor], grad_ascent: Sequence[Tensor], grad_descent: Sequence[Tensor]
) -> tuple[tuple[int, str, Sequence[Tensor]], ...]:
    """The lists of all three gradients, or that of the only one."""
    others = (_GRAD_ASCENT, "grad_ascent", grad_ascent), (_GRAD_DESCENT, "grad_descent", grad_descent)
    return (_GRAD, "grad", grad), *(others if grad_ascent else ())


def sgd_step_(
    live: Sequence[Tensor],
    saved: Sequence[Tensor],
    momentum_buffer: Sequence[Tensor],
    grad: Sequence[Tensor],
    grad_ascent: Sequence[Tensor],
    grad_descent: Sequence[Tensor],
    groups: Sequence[int],
    steps: Sequence[Tensor],
    options: Sequence[float],
    option_tensors: Sequence[Tensor | None],
    a: Tensor,
    b: Tensor,
    factor: Tensor | None,
    ok: Tensor,
) -> None:
    """A step of SGD."""
    if not live:
        return
    lists = (_LIVE, "live", live), (_SAVED, "saved", saved), *_gradients(grad, grad_ascent, grad_descent)
    momentum = _FIRST, "momentum_buffer", momentum_buffer
    rows = Rows(groups, a.numel(), *lists, optional=momentum, steps=steps)
    _step(launch_sgd_step, SGD_OPTIONS.value, rows, options, option_tensors, (a, b, factor), ok, bool(grad_ascent))


def adamw_step_(
    live: Sequence[Tensor],
    saved: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    grad: Sequence[Tensor],
    grad_ascent: Sequence[Tensor],
    grad_descent: Sequence[Tensor],
    groups: Sequence[int],
    steps: Sequence[Tensor],
    options: Sequence[float],
    option_tensors: Sequence[Tensor | None],
    a: Tensor,
    b: Tensor,
    factor: Tensor | None,
    ok: Tensor,
) -> None:
    """A step of Adam or AdamW."""
    if not live:
        return
    lists = (_LIVE, "live", live), (_SAVED, "saved", saved), *_gradients(grad, grad_ascent, grad_descent)
    moments = (_FIRST, "exp_avg", exp_avg), (_SECOND, "exp_avg_sq", exp_avg_sq)
    rows = Rows(groups, a.numel(), *lists, *moments, steps=steps)
    _step(launch_adamw_step, ADAM_OPTIONS.value, rows, options, option_tensors, (a, b, factor), ok, bool(grad_ascent))


def _step(
    launch: Callable[..., None],
    num_options: int,
    rows: Rows,
    options: Sequence[float],
    option_tensors: Sequence[Tensor | None],
    decided: tuple[Tensor, Tensor, Tensor | None],
    ok: Tensor,
    differences: bool,
) -> None:
    """The step of a base optimizer, with so many options a group."""
    check_tensor(ok, "ok", rows.device, torch.bool, 1)
    check_count(len(options), "options", rows.num_groups * num_options)
    if rows.empty:
        return
    decision = _decision(rows, *decided)
    with guard(rows.device):
        own = _options(options, option_tensors, rows.device)
        launch(rows.dtype, rows.table(), own, decision, ok.view(torch.uint8), differences)


def combine_(
    live: Sequence[Tensor],
    saved: Sequence[Tensor],
    grad: Sequence[Tensor],
    grad_ascent: Sequence[Tensor],
    grad_descent: Sequence[Tensor],
    groups: Sequence[int],
    a: Tensor,
    b: Tensor,
    factor: Tensor | None,
) -> None:
    """The regularized gradient over the last one, and w into `live`."""
    if not live:
        return
    lists = (_LIVE, "live", live), (_SAVED, "saved", saved), *_gradients(grad, grad_ascent, grad_descent)
    rows = Rows(groups, a.numel(), *lists)
    if rows.empty:
        return
    decision = _decision(rows, a, b, factor)
    with guard(rows.device):
        launch_combine(rows.dtype, rows.table(), decision, bool(grad_ascent))
