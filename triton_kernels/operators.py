"""Converts tensors to addresses: checks arguments, selects the device, builds the table, launches the kernel.

``KERNELS`` in crsam_ext/backends/fused.py documents the arguments.
"""

from __future__ import annotations

import struct
import threading
from array import array
from collections.abc import Sequence
from itertools import chain
from operator import or_
from typing import Any

import torch
from torch import Tensor

from crsam_ext.host import Column, Groups
from crsam_ext.ops import GRAM, PASSES, REGULARIZERS
from crsam_ext.precision import compute_dtype

from . import chunk_table
from .checks import Argument, check_count, check_groups, check_tensor, name_of, place
from .chunk_table import DTYPES, Table
from .coefficients import launch_coefficients, launch_direction_weight, launch_perturbation_scale
from .fd_gram import launch_fd_combine, launch_fd_gram
from .grad_norm import launch_grad_norm
from .launch import guard
from .perturb import launch_perturb
from .step import launch_combine, launch_fd_direction, launch_step
from .table_cache import TableCache
from .update_math import RULES, Decision

_cache = TableCache()
_PLAIN = (list, tuple)  # sequences without cached metadata
# The columns and sizes of the table, which kernels use as Triton constants.
LIVE, SAVED, DIRECTION, STATE, GRADS, STEP, NUMEL, GROUP, ADAPTIVE, ALIGNED, COLUMNS, CHUNK = (
    getattr(chunk_table, name).value
    for name in (
        "LIVE", "SAVED", "DIRECTION", "STATE", "GRADS", "STEP",
        "NUMEL", "GROUP", "ADAPTIVE", "ALIGNED", "COLUMNS", "CHUNK",
    )
)  # fmt: skip
_MASTERS = range(SAVED, GRADS)  # columns of tensors in the compute dtype
_ADDRESSES = range(LIVE, STEP)
# The columns of the gradients and of the state buffers, with their names in messages.
_GRADS = [(GRADS + i, f"grads[{i}]") for i in range(PASSES)]
_STATE = [(STATE + i, f"state[{i}]") for i in range(GRADS - STATE)]
_List = tuple[int, str, Sequence[Tensor]]  # column of the table, name and tensors of an argument


class Rows:
    """The rows of one call: checks its lists of tensors and builds the table of their addresses.

    Args:
        op: the operator.
        groups, num_groups: the group of each row, and the number of groups.
        lists: lists of tensors; the first one determines the number, lengths, dtype and device of the rows.
        optional: lists of optional tensors; a tensor without elements counts as missing.
        steps: the number of steps of each row.
        adaptive: for each group, whether its perturbation is that of ASAM.
        weighted: whether ``optional`` is one list, and the rows for which it has a tensor are adaptive (ASAM).
    """

    def __init__(
        self,
        op: str,
        groups: Sequence[int],
        num_groups: int,
        *lists: _List,
        optional: Sequence[tuple[int, str, Sequence[Tensor | None]]] = (),
        steps: Sequence[Tensor] | None = None,
        adaptive: Sequence[bool] = (),
        weighted: bool = False,
    ) -> None:
        _, name, like = lists[0]
        if not like:
            raise RuntimeError(f"{op}: {name} is empty")
        first = _column(like)
        if first.kind is None and like[0] is None:
            raise RuntimeError(f"{op}: {name}[0] is None")
        kind: tuple[torch.dtype, torch.device] = first.kind or (like[0].dtype, like[0].device)
        self.op = op
        self.dtype, self.device = kind
        if self.dtype not in DTYPES:
            raise RuntimeError(f"{op}: rows are {name_of(self.dtype)}, not float64, float32, float16 or bfloat16")
        master = compute_dtype(self.dtype), self.device
        found: Any = Groups(groups) if type(groups) in _PLAIN else groups
        check_count(len(groups), (op, "groups"), len(like))
        check_groups(found.numbers, found.limits, op, num_groups)
        self.groups, self.num_groups, self.numels = found.numbers, num_groups, first.numels
        self._columns: list[tuple[int, bytes]] = []
        for column, name, tensors in lists:
            found, expected = _column(tensors), master if column in _MASTERS else kind
            if found.kind != expected or found.numels != self.numels:
                self._check(found, name, expected)
            self._columns.append((column, found.addresses))
        self._adaptive: Sequence[bool] = tuple(adaptive) if any(adaptive) else ()
        self._weights = b""  # the addresses of the weights, if there are any
        for column, name, some in optional:
            found, expected = _column(some), master if column in _MASTERS else kind
            if found.addresses != bytes(len(self.numels)):
                if found.kind != expected or found.numels != self.numels:
                    self._check(found, name, expected, optional=True)
                self._columns.append((column, found.addresses))
                self._weights = found.addresses if weighted else b""
        if steps is not None:
            check_count(len(steps), (op, "steps"), len(like))
            found = _column(steps)
            if found.kind != (torch.float32, self.device) or found.numels != struct.pack("q", 1) * len(steps):
                for row, step in enumerate(steps):
                    check_tensor(step, (op, "steps", row), self.device, torch.float32, 1)
            self._columns.append((STEP, found.addresses))

    @property
    def empty(self) -> bool:
        return not any(self.numels)

    def table(self) -> Table:
        """Return the table on the device."""
        # Lengths and groups rarely change between steps, so the long part that depends on them is cached separately.
        lengths = (self.num_groups, self.numels, self.groups)
        key = (lengths, self._adaptive, self._weights, *self._columns)

        def table_of(content: Tensor) -> Table:
            return Table(content.view(torch.int64), *_cache.get(lengths, self.device, self._layout, self._parts))

        return _cache.get(key, self.device, self._content, table_of)

    def _check(self, column: Any, name: str, kind: tuple[torch.dtype, torch.device], optional: bool = False) -> None:
        check_count(len(column), (self.op, name), len(self.numels) // 8)
        for row, (tensor, n) in enumerate(zip(column, array("q", self.numels), strict=True)):
            if not (optional and (tensor is None or not tensor.numel())):
                check_tensor(tensor, (self.op, name, row), self.device, kind[0], n)

    def _order(self) -> list[int]:
        """Return the indices of the rows, sorted by group."""
        groups = array("q", self.groups)
        return sorted(range(len(groups)), key=groups.__getitem__)

    def _content(self) -> bytes:
        order, groups = self._order(), array("q", self.groups)
        columns = {NUMEL: array("q", self.numels), GROUP: groups}
        columns.update((column, array("q", addresses)) for column, addresses in self._columns)
        bits = [0] * len(order)
        for column in columns.keys() & set(_ADDRESSES):
            bits = list(map(or_, bits, columns[column]))
        columns[ALIGNED] = array("q", (not x % 16 for x in bits))
        if self._weights:
            columns[ADAPTIVE] = array("q", map(bool, array("q", self._weights)))
        elif self._adaptive:
            columns[ADAPTIVE] = array("q", (self._adaptive[group] for group in groups))
        content = array("q", bytes(8 * COLUMNS * len(order)))
        for column, values in columns.items():
            content[column::COLUMNS] = array("q", map(values.__getitem__, order))
        return content.tobytes()

    def _parts(self, layout: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
        begin = 8 * (self.num_groups + 1)
        end = len(layout) - 4 * self.num_groups
        chunks = layout[begin:end].view(torch.int32).view(-1, 2)
        partial = torch.empty(GRAM * len(chunks), dtype=torch.float64, device=self.device)
        return (
            chunks,
            layout[:begin].view(torch.int64),
            layout[end:].view(torch.int32),
            partial,
            len(chunks),
            self.num_groups,
        )

    def _layout(self) -> bytes:
        """Return the part that depends only on lengths and groups: group_begin, chunks, tickets."""
        begin, chunks = [0] * (self.num_groups + 1), array("i")
        numels, groups = array("q", self.numels), array("q", self.groups)
        for row, i in enumerate(self._order()):
            count = -(-numels[i] // CHUNK)
            begin[groups[i] + 1] += count
            chunks.extend(chain.from_iterable((row, index) for index in range(count)))
        if len(chunks) // 2 >= 2**31:
            raise RuntimeError(f"{self.op}: too many elements for one launch")
        for group in range(self.num_groups):
            begin[group + 1] += begin[group]
        return array("q", begin).tobytes() + chunks.tobytes() + bytes(4 * self.num_groups)


def _column(tensors: Sequence[Tensor | None]) -> Any:
    """Return a list of tensors with metadata."""
    return Column(tensors) if type(tensors) in _PLAIN else tensors


def _columns(lists: Sequence[Any], size: int, argument: Argument) -> Sequence[Sequence[Tensor]]:
    """Split a concatenated list, as schemas have it, into lists of ``size`` tensors; return other lists unchanged."""
    if not lists or not isinstance(lists[0], Tensor):
        return lists
    if size == 0 or len(lists) % size:
        raise RuntimeError(f"{place(argument)} has {len(lists)} tensors, which cannot be split into lists of {size}")
    return [lists[first : first + size] for first in range(0, len(lists), size)]


def _numbers(tensor: Tensor, argument: Argument, device: torch.device, count: int) -> Tensor:
    check_tensor(tensor, argument, device, torch.float64, count)
    return tensor


def _directions(direction: Sequence[Tensor], weight: Tensor | None) -> list[_List]:
    """Return the list of the direction, or no list if there is no weight."""
    return [] if weight is None else [(DIRECTION, "direction", direction)]


def _number(tensor: Tensor | None, argument: Argument, device: torch.device) -> Tensor | None:
    return None if tensor is None else _numbers(tensor, argument, device, 1)


def grad_norm(
    grads: Sequence[Tensor],
    groups: Sequence[int],
    num_groups: int,
    weights: Sequence[Tensor | None],
    direction: Sequence[Tensor] = (),
    direction_weight: Tensor | None = None,
) -> Tensor:
    """Return the squared norm of the gradient per group."""
    op, optional = "grad_norm", ((LIVE, "weights", weights),)
    lists = (GRADS, "grads", grads), *_directions(direction, direction_weight)
    rows = Rows(op, groups, num_groups, *lists, optional=optional, weighted=True)
    _number(direction_weight, (op, "direction_weight"), rows.device)
    if rows.empty:
        return torch.zeros(num_groups, dtype=torch.float64, device=rows.device)
    with guard(rows.device):
        table = rows.table()
        norms = table.partial.new_empty(num_groups)
        launch_grad_norm(rows.dtype, table, direction_weight, norms)
    return norms


def perturbation_scale(squared_norm: Tensor, rho: Tensor, epsilon: float) -> Tensor:
    """Return rho / (norm + epsilon) per group."""
    op, device, groups = "perturbation_scale", squared_norm.device, squared_norm.numel()
    scale = torch.empty_like(squared_norm)
    _numbers(squared_norm, (op, "squared_norm"), device, groups)
    _numbers(rho, (op, "rho"), device, groups)
    with guard(device):
        launch_perturbation_scale(squared_norm, rho, epsilon, scale)
    return scale


def direction_weight(
    squared_norm: Tensor,
    squared_direction: Tensor,
    decay: Tensor,
    grad_scale: Tensor | None,
    max_ratio: float,
    epsilon: float,
) -> Tensor:
    """Return the weight of the direction."""
    op, device, groups = "direction_weight", squared_norm.device, squared_norm.numel()
    _numbers(squared_norm, (op, "squared_norm"), device, groups)
    _numbers(squared_direction, (op, "squared_direction"), device, groups)
    _numbers(decay, (op, "decay"), device, 1)
    _number(grad_scale, (op, "grad_scale"), device)
    weight = squared_norm.new_empty(())
    with guard(device):
        launch_direction_weight(squared_norm, squared_direction, decay, grad_scale, max_ratio, epsilon, weight)
    return weight


class _Launches(threading.local):
    """The number of perturbations that this thread launched, and the number of the last one that each device ran."""

    def __init__(self) -> None:
        self.count = 0
        self.markers: dict[torch.device, Tensor] = {}

    def next(self, device: torch.device) -> tuple[Tensor, int]:
        """Return the tensor in which the device stores the number of the next launch, and this number."""
        if device not in self.markers:
            self.markers[device] = torch.zeros(1, dtype=torch.int64, device=device)
        self.count += 1
        return self.markers[device], self.count


_launches = _Launches()


def perturbations_launched() -> int:
    """Return how many launches of the perturbation this thread has started."""
    return _launches.count


def last_perturbation(device: torch.device) -> int:
    """Return the number of the last perturbation that a device ran for this thread. Synchronizes with the device."""
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
    """Write w + sign e into `live`; with sign +1, save w first."""
    if not live:
        return
    op, num_groups = "perturb_", scale.numel()
    if sign not in (1, -1):
        raise RuntimeError(f"{op}: sign is {sign}, not 1 or -1")
    check_count(len(adaptive), (op, "adaptive"), num_groups)
    lists = (LIVE, "live", live), (SAVED, "saved", saved), (GRADS, "grads", grads)
    rows = Rows(op, groups, num_groups, *lists, adaptive=adaptive)
    if rows.empty:
        return
    _numbers(scale, (op, "scale"), rows.device, num_groups)
    with guard(rows.device):
        table = rows.table()
        launch_perturb(rows.dtype, table, scale, sign, stochastic, *_launches.next(rows.device))


def fd_gram(grads: Sequence[Any], groups: Sequence[int], num_groups: int, weights: Sequence[Tensor | None]) -> Tensor:
    """Return the Gram matrix of the gradient and its differences, per group."""
    op = "fd_gram"
    passes = _columns(grads, len(groups), (op, "grads"))
    check_count(len(passes), (op, "grads"), PASSES)
    rows = Rows(op, groups, num_groups, *_gradients(passes), optional=((SAVED, "weights", weights),), weighted=True)
    if rows.empty:
        return torch.zeros(num_groups, GRAM, dtype=torch.float64, device=rows.device)
    with guard(rows.device):
        table = rows.table()
        gram = table.partial.new_empty(num_groups, GRAM)
        launch_fd_gram(rows.dtype, table, gram)
    return gram


def fd_combine_(
    out: Sequence[Tensor],
    grads: Sequence[Any],
    groups: Sequence[int],
    num_groups: int,
    weights: Sequence[Tensor | None],
    pass_weights: Tensor,
    factor: Tensor,
) -> Tensor:
    """Write the regularized gradient, times a factor, into `out`, and return the same as `fd_gram`."""
    op = "fd_combine_"
    passes = _columns(grads, len(groups), (op, "grads"))
    check_count(len(passes), (op, "grads"), PASSES)
    lists = (LIVE, "out", out), *_gradients(passes)
    rows = Rows(op, groups, num_groups, *lists, optional=((SAVED, "weights", weights),), weighted=True)
    check_tensor(pass_weights, (op, "pass_weights"), rows.device, torch.float64, (PASSES - 1) * num_groups)
    decision = _decision(rows, pass_weights, factor)
    if rows.empty:
        return torch.zeros(num_groups, GRAM, dtype=torch.float64, device=rows.device)
    with guard(rows.device):
        table = rows.table()
        gram = table.partial.new_empty(num_groups, GRAM)
        launch_fd_combine(rows.dtype, table, decision, gram)
    return gram


def fd_direction_(
    out: Sequence[Tensor],
    grads: Sequence[Any],
    groups: Sequence[int],
    pass_weights: Tensor,
    factor: Tensor,
    ok: Tensor,
) -> None:
    """Write the sharpness direction, times a factor, into `out`."""
    if not out:
        return
    op = "fd_direction_"
    passes = _columns(grads, len(groups), (op, "grads"))
    check_count(len(passes), (op, "grads"), PASSES)
    lists = *_gradients(passes), (DIRECTION, "out", out)
    rows = Rows(op, groups, pass_weights.numel() // (PASSES - 1), *lists)
    check_tensor(ok, (op, "ok"), rows.device, torch.bool, 1)
    if rows.empty:
        return
    decision = _decision(rows, pass_weights, factor)
    with guard(rows.device):
        launch_fd_direction(rows.dtype, rows.table(), decision, ok.view(torch.uint8))


def coefficients(
    gram: Tensor | None,
    squared_norms: Sequence[Tensor],
    scale: Tensor,
    alpha: Tensor,
    beta: Tensor,
    counters: Tensor,
    taken: Sequence[Tensor],
    part: Sequence[Tensor],
    regularizer: str,
    losses: Sequence[Tensor],
    grad_scale: Tensor | None,
    max_regularizer_ratio: float,
    max_grad_norm: float,
) -> tuple[Tensor, ...]:
    """Return pass_weights, numbers and flags, and advance the counters."""
    op, device, groups = "coefficients", alpha.device, alpha.numel()
    if regularizer not in REGULARIZERS:
        raise RuntimeError(f"{op}: unknown regularizer {regularizer}")
    check_count(len(part), (op, "part"), len(taken))
    check_tensor(counters, (op, "counters"), device, torch.int64, 4)
    if gram is not None:
        _numbers(gram, (op, "gram"), device, GRAM * groups)
    for i, norm in enumerate(squared_norms):
        _numbers(norm, (op, "squared_norms", i), device, groups)
    for name, tensor in (("scale", scale), ("alpha", alpha), ("beta", beta)):
        _numbers(tensor, (op, name), device, groups)
    if losses:
        check_count(len(losses), (op, "losses"), 3)
    for i, loss in enumerate(losses):
        _numbers(loss, (op, "losses", i), device, 1)
    if grad_scale is not None:
        _numbers(grad_scale, (op, "grad_scale"), device, 1)
    for i, (steps, taking) in enumerate(zip(taken, part, strict=True)):
        check_tensor(steps, (op, "taken", i), device, torch.float32, steps.numel())
        check_tensor(taking, (op, "part", i), device, torch.float32, steps.numel())
    pass_weights, numbers = alpha.new_empty(PASSES - 1, groups), alpha.new_empty(4)
    flags = alpha.new_empty(2, dtype=torch.bool)
    with guard(device):
        launch_coefficients(
            gram, squared_norms, scale, alpha, beta, losses, grad_scale, counters, taken, part, max_regularizer_ratio,
            max_grad_norm, regularizer, pass_weights, numbers, flags.view(torch.uint8),
        )  # fmt: skip
    return pass_weights, numbers, flags


def _decision(rows: Rows, pass_weights: Tensor, factor: Tensor | None) -> Decision:
    _numbers(pass_weights, (rows.op, "pass_weights"), rows.device, pass_weights.numel())
    return Decision(pass_weights, _number(factor, (rows.op, "factor"), rows.device))


def _options(rows: Rows, options: Sequence[float], tensors: Sequence[Tensor | None]) -> Tensor:
    """Return the options of all groups on the device, WORDS words each."""
    check_count(len(tensors), (rows.op, "option_tensors"), len(options))
    words: list[float] = []
    for i, (value, tensor) in enumerate(zip(options, tensors, strict=True)):
        if tensor is None:
            words += (0, 0, value, 1 - value)
            continue
        wide = tensor.dtype == torch.float64
        dtype = torch.float64 if wide else torch.float32
        check_tensor(tensor, (rows.op, "option_tensors", i), rows.device, dtype, 1)
        words += (0, tensor.data_ptr(), 0, 0) if wide else (tensor.data_ptr(), 0, 0, 0)
    content = struct.pack("qqdd" * len(options), *words)
    return _cache.get(("options", content), rows.device, lambda: content, lambda table: table.view(torch.int64))


def _gradients(passes: Sequence[Sequence[Tensor]]) -> list[_List]:
    """Return the lists of gradients, by pass."""
    return [(*where, grads) for where, grads in zip(_GRADS, passes, strict=False)]


def _check_passes(op: str, passes: Sequence[Any]) -> None:
    if len(passes) not in (1, PASSES):
        raise RuntimeError(f"{op}: grads has {len(passes)} entries, not 1 or {PASSES}")


def step_(
    live: Sequence[Tensor],
    saved: Sequence[Tensor],
    state: Sequence[Any],
    grads: Sequence[Any],
    groups: Sequence[int],
    steps: Sequence[Tensor],
    rule: str,
    options: Sequence[float],
    option_tensors: Sequence[Tensor | None],
    pass_weights: Tensor,
    factor: Tensor | None,
    ok: Tensor,
    direction: Sequence[Tensor] = (),
    direction_weight: Tensor | None = None,
) -> None:
    """Apply an update rule."""
    if not live:
        return
    op = "step_"
    shape = RULES.get(rule)
    if shape is None:
        raise RuntimeError(f"{op}: unknown rule {rule}")
    buffers, passes = _columns(state, len(live), (op, "state")), _columns(grads, len(live), (op, "grads"))
    check_count(len(buffers), (op, "state"), shape.buffers)
    _check_passes(op, passes)
    num_groups = pass_weights.numel() // (PASSES - 1)
    added = _directions(direction, direction_weight)
    lists = (LIVE, "live", live), (SAVED, "saved", saved), *_gradients(passes), *added
    optional = [(*where, buffer) for where, buffer in zip(_STATE, buffers, strict=False)]
    rows = Rows(op, groups, num_groups, *lists, optional=optional, steps=steps)
    _number(direction_weight, (op, "direction_weight"), rows.device)
    check_tensor(ok, (op, "ok"), rows.device, torch.bool, 1)
    check_count(len(options), (op, "options"), num_groups * shape.options)
    if rows.empty:
        return
    decision = _decision(rows, pass_weights, factor)
    with guard(rows.device):
        own = _options(rows, options, option_tensors)
        sound = ok.view(torch.uint8)
        launch_step(rule, rows.dtype, rows.table(), own, decision, sound, direction_weight, len(passes))


def combine_(
    live: Sequence[Tensor],
    saved: Sequence[Tensor],
    earlier: Sequence[Any],
    last: Sequence[Tensor],
    groups: Sequence[int],
    pass_weights: Tensor,
    factor: Tensor | None,
    direction: Sequence[Tensor] = (),
    direction_weight: Tensor | None = None,
) -> None:
    """Write the regularized gradient over the last gradient, and w into `live`."""
    if not live:
        return
    op = "combine_"
    passes = [*_columns(earlier, len(live), (op, "earlier")), last]
    _check_passes(op, passes)
    added = _directions(direction, direction_weight)
    lists = (LIVE, "live", live), (SAVED, "saved", saved), *_gradients(passes), *added
    rows = Rows(op, groups, pass_weights.numel() // (PASSES - 1), *lists)
    _number(direction_weight, (op, "direction_weight"), rows.device)
    if rows.empty:
        return
    decision = _decision(rows, pass_weights, factor)
    with guard(rows.device):
        launch_combine(rows.dtype, rows.table(), decision, direction_weight, len(passes))
