"""Flat buffers: parameters and optimizer state are views of a few long tensors, gradients stay where autograd put them.

A :class:`Bucket` holds all parameters of one device and dtype in one 1-D tensor. Each parameter has a 16-byte aligned
segment and keeps its shape and dense strides (channels_last included). w and every buffer of the optimizer state are
further flat tensors with the same offsets. Gradients are not flattened: autograd provides a new tensor per parameter
and pass for free, whereas accumulating into a flat buffer costs a fill and a read-modify-write.

A parameter whose memory may be shared is not moved into the flat tensor; it stays *in place*. If its memory has no gaps
and it is too large to share a row, operators use this memory directly as a row. Otherwise they use its segment of the
flat tensor, which *mirrors* the parameter: the parameter is copied into the segment before the operators run, and back
afterwards. So the rows, and the rounding of sums over rows, do not depend on where parameters are stored. State tensors
that are part of a larger storage are mirrored in the same way. The local shard of a DTensor always stays in place. For
a DTensor, "the shape and the memory of the parameter" means those of its local shard.

Operators work on *rows*, contiguous runs of these tensors. A large parameter is one row. Small neighbors share a row,
and their gradients are gathered into it. The set of participating parameters can change from step to step (frozen
layers, branches that are not taken), so a :class:`Plan` is built for each set and cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ._compat import fully_sharded, is_fsdp_flat, local_tensors, makes_gradients_anew, segment, storage_is_shared
from .ops import Operators, scalar
from .precision import PRECISIONS, compute_dtype, has_master
from .sharded_state import OwnPlan, StateShards
from .shards import (
    as_shard_of,
    check_placements,
    check_state,
    flattened,
    groups_of,
    is_sharded,
    local,
    local_gradient,
    placed_alike,
    sum_over,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ALIGNMENT", "FlatParameters", "Gradients", "StateLayout", "check_parameter"]

ALIGNMENT = 16  #: in bytes: the width of the widest load of a GPU
_MAX_CONSTANTS = 64  # maximum number of tuples of numbers cached on the device
_MAX_PLANS = 64  # maximum number of cached plans: randomly dropped layers keep producing new sets of participants

Gradients = Sequence[Tensor | None]  # one per slot of a bucket, with the shape and strides of the parameter


class StateLayout:
    """Which state of a base optimizer is stored in flat buffers."""

    #: Whether the state of a parameter contains its step counter, as "step".
    counts_steps: ClassVar[bool] = False
    #: Whether the mere presence of state affects later steps, because it indicates an earlier step.
    shows_steps: bool = False
    #: For each group the names of the model-size buffers of its parameters; None if no state is flat.
    buffers: Sequence[tuple[str, ...]] | None

    def steps_taken(self, state: Mapping[str, Any]) -> float:
        """Return how many steps the parameter with this state has taken; called if the state has no counter."""
        return 0.0


@dataclass(eq=False)
class Slot:
    """The location of one parameter in its bucket; for a DTensor, the location of its local shard."""

    param: Tensor
    local: Tensor  # the parameter, or its local shard
    group: int
    index: int
    offset: int
    live_offset: int  # offset of its segment of ``live``; a row that is in place has no such segment
    own_offset: int  # offset in the buffers of the state, if ranks share the state
    shape: torch.Size
    stride: tuple[int, ...]
    numel: int
    dtype: torch.dtype
    nbytes: int
    joins: bool  # whether it can share a row with neighbors
    home: Tensor | None = None  # the memory of a parameter that stays in place
    place: tuple[Any, ...] = ()
    views: dict[str, Tensor] = field(default_factory=dict)  # the tensors for the optimizer's state, by name
    published: bool = False  # whether the optimizer's state contains the views

    @property
    def is_row(self) -> bool:
        """Whether the parameter stays in place and its own memory is the row."""
        return self.home is not None and not self.joins and self.matches_layout(self.home)

    def live(self, flat: Tensor) -> Tensor:
        """Return the tensor that operators write as the parameter, in the shape of the parameter."""
        return self.home if self.is_row else self._segment(flat, self.live_offset)  # type: ignore[return-value]

    def locate(self) -> None:
        """Record the current memory of the parameter."""
        self.local = local(self.param)
        self.place = _place(self.local)
        if self.home is not None:
            self.home = self.local.data

    def view(self, flat: Tensor) -> Tensor:
        """Return the parameter's segment of a tensor with the offsets of ``saved``, in its shape and strides."""
        return self._segment(flat, self.offset)

    def _segment(self, flat: Tensor, offset: int) -> Tensor:
        return segment(flat, offset, self.numel).as_strided(self.shape, self.stride)

    def as_gradient(self, g: Tensor) -> Tensor:
        """Convert a gradient for ``p.grad``.

        The dtype becomes the parameter's ``grad_dtype`` if it has one. For a DTensor, the result is a DTensor.
        """
        dtype = getattr(self.param, "grad_dtype", None)
        return as_shard_of(self.param, g if dtype is None else g.to(dtype))

    def part(self, flat: Tensor) -> Tensor:
        """Return the parameter's segment for the optimizer's state: a DTensor if the parameter is one."""
        return as_shard_of(self.param, self.view(flat))

    def lay_out(self, values: Tensor) -> Tensor:
        """Return ``values`` in the memory order of the parameter, as a copy if the order differs."""
        if self.matches_layout(values):
            return values
        return torch.empty_strided(self.shape, self.stride, dtype=values.dtype, device=values.device).copy_(values)

    def matches_layout(self, tensor: Tensor) -> bool:
        """Return whether ``tensor`` has the same memory order as the parameter, without gaps."""
        if tensor.stride() == self.stride:
            return True
        pairs = zip(self.shape, tensor.stride(), self.stride, strict=True)
        return all(a == b for size, a, b in pairs if size > 1)


@dataclass(eq=False)
class Row:
    """A contiguous run of a bucket's tensors: one large slot, or several small neighbors."""

    slots: list[Slot]
    staging: dict[int, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)

    @property
    def start(self) -> int:
        return self.slots[0].offset

    @property
    def stop(self) -> int:
        return self.slots[-1].offset + self.slots[-1].numel

    def of(self, flat: Tensor) -> Tensor:
        """Return the row of a tensor with the offsets of ``saved``."""
        return flat[self.start : self.stop]

    def live(self, flat: Tensor) -> Tensor:
        """Return the row of ``live``, or the memory of a parameter that stays in place."""
        first = self.slots[0]
        if first.is_row:
            assert first.home is not None
            return first.home.as_strided((first.numel,), (1,))
        return flat[first.live_offset : first.live_offset + self.stop - self.start]

    def gather(self, grads: Gradients, index: int) -> Tensor:
        """Return the gradient of pass ``index`` over the row; a missing gradient counts as zero."""
        members = [grads[slot.index] for slot in self.slots]
        if len(members) == 1 and members[0] is not None:
            return flattened(members[0])
        if index not in self.staging:
            like = self.slots[0].param
            row = torch.zeros(self.stop - self.start, dtype=like.dtype, device=like.device)
            parts = [row.as_strided(s.shape, s.stride, s.offset - self.start) for s in self.slots]
            self.staging[index] = row, parts
        row, parts = self.staging[index]
        given = [(part, g) for part, g in zip(parts, members, strict=True) if g is not None]
        if len(given) < len(parts):
            row.zero_()
        if given:
            torch._foreach_copy_([part for part, _ in given], [g for _, g in given])
        return row


class Plan:
    """The rows of a bucket for one set of participating parameters, ``slots``.

    Slots without elements (empty shards) belong to no row.
    """

    live: Sequence[Tensor]
    _own: OwnPlan | None

    def __init__(self, bucket: Bucket, slots: list[Slot], rows: list[Row]) -> None:
        Column, self.slots, self.rows = bucket.host.Column, slots, rows
        self._column, self._flat = Column, bucket.live
        self.groups = bucket.host.Groups(row.slots[0].group for row in rows)
        self.locate()
        self.saved = Column(row.of(bucket.saved) for row in rows)
        self.unweighted = Column([None] * len(rows))
        self.buffers: dict[str, list[Any]] = {
            name: Column(row.of(flat) if name in row.slots[0].views else None for row in rows)
            for name, flat in bucket.buffers.items()
            if bucket.shards is None or name in bucket.kept
        }
        self.published = False
        # Whether small parameters share a 1-D row, into which their gradients are gathered.
        self._gathers = bucket.gather_below > 0
        self._all_slots = len(rows) == len(bucket.slots)  # one row per slot, so they have the same order
        if bucket.steps is not None:
            mask = torch.zeros(len(bucket.slots), dtype=torch.float32, device="cpu")
            mask[[slot.index for slot in slots]] = 1
            self.mask = mask.to(bucket.steps.device)
            # Rows with the same history share one tensor object, so that operators can compare counters by identity.
            # Kernels do not need this and read the counter of each row.
            key = bucket.history if self._gathers else range(len(bucket.slots))
            numbers = {row: key[row.slots[0].index] for row in rows}
            counters = {number: bucket.steps[row.slots[0].index] for row, number in numbers.items()}
            self.steps = Column(counters[numbers[row]] for row in rows)
        self._bucket = bucket

    @property
    def own(self) -> OwnPlan | None:
        """The part of the plan that this rank updates; None if it updates all of it."""
        if self._own is None and self._bucket.shards is not None:
            self._own = OwnPlan(self, self._bucket, self._bucket.shards)
        return self._own

    def locate(self) -> None:
        """Record the current memory of the parameters."""
        self._own = None
        self.live = self._column(row.live(self._flat) for row in self.rows)
        self.params = self._column(slot.param for slot in self.slots)
        slots = [slot for row in self.rows for slot in row.slots if not slot.is_row]
        mirrored = [(slot.home, slot.live(self._flat)) for slot in slots if slot.home is not None]
        self._homes, self._mirrors = [home for home, _ in mirrored], [mirror for _, mirror in mirrored]

    def pull(self) -> None:
        """Copy mirrored parameters into their mirrors."""
        if self._homes:
            torch._foreach_copy_(self._mirrors, self._homes)

    def push(self) -> None:
        """Copy the mirrors back into the parameters."""
        if self._homes:
            torch._foreach_copy_(self._homes, self._mirrors)

    def gather(self, grads: Gradients, index: int) -> Sequence[Tensor]:
        """Return the rows of the gradients of pass ``index``."""
        if self._all_slots and not self._gathers and isinstance(grads, self._column):
            return grads
        if not self._gathers:
            members: list[Any] = [grads[row.slots[0].index] for row in self.rows]
            if all(g is not None for g in members):
                return self._column(g if g.is_contiguous() else flattened(g) for g in members)
        return self._column(row.gather(grads, index) for row in self.rows)

    def scatter(self, rows: Sequence[Tensor]) -> None:
        """Set the gradient of each parameter to its part of ``rows``."""
        for row, g in zip(self.rows, rows, strict=True):
            for slot in row.slots:
                offset = g.storage_offset() + slot.offset - row.start
                slot.param.grad = slot.as_gradient(g.as_strided(slot.shape, slot.stride, offset))


class Bucket:
    """All parameters of one device and dtype that are sharded over the same ranks. See the module's docstring.

    Attributes:
        sharded_over: the process groups over which the parameters are sharded.
        slots: the parameters in memory order: by group, small parameters first.
        points: [1 or 2, elements]: the parameters that the model reads and, if there are two points, w - e beside them.
        live: the first point.
        saved: w in the compute dtype; a master copy for float16 and bfloat16 if the update is computed here.
        buffers: the optimizer's buffers by name, in the compute dtype.
        kept: the names of the buffers that do not belong to the base optimizer.
        shards: which part of the base optimizer's buffers this rank stores; None for all of them.
        steps: float32, the number of steps of each slot; None if another optimizer computes the update.
        history: a number for each slot; slots that took part in the same steps, and so have equal counters, share it.
    """

    def __init__(
        self,
        members: list[tuple[Tensor, int]],
        layout: StateLayout,
        operators: Operators,
        num_points: int,
        stays: Callable[[Tensor], bool],
        kept: Sequence[str] = (),
        shards: StateShards | None = None,
    ) -> None:
        first = members[0][0]
        self.device, self.dtype = first.device, first.dtype
        self.host, self.gather_below, self._selects = operators.host, operators.gather_below, operators.selects
        align = ALIGNMENT // first.element_size()
        self.slots: list[Slot] = []
        self.shards = shards
        offset = live_offset = own_offset = 0
        self.sharded_over = groups_of(first)
        found = [(param, local(param), group) for param, group in members]
        for param, here, group in sorted(found, key=lambda m: (m[2], m[1].numel() >= self.gather_below)):
            stride = torch.empty_like(here, device="meta").stride()  # dense, in the parameter's own order
            numel, nbytes = here.numel(), here.numel() * here.element_size()
            index, joins = len(self.slots), numel < self.gather_below
            slot = Slot(
                param, here, group, index, offset, live_offset, own_offset, here.shape, stride, numel, param.dtype,
                nbytes, joins,
            )  # fmt: skip
            if stays(param):
                slot.home = here.data
            self.slots.append(slot)
            length = -(-numel // align) * align
            offset += length
            if shards is not None:
                start, stop = shards.owned(slot)
                own_offset += -(-(stop - start) // align) * align
            if num_points > 1 or not slot.is_row:
                live_offset += length

        def flat(length: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(length, dtype=dtype, device=self.device)

        wide = compute_dtype(self.dtype)
        self.points = torch.zeros(num_points, live_offset, dtype=self.dtype, device=self.device)
        self.live, self.saved = self.points[0], flat(offset, wide)
        self.kept = tuple(kept)
        names = {name for slot in self.slots for name in self._names(slot, layout)}
        self.buffers = {
            name: flat(offset if shards is None or name in kept else own_offset, wide) for name in sorted(names)
        }
        self.steps = None if layout.buffers is None else flat(len(self.slots), torch.float32)
        self.history: list[float] = []
        self._counted: list[float] = []  # the result of _counters() after the last step
        #: State that stays in the user's memory, with its mirror.
        self.theirs: list[tuple[Tensor, Tensor]] = []
        self.params = self.host.Column(slot.param for slot in self.slots)
        #: The local shards of DTensors, as tensors of this object; their ``grad`` has no other use.
        self.local_params: Any = None
        #: Gradients of the first pass, and the DTensors that go back to ``p.grad`` for them.
        self.given: tuple[Gradients, list[Tensor]] | None = None
        self.is_sharded = any(map(is_sharded, self.params))
        self.all_active = (True,) * len(self.slots)
        #: Whether every ``p.grad`` accepts a gradient without conversion.
        self.takes_gradients = not self.is_sharded and all(
            getattr(p, "grad_dtype", None) in (None, self.dtype) for p in self.params
        )
        self._plans: dict[tuple[bool, ...], Plan] = {}

    def _names(self, slot: Slot, layout: StateLayout) -> tuple[str, ...]:
        """Return the names of a parameter's flat buffers."""
        return (*(() if layout.buffers is None else layout.buffers[slot.group]), *self.kept)

    @property
    def has_master(self) -> bool:
        """Whether ``saved`` is wider than the parameters and persists between steps."""
        return has_master(self.dtype)

    def beside(self, row: Row) -> Tensor:
        """Return the row at w - e, the second point."""
        return self.points[1, row.slots[0].live_offset :][: row.stop - row.start]

    def stacked(self, slot: Slot) -> Tensor:
        """Return all points of a parameter: [points, *shape]."""
        strides = (self.points.stride(0), *slot.stride)
        points = self.points.as_strided((len(self.points), *slot.shape), strides, slot.live_offset)
        if slot.is_row:
            points[0] = slot.local.detach()
        return points

    def adopt(self, state: Mapping[Tensor, dict[str, Any]], layout: StateLayout, moved: Mapping[Tensor, int]) -> None:
        """Move parameters and state into the flat buffers, and make them views of these buffers."""
        for slot in self.slots:
            saved = slot.view(self.saved)
            if slot.home is None:
                live = slot.live(self.live)
                live.copy_(slot.param.detach())
                slot.param.data = live
            slot.locate()
            slot.views = {name: self._view(slot, name) for name in self._names(slot, layout)}
            if self.steps is not None and self.has_master:
                saved.copy_(slot.local.detach())
                slot.views["master_param"] = slot.part(self.saved)
            if self.steps is not None and layout.counts_steps:
                slot.views["step"] = segment(self.steps, slot.index, 1).reshape(())
            kept = state.get(slot.param, {})
            for name, view in slot.views.items():
                if kept.get(name) is not None:
                    slot.views[name] = kept[name] = self._take_over(slot, name, kept[name], view, moved)
            self._count(slot, kept, layout)
            if kept and slot.views:
                kept.pop("master_param", None)
                kept.update(slot.views)
                slot.published = True
        self._locate_local()
        self.history = [] if self.steps is None else self.steps.tolist()
        self._counted = self._counters()

    def _view(self, slot: Slot, name: str) -> Tensor:
        """Return the part of a flat buffer that belongs to the state of a parameter."""
        if self.shards is None or name in self.kept:
            return slot.part(self.buffers[name])
        return self.shards.part(slot, self.buffers[name])

    def _count(self, slot: Slot, kept: Mapping[str, Any], layout: StateLayout) -> None:
        if self.steps is not None and not layout.counts_steps:
            self.steps[slot.index] = layout.steps_taken(kept)

    def recount(self, state: Mapping[Tensor, dict[str, Any]], layout: StateLayout) -> None:
        """Read the number of steps of each parameter again, after the values of its state were replaced in place."""
        for slot in self.slots:
            self._count(slot, state.get(slot.param, {}), layout)
        self.history = [] if self.steps is None else self.steps.tolist()
        self._plans.clear()

    def _take_over(self, slot: Slot, name: str, given: Any, view: Tensor, moved: Mapping[Tensor, int]) -> Tensor:
        """Copy a value of the state into ``view``, a part of a flat buffer, and return the tensor for the state.

        A given tensor stays the same object if possible, because its owner may still read it.
        """
        value = scalar(given)
        if value.shape != view.shape:
            raise ValueError(
                f"state {name!r} has shape {tuple(value.shape)} but its parameter has shape {tuple(view.shape)}: "
                "a parameter that changes shape needs a new optimizer"
            )
        if self.shards is not None and is_sharded(view) and not is_sharded(value):
            value = self.shards.own_part_of(slot, value)
        else:
            check_state(name, value, view)
        local(view).copy_(local(value))
        if is_sharded(view):
            return view
        if not isinstance(given, Tensor) or (given.dtype, given.device) != (view.dtype, view.device):
            return view
        if given.requires_grad or given.is_inference() or type(given) is not Tensor:
            return view
        if _is_held_by_others(given, moved):
            self.theirs.append((given, view))
        else:
            given.data = view
        return given

    def pull_state(self) -> None:
        """Copy state in the user's memory into its mirrors, and check whether the user changed the step counters."""
        for theirs, view in self.theirs:
            view.copy_(theirs)
        if self.steps is not None and self._counters() != self._counted:
            self.history = _numbered(zip(self.history, self.steps.tolist(), strict=True))
            self._plans.clear()

    def push_state(self) -> None:
        """Copy the mirrors back into the state in the user's memory."""
        for theirs, view in self.theirs:
            theirs.copy_(view)
        self._counted = self._counters()

    def _counters(self) -> list[float]:
        """Return a value that changes if the user changes the step counters; empty if no rows are shared.

        It consists of the counters or, if reading them would synchronize, of the versions of the tensors in the state.
        Operators do not write through these tensors, so only the user changes their versions.
        """
        if self.steps is None or not self.gather_below:
            return []
        if not self._selects(self.steps):
            return self.steps.tolist()
        return [slot.views["step"]._version for slot in self.slots if "step" in slot.views]

    def locate(self) -> None:
        """Record the current memory of the parameters."""
        self.params = self.host.Column(slot.param for slot in self.slots)
        self._locate_local()
        for plan in self._plans.values():
            plan.locate()

    def _locate_local(self) -> None:
        if self.is_sharded:
            self.local_params = self.host.Column(slot.local for slot in self.slots)

    def places(self) -> Any:
        """Return the addresses and layouts of the parameters, as a value to compare."""
        return self.host.places(self.host.Column(local_tensors(self.params)) if self.is_sharded else self.params)

    def of_groups(self, flat: Tensor) -> dict[int, Tensor]:
        """Return the part of each group in a tensor with the offsets of ``saved``, including the gaps, which are 0."""
        spans: dict[int, tuple[int, int]] = {}
        for slot in self.slots:
            start, _ = spans.get(slot.group, (slot.offset, 0))
            spans[slot.group] = start, slot.offset + slot.numel
        return {group: flat[start:stop] for group, (start, stop) in spans.items()}

    def plan(self, active: tuple[bool, ...]) -> Plan:
        """Return the rows of the ``active`` slots."""
        if active not in self._plans:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            if self.steps is not None and self.gather_below:
                self._split_histories(active)
            slots = [slot for slot in self.slots if active[slot.index]]
            self._plans[active] = Plan(self, slots, list(self._rows(slots)))
        return self._plans[active]

    def _split_histories(self, active: tuple[bool, ...]) -> None:
        """Separate the histories of active and inactive slots; clear the plans if a history was split."""
        history = _numbered(zip(self.history, active, strict=True))
        if len(set(history)) > len(set(self.history)):
            self._plans.clear()
        self.history = history

    def _rows(self, slots: list[Slot]) -> Iterator[Row]:
        row: Row | None = None
        for slot in slots:
            if not slot.numel:
                continue
            if row is not None and self._joins(slot, row.slots[-1]):
                row.slots.append(slot)
                continue
            if row is not None:
                yield row
            row = Row([slot])
        if row is not None:
            yield row

    def _joins(self, slot: Slot, last: Slot) -> bool:
        return (
            slot.index == last.index + 1
            and slot.group == last.group
            and slot.joins
            and last.joins
            and (self.steps is None or self.history[slot.index] == self.history[last.index])
        )

    def publish(self, plan: Plan, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Add the buffers of the plan's parameters to the optimizer's state."""
        for slot in plan.slots:
            if slot.views:
                state[slot.param].update(slot.views)
                slot.published = True
        plan.published = True


class FlatParameters:
    """All buckets of an optimizer.

    Args:
        param_groups: groups of the optimizer. Adopts parameters that require a gradient, have a gradient or have state.
        state: state of the optimizer; its values are copied into the flat buffers.
        layout: which state is flat.
        operators: the operators that will process the rows.
        num_points: the number of points that are evaluated at once, 1 or 2.
        flatten: move every parameter whose memory is not shared; if False, all parameters stay in place.
        moved: parameters and state that are already in flat buffers, with their addresses.
        kept: names of model-size buffers in the state that do not belong to the base optimizer.
        share_state: the ranks that share the base optimizer's state; None if each rank stores all of it.
    Raises:
        ValueError: if a parameter cannot be optimized; the message gives the reason.
    """

    def __init__(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        layout: StateLayout,
        operators: Operators,
        num_points: int = 1,
        flatten: bool = True,
        moved: Mapping[Tensor, int] | None = None,
        kept: Sequence[str] = (),
        share_state: ProcessGroup | None = None,
    ) -> None:
        moved = moved or {}
        self.num_points = num_points
        self._host = operators.host
        self.published = False  # whether the state contains all buffers that the last update used
        self._layout = layout
        members: dict[Any, list[tuple[Tensor, int]]] = {}
        for group, param in _members(param_groups):
            if _wanted(param, state):
                check_parameter(param)
                _check_memory(param)
                # A bucket holds either plain tensors or DTensors, even if the DTensors are replicated on all ranks.
                key = param.device, param.dtype, groups_of(param), is_sharded(param)
                members.setdefault(key, []).append((param, group))
        _check_sharing([param for bucket in members.values() for param, _ in bucket])

        def stays(tensor: Tensor) -> bool:
            return not flatten or is_sharded(tensor) or _is_held_by_others(tensor, moved)

        self.buckets = [
            Bucket(
                bucket, layout, operators, num_points, stays, kept,
                None if share_state is None else StateShards(share_state, bucket[0][0].device),
            )
            for bucket in members.values()
        ]  # fmt: skip
        self._slots = {slot.param: slot for bucket in self.buckets for slot in bucket.slots}
        self._bucket_of = {slot: index for index, bucket in enumerate(self.buckets) for slot in bucket.slots}
        self._moved_in_step: set[Slot] = set()  # slots whose parameter was re-pointed since the step began
        self._copies: dict[tuple[Slot, int], Tensor] = {}
        self._constants: dict[tuple[float, ...], Tensor] = {}
        for bucket in self.buckets:
            bucket.adopt(state, layout, moved)
        self.is_sharded = any(bucket.is_sharded for bucket in self.buckets)
        #: The groups of fully_shard that gather parameters of this optimizer.
        self._gathered = fully_sharded(self._slots) if self.is_sharded else []
        #: Parameters whose gradients get new memory from fully_shard in every backward.
        self._own_gradients = {
            member.sharded_param
            for group in self._gathered
            if makes_gradients_anew(group)
            for member in group.fsdp_params
        }
        #: Buckets that consist of such parameters only.
        self._own_buckets = {b for b in self.buckets if self._own_gradients.issuperset(b.params)}
        self._places = self._now()
        self._matched: Any = None  # fingerprint of the last parameters and state that matched
        self._outside: list[Tensor] = []  # parameters that are not in any bucket

    def matches(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        layout: StateLayout,
    ) -> bool:
        """Return whether parameters and state are unmoved, and none was added or removed."""
        if (type(layout), layout.buffers) != (type(self._layout), self._layout.buffers):
            return False
        look = self._host.fingerprint([group["params"] for group in param_groups], state)
        if self.is_sharded:
            look = look, self._now()
        if look == self._matched and not any(_wanted(param, state) for param in self._outside):
            return True
        found = 0
        for group, param in _members(param_groups):
            slot = self._slots.get(param)
            if slot is None:
                if _wanted(param, state):
                    return False
                continue
            found += 1
            if slot.group != group or not self._in_place(slot):
                return False
            kept = state.get(param, {})
            if kept and any(kept.get(name) is not view for name, view in slot.views.items()):
                return False
            if slot.published and not kept:
                return False
        if found < len(self._slots):
            return False
        self._matched = look
        self._outside = [param for _, param in _members(param_groups) if param not in self._slots]
        return True

    def moved(self) -> dict[Tensor, int]:
        """Return the parameters and state that are in the flat buffers, with their addresses."""
        elsewhere = {id(theirs) for bucket in self.buckets for theirs, _ in bucket.theirs}
        tensors = [slot.param for slot in self._slots.values() if slot.home is None]
        tensors += [view for slot in self._slots.values() for view in slot.views.values() if id(view) not in elsewhere]
        return {tensor: tensor.data_ptr() for tensor in tensors if not is_sharded(tensor)}

    @staticmethod
    def _in_place(slot: Slot) -> bool:
        return _place(local(slot.param)) == slot.place

    def _now(self) -> list[Any]:
        return [bucket.places() for bucket in self.buckets]

    def find(self, param: Tensor) -> tuple[int, Slot] | None:
        """Return the index of a parameter's bucket, and its slot; None for an unknown parameter."""
        slot = self._slots.get(param)
        return None if slot is None else (self._bucket_of[slot], slot)

    def devices(self) -> set[torch.device]:
        """Return the current devices of the parameters, which change if the model is moved."""
        return {bucket.slots[0].param.device for bucket in self.buckets}

    def recount(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Read all step numbers again; call after state without steps was replaced in place by state with steps."""
        for bucket in self.buckets:
            bucket.recount(state, self._layout)

    def begin_step(self) -> None:
        """Begin a step; call after parameters and state were found unmoved."""
        self._moved_in_step.clear()
        self.forget_given()

    def forget_given(self) -> None:
        """Release the gradients of DTensors, so that clearing ``p.grad`` frees their memory."""
        for bucket in self.buckets:
            bucket.given = None

    def follow(self) -> None:
        """Accept parameters that were re-pointed between two passes, if their values did not change.

        For example, a forward that calls ``flatten_parameters()`` moves the weights of cuDNN. The comparison of values
        synchronizes.

        Raises:
            RuntimeError: if the values, shape, strides, dtype or device of a parameter changed.
        """
        if self._now() == self._places:
            return
        for bucket in self.buckets:
            moved = [slot for slot in bucket.slots if not self._in_place(slot)]
            for slot in moved:
                here = local(slot.param)
                alike = _place(here)[1:] == slot.place[1:] and here.device == bucket.device
                if not alike or not _equal_bits(here.detach(), slot.live(bucket.live)):
                    raise RuntimeError(
                        f"a parameter of shape {tuple(slot.shape)} was moved or changed between the passes of a step; "
                        "call restore() before changing the model, then begin a new step"
                    )
            for slot in moved:
                slot.home = local(slot.param).data
                slot.locate()
                self._moved_in_step.add(slot)
            if moved:
                bucket.locate()
        self._places = self._now()

    def return_to_moved(self, active: Sequence[tuple[bool, ...]]) -> None:
        """Write w into ``active`` parameters that were re-pointed while perturbed, at their current address."""
        for bucket, mask in zip(self.buckets, active, strict=True):
            for slot in bucket.slots:
                has_moved = slot in self._moved_in_step or not self._in_place(slot)
                here = local(slot.param)
                if mask[slot.index] and has_moved and here.shape == slot.shape:
                    here.detach().copy_(slot.view(bucket.saved))

    def check_resharded(self) -> None:
        """Raise RuntimeError if fully_shard still holds gathered parameters, which a perturbation would not change."""
        if any(group.is_unsharded for group in self._gathered):
            raise RuntimeError(
                "fully_shard kept its gathered parameters after backward and would not see the perturbation: leave "
                "set_reshard_after_backward(True) in place, at least for the last micro-batch of each pass"
            )

    @property
    def is_gathered(self) -> bool:
        """Whether fully_shard manages any of the parameters."""
        return bool(self._gathered)

    def total(self, parts: Sequence[Tensor | None], shape: tuple[int, ...]) -> Tensor:
        """Sum one tensor per bucket over the buckets and over the ranks with other shards.

        Args:
            parts: float64, for each bucket; None if none of its elements take part on this rank.
            shape: shape of the sum.
        Returns:
            The sum, on the device of the first bucket.
        """
        return self.totals([parts], shape)[0]

    def totals(self, parts: Sequence[Sequence[Tensor | None]], shape: tuple[int, ...]) -> list[Tensor]:
        """Compute several sums as :meth:`total` does, and reduce them together."""
        home = self.buckets[0].device
        if not self.is_sharded:
            of_each = [[x.to(home, non_blocking=True) for x in part if x is not None] for part in parts]
            return [sum(others, start=first) for first, *others in of_each]
        sums: dict[Any, Tensor] = {}
        for bucket, of_bucket in zip(self.buckets, zip(*parts, strict=True), strict=True):
            zeros = torch.zeros(shape, dtype=torch.float64, device=home)
            stacked = torch.stack([zeros if x is None else x.to(home, non_blocking=True) for x in of_bucket])
            over = bucket.sharded_over
            sums[over] = sums[over] + stacked if over in sums else stacked
        return list(sum_over(sums).unbind())

    def anywhere(self, number: Tensor) -> Tensor:
        """Return the sum of a number over all ranks that have a shard of any parameter."""
        groups = dict.fromkeys(group for bucket in self.buckets for group in bucket.sharded_over)
        return sum_over({tuple(groups): number})

    def constants(self, values: tuple[float, ...]) -> Tensor:
        """Return numbers as a float64 tensor on the device of the first bucket.

        The tensors are cached, because these values rarely change between steps.
        """
        constant = self._constants.pop(values, None)
        if constant is None:
            if len(self._constants) >= _MAX_CONSTANTS:
                del self._constants[next(iter(self._constants))]  # the least recently used one
            constant = torch.tensor(values, dtype=torch.float64, device="cpu")
            constant = constant.to(self.buckets[0].device, non_blocking=True)
        self._constants[values] = constant
        return constant

    def take_gradients(self, index: int, keep: bool, views: bool = False) -> list[Gradients]:
        """Take the gradients of pass ``index`` for each bucket and slot, in the shape and strides of the parameter.

        If possible, a gradient is autograd's own tensor, moved out of ``p.grad``. It is copied in three cases: ``keep``
        leaves it in ``p.grad``; it is a view whose memory the next backward may overwrite (``views`` states that no
        such backward follows); its dtype or memory order differs from that of the parameter.

        Raises:
            RuntimeError: if a gradient is sparse.
        """
        taken = []
        for bucket in self.buckets:
            params, given = bucket.params, [param.grad for param in bucket.params] if bucket.is_sharded else []
            # This may reduce the gradients, so every rank calls it exactly once per gradient.
            here = [None if g is None else local_gradient(p, g) for p, g in zip(params, given, strict=False)]
            grads = None if keep else self._take_as_they_are(bucket, here, views)
            if grads is None:
                pairs = zip(bucket.slots, here or [param.grad for param in params], strict=True)
                grads = [self._take(slot, g, index, keep, views) for slot, g in pairs]
                if not keep:
                    self._host.clear_gradients(list(params))
            elif index == 0 and here:
                columns: Any = zip(params, given, grads, strict=True)
                bucket.given = grads, [x if placed_alike(p, x) else as_shard_of(p, g) for p, x, g in columns]
            taken.append(grads)
        return taken

    def _take_as_they_are(self, bucket: Bucket, here: Sequence[Tensor | None], views: bool) -> Gradients | None:
        """Take the gradients of a bucket out of ``p.grad`` without a copy; if impossible, leave them and return None.

        Args:
            here: for DTensors, the local shard of each gradient.
        """
        grads: Gradients | None
        if not bucket.is_sharded:
            grads = self._host.take_gradients(bucket.params, views)
            return grads
        if any(g is None for g in here):
            return None
        grads = None
        try:  # the host function reads ``grad``
            for param, g in zip(bucket.local_params, here, strict=True):
                param.grad = g
            grads = self._host.take_gradients(bucket.local_params, views or bucket in self._own_buckets)
        except RuntimeError:  # the gradient has another dtype
            pass
        self._host.clear_gradients(list(bucket.local_params if grads is None else bucket.params))
        return grads

    def _take(self, slot: Slot, g: Tensor | None, index: int, keep: bool, views: bool) -> Tensor | None:
        if g is None:
            return None
        if g.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of a parameter of shape {tuple(slot.shape)} is sparse; CRSAM takes dense gradients only"
            )
        if g.requires_grad:  # after backward(create_graph=True)
            g = g.detach()
        ours = views or slot.param in self._own_gradients
        ours = ours or (g.untyped_storage().nbytes() == slot.nbytes and not g._is_view())
        ours = ours and g.dtype == slot.dtype and slot.matches_layout(g)
        # The parameter's own memory is about to be perturbed, so it cannot serve as the gradient.
        ours = ours and (not slot.numel or g.data_ptr() != slot.local.data_ptr())
        if keep or not ours:
            key = (slot, index)
            if key not in self._copies:
                self._copies[key] = torch.empty_strided(slot.shape, slot.stride, dtype=slot.dtype, device=g.device)
            if keep and slot.numel and g.data_ptr() == self._copies[key].data_ptr():  # the last step left it there
                slot.param.grad = as_shard_of(slot.param, g.clone())
            g = self._copies[key].copy_(g)
        return g


def _numbered(keys: Iterable[Any]) -> list[float]:
    """Number the keys; equal keys get the same number."""
    numbers: dict[Any, float] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _place(param: Tensor) -> tuple[Any, ...]:
    return param.data_ptr(), param.shape, param.stride(), param.dtype


def _members(param_groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Tensor]]:
    for index, group in enumerate(param_groups):
        for param in group["params"]:
            yield index, param


def _wanted(param: Tensor, state: Mapping[Tensor, dict[str, Any]]) -> bool:
    if is_lazy(param):
        return param.requires_grad
    return param.numel() > 0 and (param.requires_grad or param.grad is not None or bool(state.get(param)))


def _is_held_by_others(tensor: Tensor, moved: Mapping[Tensor, int]) -> bool:
    """Return whether the memory of a tensor may have other users: it is shared, mapped, or part of a larger storage.

    Args:
        moved: tensors that are in flat buffers, with their addresses.
    """
    storage = tensor.untyped_storage()
    in_flat_buffer = moved.get(tensor) == tensor.data_ptr()
    return (
        storage.nbytes() != tensor.nbytes
        or not (storage.resizable() or in_flat_buffer)  # memory of NumPy, of a file, or of another library
        or (tensor.device.type == "cpu" and storage.is_shared())
        or storage_is_shared(storage)
    )


def _equal_bits(x: Tensor, y: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    if min(x.untyped_storage().nbytes(), y.untyped_storage().nbytes()) < x.nbytes:  # the memory was freed
        return False
    return torch.equal(x.view(integer), y.view(integer))


def check_parameter(param: Tensor) -> None:
    """Raise ValueError if ``param``, which requires a gradient or has one, cannot be optimized."""
    if is_lazy(param):
        return  # the first step checks it
    check_placements(param)
    param = local(param)
    what = f"parameter of shape {tuple(param.shape)}"
    if param.dtype not in PRECISIONS:
        raise ValueError(f"{what} has dtype {param.dtype}; CRSAM takes float64, float32, float16 and bfloat16")
    if param.layout != torch.strided or type(param.data) is not Tensor:
        raise ValueError(
            f"{what} is a {type(param.data).__name__} of layout {param.layout}; CRSAM takes plain strided tensors"
        )
    if is_fsdp_flat(param):
        raise ValueError(
            f"{what} belongs to FullyShardedDataParallel, which moves it in every pass: use "
            "torch.distributed.fsdp.fully_shard instead"
        )
    if any(stride == 0 and size > 1 for size, stride in zip(param.shape, param.stride(), strict=True)):
        raise ValueError(f"{what} is expanded: several of its elements share memory; make it contiguous first")


def _check_memory(param: Tensor) -> None:
    """Raise ValueError if operators cannot work on the parameter's memory."""
    if is_lazy(param):
        raise ValueError("a parameter of a lazy module has no shape yet: run a batch through the model before a step")
    param = local(param)
    what = f"parameter of shape {tuple(param.shape)}"
    if param.device.type == "meta":
        raise ValueError(f"{what} is on the meta device; materialize the model before the first step")
    if param.device.type == "mps":
        raise ValueError(f"{what} is on MPS, which has no float64; CRSAM needs float64 for its sums")
    if param.untyped_storage().nbytes() < param.nbytes:
        raise ValueError(
            f"{what} has no memory: its storage was freed; fill it again before a step (if fully_shard gathered this "
            "parameter, call model.reshard() before you create the optimizer)"
        )


def _check_sharing(params: Iterable[Tensor]) -> None:
    """Raise ValueError if two parameters overlap in memory, because updates of one would overwrite the other."""
    shards = [local(p) for p in params]
    spans = sorted(((str(p.device), p.data_ptr(), p) for p in shards if p.numel()), key=lambda span: span[:2])
    open_ones: list[Tensor] = []  # parameters that may extend into the next one
    for device, start, param in spans:
        open_ones = [p for p in open_ones if str(p.device) == device and start < p.data_ptr() + _extent(p)]
        for other in open_ones:
            if _overlap(other, param):
                raise ValueError(
                    f"parameters of shapes {tuple(other.shape)} and {tuple(param.shape)} share memory without being "
                    "the same object; tie them by assigning one Parameter to both modules (b.weight = a.weight), or "
                    "slice the trained one in forward()"
                )
        open_ones.append(param)


def _extent(param: Tensor) -> int:
    """Return the number of bytes from the first element to the end of the last one."""
    reach = sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True))
    return (1 + reach) * param.element_size()


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors have an element in common; y begins within the extent of x."""
    if _extent(x) == x.nbytes and _extent(y) == y.nbytes:  # without gaps
        return True
    if x.dtype != y.dtype:
        return True  # assume an overlap: interleaved views of two dtypes are very rare
    start = (y.data_ptr() - x.data_ptr()) // x.element_size()
    length = max(_extent(x), start * x.element_size() + _extent(y)) // x.element_size()
    taken = torch.zeros(length, dtype=torch.bool, device="cpu")
    taken.as_strided(x.shape, x.stride()).fill_(True)
    return bool(taken.as_strided(y.shape, y.stride(), start).any())
