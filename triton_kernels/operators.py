"""From tensors to addresses: checks, device, table, launch. csrc/ops.cpp says what the arguments mean."""

from __future__ import annotations

import struct
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from itertools import chain, repeat
from operator import attrgetter, is_not, le, or_
from typing import NamedTuple

import torch
from torch import Tensor

from crsam_ext.ops import known_of

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
# Columns of the table.
_LIVE, _SAVED, _FIRST, _SECOND, _GRAD, _GRAD_ASCENT, _GRAD_DESCENT, _STEP, _NUMEL, _GROUP, _ADAPTIVE, _ALIGNED = (
    column.value
    for column in (
        LIVE, SAVED, FIRST, SECOND, GRAD, GRAD_ASCENT, GRAD_DESCENT, STEP, NUMEL, GROUP, ADAPTIVE, ALIGNED
    )
)  # fmt: skip
_COLUMNS, _CHUNK = COLUMNS.value, CHUNK.value
_ADDRESSES = (_LIVE, _SAVED, _FIRST, _SECOND, _GRAD, _GRAD_ASCENT, _GRAD_DESCENT)
_kind_of = attrgetter("dtype"), attrgetter("device")


class Rows:
    """The rows of one call, as they are collected from its lists of tensors.

    Args:
        like: gives the rows their number, lengths, dtype and device.
    """

    def __init__(self, like: Sequence[Tensor], name: str, groups: Sequence[int], num_groups: int) -> None:
        check(len(like) > 0, f"{name} is empty")
        self.device, self.dtype = like[0].device, like[0].dtype
        self.master = torch.float64 if self.dtype == torch.float64 else torch.float32
        check_count(len(groups), "groups", len(like))
        check_groups(groups, num_groups)
        self.numels, self.groups, self.num_groups = _describe(like).numels, known_of(groups, _grouped), num_groups
        check(self.dtype in DTYPES, f"rows are {name_of(self.dtype)}, not float64, float32, float16 or bfloat16")
        # The columns of the table that are not 0.
        self._misaligned = False
        self._columns: dict[int, array[int]] = {_NUMEL: self.numels, _GROUP: self.groups.numbers}

    def enter(self, column: int, tensors: Sequence[Tensor], name: str, dtype: torch.dtype) -> None:
        """Enter a list of tensors; those without elements stand for none."""
        check_count(len(tensors), name, len(self.numels))
        found = _describe(tensors)
        if found.numels != self.numels or found.kinds != (dtype, self.device):
            for tensor, n in zip(tensors, self.numels, strict=True):
                if tensor.numel():
                    check_tensor(tensor, name, self.device, dtype, n)
        self._columns[column] = found.addresses
        self._misaligned = self._misaligned or found.misaligned

    def enter_weights(self, column: int, weights: Sequence[Tensor | None], dtype: torch.dtype) -> None:
        """Enter the tensors that rows are weighted with, where there are any."""
        check_count(len(weights), "weights", len(self.numels))
        if not any(map(is_not, weights, repeat(None))):
            return
        for weight, n in zip(weights, self.numels, strict=True):
            if weight is not None:
                check_tensor(weight, "weights", self.device, dtype, n)
        self._columns[column] = array("q", (0 if w is None else w.data_ptr() for w in weights))
        self._misaligned = True  # perhaps
        self._columns[_ADAPTIVE] = array("q", map(is_not, weights, repeat(None)))

    def enter_adaptive(self, adaptive: Sequence[bool]) -> None:
        """Enter, for each group, whether its perturbation is that of ASAM."""
        check_count(len(adaptive), "adaptive", self.num_groups)
        if any(adaptive):
            self._columns[_ADAPTIVE] = array("q", (adaptive[group] for group in self.groups.numbers))

    def enter_steps(self, steps: Sequence[Tensor]) -> None:
        """Enter how many steps each row has taken."""
        check_count(len(steps), "steps", len(self.numels))
        for step in {id(step): step for step in steps}.values():  # rows share them
            check_tensor(step, "steps", self.device, torch.float32, 1)
        self._columns[_STEP] = _describe(steps).addresses

    @property
    def empty(self) -> bool:
        return not any(self.numels)

    def table(self) -> Table:
        """The table on the device."""
        n = len(self.numels)
        self._columns[_ALIGNED] = array("q", [1]) * n
        if self._misaligned:
            bits = [0] * n
            for column in _ADDRESSES:
                bits = list(map(or_, bits, self._columns.get(column, bits)))
            self._columns[_ALIGNED] = array("q", (not x % 16 for x in bits))
        content = array("q", bytes(8 * _COLUMNS * n))
        for column, values in self._columns.items():
            if self.groups.order is not None:
                values = array("q", map(values.__getitem__, self.groups.order))
            content[column::_COLUMNS] = values
        found = content.tobytes()
        # Lengths and groups stay from step to step, so this part, which is long, is neither built nor compared again.
        lengths = (self.num_groups, self.numels.tobytes(), self.groups.numbers.tobytes())
        group_begin, chunks, tickets = _cache.get(("layout", lengths), self.device, self._layout, self._parts)
        rows = _cache.get(("rows", found), self.device, lambda: found, lambda table: table.view(torch.int64))
        return Table(rows, chunks, group_begin, tickets)

    def _parts(self, layout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        begin = 8 * (self.num_groups + 1)
        end = len(layout) - 4 * self.num_groups
        return (
            layout[:begin].view(torch.int64),
            layout[begin:end].view(torch.int32).view(-1, 2),
            layout[end:].view(torch.int32),
        )

    def _layout(self) -> bytes:
        """What depends on lengths and groups alone: group_begin, chunks, tickets."""
        begin, chunks = [0] * (self.num_groups + 1), array("i")
        for row, i in enumerate(self.groups.order or range(len(self.numels))):
            count = -(-self.numels[i] // _CHUNK)
            begin[self.groups.numbers[i] + 1] += count
            chunks.extend(chain.from_iterable((row, index) for index in range(count)))
        check(len(chunks) // 2 <= 2**31 - 1, "too many elements for one launch")
        for group in range(self.num_groups):
            begin[group + 1] += begin[group]
        return array("q", begin).tobytes() + chunks.tobytes() + bytes(4 * self.num_groups)


class _Groups(NamedTuple):
    """The groups of rows."""

    numbers: array[int]
    order: list[int] | None  #: in which rows are entered, by group; None for that in which they come


def _grouped(groups: Sequence[int]) -> _Groups:
    ordered = all(map(le, groups, groups[1:]))
    return _Groups(array("q", groups), None if ordered else sorted(range(len(groups)), key=groups.__getitem__))


class _Description(NamedTuple):
    """What is to be known about a list of tensors."""

    numels: array[int]
    addresses: array[int]  #: 0 for those without elements
    misaligned: bool  #: whether an address is no multiple of 16
    kinds: tuple[torch.dtype, torch.device] | None  #: of all of them; None if they differ, or are not contiguous


def _describe(tensors: Sequence[Tensor]) -> _Description:
    return known_of(tensors, _described)


def _described(tensors: Sequence[Tensor]) -> _Description:
    numels = array("q", map(Tensor.numel, tensors))
    addresses = array("q", map(Tensor.data_ptr, tensors))
    if not all(numels):
        addresses = array("q", (address if n else 0 for address, n in zip(addresses, numels, strict=True)))
    dtypes, devices = (set(map(kind, tensors)) for kind in _kind_of)
    alike = len(dtypes) == len(devices) == 1 and all(map(Tensor.is_contiguous, tensors))
    return _Description(numels, addresses, bool(reduce(or_, addresses, 0) % 16), (*dtypes, *devices) if alike else None)


def _numbers(tensor: Tensor, name: str, device: torch.device, count: int) -> Tensor:
    check_tensor(tensor, name, device, torch.float64, count)
    return tensor


def _new_numbers(device: torch.device, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=torch.float64, device=device)


def grad_norm(
    grads: Sequence[Tensor], groups: Sequence[int], num_groups: int, weights: Sequence[Tensor | None]
) -> Tensor:
    """Squared norm of the gradient per group."""
    rows = Rows(grads, "grads", groups, num_groups)
    rows.enter(_GRAD, grads, "grads", rows.dtype)
    rows.enter_weights(_LIVE, weights, rows.dtype)
    if rows.empty:
        return torch.zeros(num_groups, dtype=torch.float64, device=rows.device)
    with guard(rows.device):
        table = rows.table()
        norms = _new_numbers(rows.device, num_groups)
        launch_grad_norm(rows.dtype, table, _new_numbers(rows.device, len(table.chunks)), norms)
    return norms


def perturbation_scale(squared_norm: Tensor, rho: Tensor, epsilon: float) -> Tensor:
    """rho / (norm + epsilon) per group."""
    device, groups = squared_norm.device, squared_norm.numel()
    scale = _new_numbers(device, groups)
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
    rows = Rows(live, "live", groups, scale.numel())
    rows.enter(_LIVE, live, "live", rows.dtype)
    rows.enter(_SAVED, saved, "saved", rows.master)
    rows.enter(_GRAD, grads, "grads", rows.dtype)
    rows.enter_adaptive(adaptive)
    if rows.empty:
        return
    _numbers(scale, "scale", rows.device, rows.num_groups)
    with guard(rows.device):
        if rows.device not in _launches.markers:
            _launches.markers[rows.device] = torch.zeros(1, dtype=torch.int64, device=rows.device)
        table = rows.table()
        _launches.count += 1
        launch_perturb(rows.dtype, table, scale, sign, stochastic, _launches.markers[rows.device], _launches.count)


def fd_gram(
    grad: Sequence[Tensor],
    grad_ascent: Sequence[Tensor],
    grad_descent: Sequence[Tensor],
    groups: Sequence[int],
    num_groups: int,
    weights: Sequence[Tensor | None],
) -> Tensor:
    """Gram matrix of the gradient and its differences, per group."""
    rows = Rows(grad, "grad", groups, num_groups)
    _enter_gradients(rows, grad, grad_ascent, grad_descent)
    rows.enter_weights(_SAVED, weights, rows.master)
    if rows.empty:
        return torch.zeros(num_groups, 9, dtype=torch.float64, device=rows.device)
    with guard(rows.device):
        table = rows.table()
        gram = _new_numbers(rows.device, num_groups, 9)
        launch_fd_gram(rows.dtype, table, _new_numbers(rows.device, len(table.chunks), 9), gram)
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
    values = _new_numbers(device, 2 * groups + 4)
    flags = torch.empty(2, dtype=torch.bool, device=device)
    with guard(device):
        launch_coefficients(
            gram, squared_norms, scale, alpha, beta, losses, grad_scale, counters, taken, part, values,
            flags.view(torch.uint8),
            max_regularizer_ratio, max_grad_norm, log and passes == 3,
        )  # fmt: skip
    return values, flags


def _enter_gradients(
    rows: Rows, grad: Sequence[Tensor], grad_ascent: Sequence[Tensor], grad_descent: Sequence[Tensor]
) -> None:
    rows.enter(_GRAD, grad, "grad", rows.dtype)
    rows.enter(_GRAD_ASCENT, grad_ascent, "grad_ascent", rows.dtype)
    rows.enter(_GRAD_DESCENT, grad_descent, "grad_descent", rows.dtype)


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


def _enter_step_gradients(
    rows: Rows, grad: Sequence[Tensor], grad_ascent: Sequence[Tensor], grad_descent: Sequence[Tensor]
) -> bool:
    """Enter the gradients of a step, and say whether there are all three."""
    if not grad_ascent:
        rows.enter(_GRAD, grad, "grad", rows.dtype)
        return False
    _enter_gradients(rows, grad, grad_ascent, grad_descent)
    return True


def _step(
    launch: Callable[..., None],
    num_options: int,
    buffers: Iterable[tuple[int, str, Sequence[Tensor]]],
    live: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    groups: Sequence[int],
    steps: Sequence[Tensor],
    options: Sequence[float],
    option_tensors: Sequence[Tensor | None],
    decided: tuple[Tensor, Tensor, Tensor | None],
    ok: Tensor,
) -> None:
    """The step of a base optimizer, with so many options a group; ``buffers`` has columns, names and rows."""
    if not live:
        return
    groups_in_all = decided[0].numel()
    rows = Rows(live, "live", groups, groups_in_all)
    rows.enter(_LIVE, live, "live", rows.dtype)
    rows.enter(_SAVED, saved, "saved", rows.master)
    for column, name, tensors in buffers:
        rows.enter(column, tensors, name, rows.master)
    rows.enter_steps(steps)
    differences = _enter_step_gradients(rows, *grads)
    check_tensor(ok, "ok", rows.device, torch.bool, 1)
    check_count(len(options), "options", groups_in_all * num_options)
    if rows.empty:
        return
    decision = _decision(rows, *decided)
    with guard(rows.device):
        own = _options(options, option_tensors, rows.device)
        launch(rows.dtype, rows.table(), own, decision, ok.view(torch.uint8), differences)


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
    buffers = ((_FIRST, "momentum_buffer", momentum_buffer),)
    grads = (grad, grad_ascent, grad_descent)
    _step(
        launch_sgd_step, SGD_OPTIONS.value, buffers, live, saved, grads, groups, steps, options, option_tensors,
        (a, b, factor), ok,
    )  # fmt: skip


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
    buffers = ((_FIRST, "exp_avg", exp_avg), (_SECOND, "exp_avg_sq", exp_avg_sq))
    grads = (grad, grad_ascent, grad_descent)
    _step(
        launch_adamw_step, ADAM_OPTIONS.value, buffers, live, saved, grads, groups, steps, options, option_tensors,
        (a, b, factor), ok,
    )  # fmt: skip


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
    rows = Rows(live, "live", groups, a.numel())
    rows.enter(_LIVE, live, "live", rows.dtype)
    rows.enter(_SAVED, saved, "saved", rows.master)
    differences = _enter_step_gradients(rows, grad, grad_ascent, grad_descent)
    if rows.empty:
        return
    decision = _decision(rows, a, b, factor)
    with guard(rows.device):
        launch_combine(rows.dtype, rows.table(), decision, differences)
