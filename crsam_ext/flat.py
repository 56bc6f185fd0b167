"""Flat buffers: parameters and optimizer state as views of a few long tensors, gradients where autograd left them.

A :class:`Bucket` holds all parameters of one device and dtype in one 1-D tensor, each in a 16-byte aligned segment and
with its shape and dense strides (channels_last included); w and every buffer of the optimizer state lie in further flat
tensors with the same offsets. Gradients are not flattened: autograd hands over a fresh tensor per parameter and pass at
no cost, whereas accumulating into a flat buffer costs a fill and a read-modify-write.

Operators work on *rows*, contiguous runs of these tensors. A large parameter is a row; small ones that lie next to each
other share one, into which their gradients are gathered. Which parameters take part can change from step to step
(frozen layers, untaken branches), so a :class:`Plan` is made for each set of participants and kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .ops import AdamOptions, Operators, SGDOptions, compute_dtype

__all__ = ["FlatParameters", "Gradients", "Options", "check_parameter"]

_ALIGNMENT = 16  # bytes: the widest load of a GPU
_MAX_CONSTANTS = 64  # tuples of numbers that are kept on the device
_MAX_PLANS = 64  # sets of participants that are remembered: layers dropped at random make ever new ones
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Options = SGDOptions | AdamOptions | None  # None: another optimizer makes the update and owns its state
Gradients = Sequence[Tensor | None]  # one for each slot of a bucket, shaped and laid out as the parameter


@dataclass(eq=False)
class Slot:
    """Where one parameter lies in its bucket."""

    param: Tensor
    group: int
    index: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    numel: int
    dtype: torch.dtype
    nbytes: int
    pointer: int = 0
    views: dict[str, Tensor] = field(default_factory=dict)  # what belongs into the optimizer's state
    published: bool = False  # whether the state holds the views

    def view(self, flat: Tensor) -> Tensor:
        """The parameter's segment of ``flat``, with its shape and strides.

        It has a storage of its own over that memory: safetensors and Accelerate take tensors of one storage for one
        tied tensor, of which they save one or refuse to save any, and torch.save writes storages whole.
        """
        segment = from_dlpack(flat[self.offset : self.offset + self.numel])
        return segment.as_strided(self.shape, self.stride)

    def lay_out(self, values: Tensor) -> Tensor:
        """``values`` in the memory order of the parameter, a copy where it is another."""
        if self.matches_layout(values):
            return values
        return torch.empty_strided(self.shape, self.stride, dtype=values.dtype, device=values.device).copy_(values)

    def matches_layout(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` has the elements of the parameter in the same memory order, without gaps."""
        if tensor.stride() == self.stride:
            return True
        pairs = zip(self.shape, tensor.stride(), self.stride, strict=True)
        return all(a == b for size, a, b in pairs if size > 1)


@dataclass(eq=False)
class Row:
    """A contiguous run of a bucket's tensors: one large slot, or several small neighbours."""

    slots: list[Slot]
    staging: dict[int, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)

    @property
    def start(self) -> int:
        return self.slots[0].offset

    @property
    def stop(self) -> int:
        return self.slots[-1].offset + self.slots[-1].numel

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.stop]

    def gather(self, grads: Gradients, index: int) -> Tensor:
        """The gradient of pass ``index`` over the row; a pass that gave a parameter none counts as zero there."""
        members = [grads[slot.index] for slot in self.slots]
        if len(members) == 1 and members[0] is not None:
            return _flat(members[0])
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
    """The rows of a bucket for one set of participating parameters."""

    def __init__(self, bucket: Bucket, rows: list[Row]) -> None:
        Column, self.rows = bucket.host.Column, rows
        self.groups = bucket.host.Groups(row.slots[0].group for row in rows)
        self.live = Column(row.of(bucket.live) for row in rows)
        self.saved = Column(row.of(bucket.saved) for row in rows)
        self.unweighted = Column([None] * len(rows))
        self.buffers: dict[str, list[Any]] = {
            name: Column(row.of(flat) if name in row.slots[0].views else None for row in rows)
            for name, flat in bucket.buffers.items()
        }
        self.published = False
        self.params = Column(slot.param for row in rows for slot in row.slots)
        # Whether gradients can be rows as they are: None where rows must be 1-D.
        self._column = Column
        self._gathers = bucket.gather_below > 0
        self._all_slots = len(rows) == len(bucket.slots)  # and so in their order
        if bucket.steps is not None:
            slots = [slot for row in rows for slot in row.slots]
            mask = torch.zeros(len(bucket.slots))
            mask[[slot.index for slot in slots]] = 1
            self.mask = mask.to(bucket.steps.device)
            # One tensor object for all rows with the same history, so that operators can tell by identity.
            by_history = {row: bucket.history[row.slots[0].index] for row in rows}
            counters = {h: bucket.steps[row.slots[0].index] for row, h in by_history.items()}
            self.steps = Column(counters[by_history[row]] for row in rows)

    def gather(self, grads: Gradients, index: int) -> Sequence[Tensor]:
        """Rows of the gradients of pass ``index``."""
        if self._all_slots and not self._gathers and isinstance(grads, self._column):
            return grads
        if not self._gathers:
            members: list[Any] = [grads[row.slots[0].index] for row in self.rows]
            if all(g is not None for g in members):
                return self._column(g if g.is_contiguous() else _flat(g) for g in members)
        return self._column(row.gather(grads, index) for row in self.rows)

    def scatter(self, rows: Sequence[Tensor]) -> None:
        """Make each parameter's part of ``rows`` its gradient."""
        for row, g in zip(self.rows, rows, strict=True):
            for slot in row.slots:
                offset = g.storage_offset() + slot.offset - row.start
                slot.param.grad = g.as_strided(slot.shape, slot.stride, offset)


class Bucket:
    """All parameters of one device and dtype. See the module's docstring.

    Attributes:
        slots: in the order in which they lie in memory: by group, small parameters first.
        points: [1 or 2, elements]: what the model reads and, where asked for, w - e beside it.
        live: the first of these.
        saved: w in the compute dtype, a master copy for float16 and bfloat16 where the update is computed here.
        buffers: the optimizer's buffers by name, in the compute dtype.
        steps: float32, for each slot the steps it has taken; None where another optimizer makes the update.
        history: for each slot a number, equal for slots that have taken part in the same steps and so count alike.
    """

    def __init__(
        self, members: list[tuple[Tensor, int]], options: Sequence[Options], operators: Operators, num_points: int
    ) -> None:
        first = members[0][0]
        self.device, self.dtype = first.device, first.dtype
        self.host, self.gather_below = operators.host, operators.gather_below
        align = _ALIGNMENT // first.element_size()
        self.slots: list[Slot] = []
        offset = 0
        for param, group in sorted(members, key=lambda m: (m[1], m[0].numel() >= self.gather_below)):
            stride = torch.empty_like(param, device="meta").stride()  # dense, in the parameter's own order
            numel, nbytes = param.numel(), param.numel() * param.element_size()
            index = len(self.slots)
            self.slots.append(Slot(param, group, index, offset, param.shape, stride, numel, param.dtype, nbytes))
            offset += -(-param.numel() // align) * align

        def flat(dtype: torch.dtype) -> Tensor:
            return torch.zeros(offset, dtype=dtype, device=self.device)

        wide = compute_dtype(self.dtype)
        self.points = torch.zeros(num_points, offset, dtype=self.dtype, device=self.device)
        self.live, self.saved = self.points[0], flat(wide)
        names = {name for slot in self.slots if (o := options[slot.group]) is not None for name in o.buffers}
        self.buffers = {name: flat(wide) for name in sorted(names)}
        self.steps = None if options[0] is None else torch.zeros(len(self.slots), device=self.device)
        self.history: list[float] = []
        self.params = self.host.Column(slot.param for slot in self.slots)
        self.all_active = (True,) * len(self.slots)
        self._plans: dict[tuple[bool, ...], Plan] = {}

    @property
    def has_master(self) -> bool:
        """Whether ``saved`` is wider than the parameters, and kept from step to step."""
        return self.saved.dtype != self.dtype

    def stacked(self, slot: Slot) -> Tensor:
        """All points of a parameter: [points, *its shape]."""
        strides = (self.points.stride(0), *slot.stride)
        return self.points.as_strided((len(self.points), *slot.shape), strides, slot.offset)

    def adopt(self, state: Mapping[Tensor, dict[str, Any]], options: Sequence[Options]) -> None:
        """Move parameters and state into the flat buffers, and point the parameters at them."""
        for slot in self.slots:
            live, saved = slot.view(self.live), slot.view(self.saved)
            live.copy_(slot.param.detach())
            slot.param.data = live
            slot.pointer = slot.param.data_ptr()
            option = options[slot.group]
            if option is None:
                continue
            assert self.steps is not None
            slot.views = {name: slot.view(self.buffers[name]) for name in option.buffers}
            if self.has_master:
                slot.views["master_param"] = saved.copy_(live)
            if option.counts_steps:
                slot.views["step"] = self.steps[slot.index]
            kept = state.get(slot.param, {})
            for name, view in slot.views.items():
                if kept.get(name) is not None:
                    value = torch.as_tensor(kept[name])
                    if value.shape != view.shape:
                        raise ValueError(
                            f"state {name!r} has shape {tuple(value.shape)} but its parameter has shape "
                            f"{tuple(view.shape)}: a parameter that changes shape needs a new optimizer"
                        )
                    kept[name] = view.copy_(value)
            if kept.get("momentum_buffer") is not None and not option.counts_steps:
                self.steps[slot.index] = 1.0
            if kept:
                kept.pop("master_param", None)
                kept.update(slot.views)
                slot.published = True
        self.history = [] if self.steps is None else self.steps.tolist()

    def plan(self, active: tuple[bool, ...]) -> Plan:
        """The rows for the slots that are ``active``."""
        if active not in self._plans:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            if self.steps is not None:
                self._split_histories(active)
            self._plans[active] = Plan(self, list(self._rows(active)))
        return self._plans[active]

    def _split_histories(self, active: tuple[bool, ...]) -> None:
        """Give the active slots histories of their own; plans whose rows would now mix histories are dropped."""
        pairs = list(zip(self.history, active, strict=True))
        numbers = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        if len(numbers) > len(set(self.history)):
            self._plans.clear()
        self.history = [numbers[pair] for pair in pairs]

    def _rows(self, active: tuple[bool, ...]) -> Iterator[Row]:
        row: Row | None = None
        for slot in self.slots:
            if not active[slot.index]:
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
            and max(slot.numel, last.numel) < self.gather_below
            and (self.steps is None or self.history[slot.index] == self.history[last.index])
        )

    def publish(self, plan: Plan, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Enter the buffers of the plan's parameters into the optimizer's state, after their first good step."""
        for row in plan.rows:
            for slot in row.slots:
                if slot.views:
                    state[slot.param].update(slot.views)
                    slot.published = True
        plan.published = True


class FlatParameters:
    """All buckets of an optimizer.

    Args:
        param_groups: the optimizer's; those parameters are adopted that require a gradient, have one, or have state.
        state: the optimizer's; what it holds is carried over.
        options: for each group, how its update is computed, or None for all where another optimizer computes it.
        operators: will work on them.
        num_points: how many points are evaluated at once, 1 or 2.
    Raises:
        ValueError: for parameters that cannot be made views of a flat buffer; the message says why.
    """

    def __init__(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        options: Sequence[Options],
        operators: Operators,
        num_points: int = 1,
    ) -> None:
        self.num_points = num_points
        self._host = operators.host
        self.published = False  # whether the state holds all buffers that the last update used
        self._names = [None if o is None else o.buffers for o in options]
        members: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, int]]] = {}
        for group, param in _members(param_groups):
            if _wanted(param, state):
                check_parameter(param)
                _check_device(param)
                members.setdefault((param.device, param.dtype), []).append((param, group))
        _check_sharing([param for bucket in members.values() for param, _ in bucket])
        self.buckets = [Bucket(bucket, options, operators, num_points) for bucket in members.values()]
        self._slots = {slot.param: slot for bucket in self.buckets for slot in bucket.slots}
        self._copies: dict[tuple[Slot, int], Tensor] = {}
        self._constants: dict[tuple[float, ...], Tensor] = {}
        for bucket in self.buckets:
            bucket.adopt(state, options)
        self._places = [self._host.places(bucket.params) for bucket in self.buckets]
        self._matched: Any = None  # fingerprint of what was found in place
        self._outside: list[Tensor] = []  # parameters that were left where they are

    def matches(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        options: Sequence[Options],
    ) -> bool:
        """Whether parameters and state are still where they were put, and no others have joined or left."""
        if self._names != [None if o is None else o.buffers for o in options]:
            return False
        look = self._host.fingerprint([group["params"] for group in param_groups], state)
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

    @staticmethod
    def _in_place(slot: Slot) -> bool:
        return slot.param.data_ptr() == slot.pointer and slot.param.shape == slot.shape

    def return_to_moved(self, active: Sequence[tuple[bool, ...]]) -> None:
        """Give w to those ``active`` parameters that were re-pointed while they were perturbed, where they are now."""
        for bucket, mask in zip(self.buckets, active, strict=True):
            for slot in bucket.slots:
                if mask[slot.index] and not self._in_place(slot) and slot.param.shape == slot.shape:
                    slot.param.detach().copy_(slot.view(bucket.saved))

    def constants(self, values: tuple[float, ...]) -> Tensor:
        """Numbers as a float64 tensor on the device of the first bucket, kept: the same ones come step after step."""
        if values not in self._constants:
            if len(self._constants) >= _MAX_CONSTANTS:
                self._constants.clear()
            tensor = torch.tensor(values, dtype=torch.float64)
            self._constants[values] = tensor.to(self.buckets[0].device, non_blocking=True)
        return self._constants[values]

    def check_in_place(self) -> None:
        """Raise RuntimeError if a parameter was re-pointed while a step is in progress."""
        if [self._host.places(bucket.params) for bucket in self.buckets] != self._places:
            raise RuntimeError(
                "a parameter was moved or re-pointed between the passes of a step; call restore() before moving the "
                "model, then begin a new step"
            )

    def take_gradients(self, index: int, keep: bool) -> list[Gradients]:
        """The gradients of pass ``index``, for each bucket and slot, shaped and laid out as the parameter.

        A gradient is autograd's own tensor, taken out of ``p.grad``, wherever that is ours to hold; it is copied when
        ``keep`` leaves it in ``p.grad``, when it is a view whose memory the next backward may write again, and when its
        dtype or memory order differ from the parameter's.

        Raises:
            RuntimeError: for a sparse gradient.
        """
        taken = []
        for bucket in self.buckets:
            grads: Gradients | None = None if keep else self._host.take_gradients(bucket.params)
            if grads is None:
                grads = [self._take(slot, index, keep) for slot in bucket.slots]
                if not keep:
                    self._host.clear_gradients(list(bucket.params))
            taken.append(grads)
        return taken

    def _take(self, slot: Slot, index: int, keep: bool) -> Tensor | None:
        g = slot.param.grad
        if g is None:
            return None
        if g.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of a parameter of shape {tuple(slot.shape)} is sparse; CRSAM takes dense gradients only"
            )
        if g.requires_grad:  # after backward(create_graph=True)
            g = g.detach()
        ours = g.untyped_storage().nbytes() == slot.nbytes and g.dtype == slot.dtype and slot.matches_layout(g)
        if keep or not ours:
            key = (slot, index)
            if key not in self._copies:
                self._copies[key] = torch.empty_strided(slot.shape, slot.stride, dtype=slot.dtype, device=g.device)
            if keep and g.data_ptr() == self._copies[key].data_ptr():  # left in p.grad by the last step
                slot.param.grad = g.clone()
            g = self._copies[key].copy_(g)
        return g


def _flat(g: Tensor) -> Tensor:
    """A dense tensor as its memory lies."""
    return g.as_strided((g.numel(),), (1,))


def _members(param_groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Tensor]]:
    for index, group in enumerate(param_groups):
        for param in group["params"]:
            yield index, param


def _wanted(param: Tensor, state: Mapping[Tensor, dict[str, Any]]) -> bool:
    return param.numel() > 0 and (param.requires_grad or param.grad is not None or bool(state.get(param)))


def check_parameter(param: Tensor) -> None:
    """Raise ValueError if ``param`` cannot live in a flat buffer."""
    what = f"parameter of shape {tuple(param.shape)}"
    if param.dtype not in _DTYPES:
        raise ValueError(f"{what} has dtype {param.dtype}; CRSAM takes float64, float32, float16 and bfloat16")
    if param.layout != torch.strided or type(param.data) is not Tensor:
        raise ValueError(
            f"{what} is a {type(param.data).__name__} of layout {param.layout}; CRSAM takes plain strided tensors"
        )
    if any(stride == 0 and size > 1 for size, stride in zip(param.shape, param.stride(), strict=True)):
        raise ValueError(f"{what} is expanded: several of its elements share memory; make it contiguous first")


def _check_device(param: Tensor) -> None:
    """Raise ValueError if memory on the parameter's device cannot be adopted."""
    what = f"parameter of shape {tuple(param.shape)}"
    if param.device.type == "meta":
        raise ValueError(f"{what} is on the meta device; materialize the model before the first step")
    if param.device.type == "mps":
        raise ValueError(f"{what} is on MPS, which has no float64; CRSAM's sums end in float64")


def _check_sharing(params: Iterable[Tensor]) -> None:
    """Raise ValueError if two parameters overlap in memory: in a flat buffer they would silently part."""
    spans = []
    for p in params:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
        if extent == p.numel():  # views with gaps may interleave; only dense ones can be told apart by their bounds
            spans.append((str(p.device), p.data_ptr(), p.data_ptr() + extent * p.element_size(), tuple(p.shape)))
    spans.sort()
    for (device, _, stop, shape), (next_device, start, _, next_shape) in pairwise(spans):
        if device == next_device and start < stop:
            raise ValueError(
                f"parameters of shapes {shape} and {next_shape} share memory without being the same object; "
                "tie them by assigning one Parameter to both modules (b.weight = a.weight)"
            )
