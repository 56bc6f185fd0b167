"""Sharded optimizer state, ``shard_state``: ZeRO stage 1 (Rajbhandari et al., SC 2020).

By default, all replicas of a DistributedDataParallel have the same state and compute the same update from the same
gradient. With sharded state, each rank stores the state of a slice of every parameter, cut along dimension 0 as
fully_shard does. It updates this slice and sends it to the other ranks. The result is equal to the bit, because an
update is elementwise.

The state consists of DTensors, which torch.distributed.checkpoint saves and reshards. A parameter cannot be cut if it
has no dimensions or if dimension 0 is not its outermost dimension in memory. Then every rank stores its whole state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._compat import segment
from .ops import Direction
from .shards import PIECE, flattened

if TYPE_CHECKING:
    from .flat import Bucket, Plan, Slot

__all__ = ["OwnPlan", "StateShards"]


class StateShards:
    """The part of each parameter's state that this rank stores.

    Args:
        group: the ranks that share the state.
        device: device of the parameters.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        from torch.distributed.device_mesh import DeviceMesh

        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._mesh = DeviceMesh.from_group(group, device.type)

    def chunk(self, slot: Slot) -> int:
        """Return how many elements of a parameter each rank owns; 0 if the parameter is not cut.

        The last ranks own fewer elements, or none.
        """
        shape, stride = slot.shape, slot.stride
        if not shape or not slot.numel or (shape[0] > 1 and stride[0] * shape[0] != slot.numel):
            return 0
        return -(-shape[0] // self.size) * (slot.numel // shape[0])

    def owned(self, slot: Slot) -> tuple[int, int]:
        """Return the half-open range of elements, in memory order, that this rank owns; all if nothing is cut."""
        chunk = self.chunk(slot)
        if not chunk:
            return 0, slot.numel
        start = min(self.rank * chunk, slot.numel)
        return start, min(start + chunk, slot.numel)

    def part(self, slot: Slot, flat: Tensor) -> Tensor:
        """Return the state of a parameter as a view of a flat buffer; a DTensor if the parameter is cut."""
        from torch.distributed.tensor import DTensor, Shard

        start, stop = self.owned(slot)
        here = segment(flat, slot.own_offset, stop - start)
        if not self.chunk(slot):
            return here.as_strided(slot.shape, slot.stride)
        rows = (stop - start) // (slot.numel // slot.shape[0])
        here = here.as_strided((rows, *slot.shape[1:]), slot.stride)
        placed = [Shard(0)]
        return DTensor.from_local(here, self._mesh, placed, run_check=False, shape=slot.shape, stride=slot.stride)

    def own_part_of(self, slot: Slot, whole: Tensor) -> Tensor:
        """Return the part that this rank owns of a plain tensor in the shape of a parameter."""
        if not self.chunk(slot):
            return whole
        start, stop = self.owned(slot)
        inner = slot.numel // slot.shape[0]
        return whole[start // inner : stop // inner]


class OwnPlan:
    """The part of a plan that this rank updates: one row per parameter of which it owns elements.

    It replaces the plan in :meth:`crsam_ext.updates.Update.apply`.

    Args:
        plan: the plan of all elements.
        bucket: the bucket of the plan.
        shards: which elements this rank owns.
    """

    def __init__(self, plan: Plan, bucket: Bucket, shards: StateShards) -> None:
        Column, self._shards = bucket.host.Column, shards
        # For every row: the index of the plan's row that contains it, and its range of elements there.
        self._places: list[tuple[int, int, int]] = []
        self._sent: list[Sent] = []
        self.rows: list[Slot] = []
        spans = []
        for index, row in enumerate(plan.rows):
            for slot in row.slots:
                start, stop = shards.owned(slot)
                first = slot.offset - row.start
                if stop > start:
                    self.rows.append(slot)
                    self._places.append((index, first + start, first + stop))
                    spans.append((slot.own_offset, slot.own_offset + stop - start))
                if shards.chunk(slot):
                    self._sent.append(Sent(index, first, slot.numel, shards.chunk(slot)))
        self.groups = bucket.host.Groups(slot.group for slot in self.rows)
        self.live = Column(self.of(plan.live))
        self.buffers: dict[str, list[Any]] = {
            name: Column(
                flat[a:b] if name in slot.views else None for slot, (a, b) in zip(self.rows, spans, strict=True)
            )
            for name, flat in bucket.buffers.items()
            if name not in bucket.kept
        }
        self.steps = Column(plan.steps[index] for index, *_ in self._places)

    def of(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Return the parts of the plan's rows that this rank owns."""
        return [flattened(rows[index])[a:b] for index, a, b in self._places]

    def direction(self, direction: Direction | None) -> Direction | None:
        """Return the part of a direction that this rank owns."""
        return None if direction is None else Direction(self.of(direction.rows), direction.weight)

    def share(self, rows: Sequence[Tensor]) -> None:
        """Send the own parts of the plan's rows to all ranks, and write the parts of the other ranks.

        The communication of one piece overlaps with the copies of the previous one.

        Args:
            rows: all rows of the plan, of one dtype.
        """
        last: _Piece | None = None
        for sent in _pieces(self._sent, rows[0].element_size() if rows else 1):
            piece = self._send(rows, sent)
            if last is not None:
                last.receive()
            last = piece
        if last is not None:
            last.receive()

    def _send(self, rows: Sequence[Tensor], sent: list[Sent]) -> _Piece:
        shards = self._shards
        own, offset, targets = rows[0].new_zeros(sum(each.chunk for each in sent)), 0, []
        for row, first, numel, chunk in sent:
            start = min(shards.rank * chunk, numel)
            stop = min(start + chunk, numel)
            own[offset : offset + stop - start] = rows[row][first + start : first + stop]
            targets.append((rows[row][first : first + numel], offset, chunk))
            offset += chunk
        everyone = own.new_empty(shards.size * len(own))
        work = dist.all_gather_into_tensor(everyone, own, group=shards.group, async_op=True)
        return _Piece(work, everyone.view(shards.size, len(own)), targets)


class Sent(NamedTuple):
    """A parameter that the ranks exchange."""

    row: int  #: index of the plan's row
    first: int  #: index of the parameter's first element in this row
    numel: int
    chunk: int  #: elements per rank


class _Piece(NamedTuple):
    """The parameters of one all-gather."""

    work: Any
    everyone: Tensor  # [ranks, elements per rank]
    targets: list[tuple[Tensor, int, int]]  # a parameter, and the offset and length of its chunk

    def receive(self) -> None:
        """Wait for the all-gather, and copy its result into the parameters."""
        self.work.wait()
        to, of = [], []
        for target, offset, chunk in self.targets:
            full, left = divmod(len(target), chunk)
            to.append(target[: full * chunk].view(full, chunk))
            of.append(self.everyone[:full, offset : offset + chunk])
            if left:
                to.append(target[full * chunk :])
                of.append(self.everyone[full, offset : offset + left])
        torch._foreach_copy_(to, of)


def _pieces(sent: Sequence[Sent], itemsize: int) -> list[list[Sent]]:
    """Split parameters into runs, one all-gather each."""
    pieces: list[list[Sent]] = []
    size = 0
    for each in sent:
        if not pieces or size + each.numel * itemsize > PIECE:
            pieces.append([])
            size = 0
        pieces[-1].append(each)
        size += each.numel * itemsize
    return pieces
