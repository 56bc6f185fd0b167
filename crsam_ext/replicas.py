"""The replicas of a model in a DistributedDataParallel: what a step reduces over them, and when.

Every replica perturbs with its own e, computed from the gradient of its own batch (m-sharpness, Foret et al., ICLR
2021, section 4.1). Only ghat is reduced: one all-reduce per step, as for the base optimizer. All passes but the last
are local. In the last pass, a communication hook computes ghat for each bucket as soon as its gradients are ready, and
starts the all-reduce, which overlaps with the rest of backward. If the weights of ghat depend on all passes, the last
pass is local too, and ghat is reduced in pieces afterwards.

All replicas make the same decisions about a step, because they use the reduced gradient or reduced sums.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ._compat import hooks_of, is_joining
from .flat import ALIGNMENT
from .shards import PIECE, flattened, is_sharded, local, replicating_groups

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

__all__ = ["Pass", "Replicas", "check_equal", "combine_wrapper", "in_several_processes", "parts", "room"]


class Pass(enum.Enum):
    """What happens to the gradients of a pass."""

    LOCAL = "local"  #: each replica keeps its own gradients
    MEAN = "mean"  #: they are replaced by their mean over the replicas
    COMBINED = "combined"  #: the hook computes ghat from them, and they are replaced by the mean of ghat


class Replicas:
    """Decides when the gradients of a DistributedDataParallel are reduced.

    Args:
        ddp: the model.
        sync_perturbation: False if every replica has its own e, True if all replicas share one e, or a process group
            whose replicas share one e.
    Raises:
        ValueError: if the DistributedDataParallel itself moves parameters.
    """

    def __init__(self, ddp: DistributedDataParallel, sync_perturbation: Any) -> None:
        if getattr(ddp, "mixed_precision", None) is not None:
            raise ValueError(
                "DistributedDataParallel's mixed_precision moves parameters during a step: use torch.autocast"
            )
        self.ddp, self.group = ddp, ddp.process_group
        self.size = dist.get_world_size(self.group)
        self.syncs = sync_perturbation is True
        self._shares_e = sync_perturbation if sync_perturbation not in (True, False) else None
        self._agreed = False
        self._complete = False  # whether a step has been taken
        self._called: set[int] = set()  # buckets for which the hook was called in this pass
        self._has_reduced = False  # whether this step has reduced anything

    # The passes of a step --------------------------------------------------------------------------------------------

    def kind(self, index: int, passes: int, weights_known: bool) -> Pass:
        """Return what happens to the gradients of a pass.

        Args:
            index: index of the pass.
            passes: the number of passes in the step.
            weights_known: whether the weights of ghat are known before the last pass.
        """
        if passes == 1:
            return Pass.MEAN
        if self.syncs and not weights_known:
            if not self.owns_hook:
                raise RuntimeError(
                    "this step reduces the gradients of every pass, and your communication hook may change their "
                    "differences: register it as ddp.register_comm_hook(optimizer, crsam_ext.combine_wrapper(hook))"
                )
            return Pass.MEAN
        if index == 0 and self.syncs and self.owns_hook:
            return Pass.MEAN
        if index == passes - 1 and weights_known and self.owns_hook:
            return Pass.COMBINED
        return Pass.LOCAL

    @property
    def owns_hook(self) -> bool:
        """Whether the communication hook was made by :func:`combine_wrapper`."""
        return any(getattr(hook, "combines", False) for hook, _ in hooks_of(self.ddp))

    @property
    def shares_e(self) -> dist.ProcessGroup | None:
        """The replicas that average g0 if it was not reduced during its pass; None if they do not average it."""
        if self.syncs and not self.owns_hook:
            return self.group
        return cast("dist.ProcessGroup | None", self._shares_e)

    def prepare(self, optimizer: Any) -> None:
        """Prepare for a step; call before the forward of its first pass.

        Raises:
            RuntimeError: for unsupported settings: ``join()``, or a static graph with a foreign hook.
        """
        if is_joining(self.ddp):
            raise RuntimeError(
                "DistributedDataParallel.join() expects one all-reduce per backward: give every rank the same number "
                "of batches (DistributedSampler does), or create the optimizer without model="
            )
        if not hooks_of(self.ddp):
            self.ddp.register_comm_hook(optimizer, combine_wrapper())
        if self.ddp.static_graph and not self.owns_hook:
            raise RuntimeError(
                "static_graph=True needs a hook that can keep gradients local in a synchronized backward: register "
                "your hook as ddp.register_comm_hook(optimizer, crsam_ext.combine_wrapper(hook))"
            )

    def context(self, kind: Pass) -> AbstractContextManager[Any]:
        """Return the context in which to run the forward and backward of a pass."""
        # The first backward of a static graph must not run in no_sync (pytorch#143580): the hook keeps it local.
        if kind is not Pass.LOCAL or (self.ddp.static_graph and not self._complete):
            return nullcontext()
        return cast("AbstractContextManager[Any]", self.ddp.no_sync())

    def begin_pass(self) -> None:
        """Begin the next pass; call after the gradients of the previous pass have been taken."""
        self._called.clear()

    def was_called(self) -> bool:
        """Return whether the hook was called in this pass."""
        return bool(self._called)

    def end_step(self) -> None:
        """End a complete step."""
        self._complete, self._has_reduced = True, False

    def abandon_step(self) -> None:
        """Abandon a step.

        If the step has reduced something, other ranks may wait for the rest of it. They must not receive the gradients
        of this rank's next step, so the ranks compare their settings again, as in the first step.
        """
        self._called.clear()
        if self._has_reduced:
            self._agreed = self._has_reduced = False

    def called(self, bucket: GradBucket, kind: Pass) -> None:
        """Record a call of the hook.

        Raises:
            RuntimeError: if this pass has already reduced the bucket.
        """
        if bucket.index() in self._called:
            raise RuntimeError(
                "two backwards of the last pass were synchronized, but only one can be reduced: run all but the last "
                "micro-batch within ddp.no_sync()"
            )
        self._called.add(bucket.index())
        self._has_reduced |= kind is not Pass.LOCAL

    # Reductions ------------------------------------------------------------------------------------------------------

    def agree(self, settings_of_step: Callable[[], dict[str, Any]]) -> None:
        """Check in the first step that all replicas have the same settings.

        Args:
            settings_of_step: returns the settings that determine a step, by name; called only if they are compared.
        Raises:
            RuntimeError: on all replicas, if the settings differ; the message names them.
        """
        if self._agreed:
            return
        settings = settings_of_step()
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, settings, group=self.group)
        differ = [name for name in settings if any(other.get(name) != everyone[0].get(name) for other in everyone)]
        if differ:
            told = "; ".join(f"{name}: {', '.join(str(other.get(name)) for other in everyone)}" for name in differ)
            raise RuntimeError(f"the ranks of the model differ in settings that must be equal: {told}")
        self._agreed = True

    def forget(self) -> None:
        """Compare the settings again in the next step; call after options or state were changed."""
        self._agreed = False

    def mean_(self, tensor: Tensor) -> Tensor:
        """Reduce a small tensor to its mean, in place."""
        dist.all_reduce(tensor.div_(self.size), group=self.group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Reduce a small tensor to its maximum, in place."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def sum_pieces_(self, pieces: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
        """Reduce pieces to their sums, in place; the reduction overlaps with the creation of the next piece."""
        group = self.group if group is None else group
        works = [dist.all_reduce(piece, group=group, async_op=True) for piece in pieces]
        for work in works:
            work.wait()

    def mean_of(self, tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
        """Reduce dense tensors of any dtype to their means over a group, in place."""
        group = self.group if group is None else group
        size = dist.get_world_size(group)
        by_kind: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            by_kind.setdefault((tensor.dtype, tensor.device), []).append(flattened(tensor))
        copied: list[tuple[list[Tensor], list[Tensor]]] = []

        def pieces() -> Iterator[Tensor]:
            for rows in by_kind.values():
                for part in parts(rows):
                    flat, views = room(rows[part])
                    torch._foreach_copy_(views, rows[part])
                    copied.append((rows[part], views))
                    yield flat.div_(size)

        self.sum_pieces_(pieces(), group)
        for rows, views in copied:
            torch._foreach_copy_(rows, views)


def parts(rows: Sequence[Tensor]) -> Iterator[slice]:
    """Split rows of one dtype into pieces of at most ``PIECE`` bytes or one row, one all-reduce each."""
    start, size = 0, 0
    for index, row in enumerate(rows):
        if index > start and size + row.nbytes > PIECE:
            yield slice(start, index)
            start, size = index, 0
        size += row.nbytes
    if rows:
        yield slice(start, len(rows))


def room(rows: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Allocate memory for rows of one dtype and device; return it with an aligned view for each row."""
    align = ALIGNMENT // rows[0].element_size()
    offsets = [0, *accumulate(-(-row.numel() // align) * align for row in rows)]
    flat = rows[0].new_zeros(offsets[-1])
    return flat, [flat[start : start + row.numel()] for start, row in zip(offsets, rows, strict=False)]


# The hook ------------------------------------------------------------------------------------------------------------


def combine_wrapper(
    hook: Callable[[Any, GradBucket], torch.futures.Future[Tensor]] | None = None, state: Any = None
) -> Callable[[Any, GradBucket], torch.futures.Future[Tensor]]:
    """Return a communication hook that computes ghat for a bucket and passes it to another hook.

    Args:
        hook: reduces ghat, for example ``bf16_compress_hook`` of
            :mod:`torch.distributed.algorithms.ddp_comm_hooks.default_hooks`; by default an all-reduce.
        state: the state of ``hook``; by default the process group.

    Example::

        optimizer = CRSAM(ddp.parameters(), torch.optim.SGD, lr=0.1, model=ddp)
        ddp.register_comm_hook(optimizer, crsam_ext.combine_wrapper(bf16_compress_hook))
    """

    def combine_hook(optimizer, bucket):  # type: ignore[no-untyped-def]
        # No annotations, because register_comm_hook compares them with the classes.
        replicas: Replicas = optimizer.replicas
        kind, step = optimizer.next_pass()
        replicas.called(bucket, kind)
        buffer = bucket.buffer()
        if kind is Pass.LOCAL:
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(buffer)
            return future
        exact = hook is None or (kind is Pass.MEAN and optimizer.passes > 1)
        with torch.no_grad():
            if kind is Pass.COMBINED:
                step.combine_bucket(bucket, 1 / replicas.size if exact else 1.0)
            elif exact:
                buffer.div_(replicas.size)
        if not exact:
            assert hook is not None
            return hook(replicas.group if state is None else state, bucket)
        work = dist.all_reduce(buffer, group=replicas.group, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    combine_hook.combines = True  # type: ignore[attr-defined]
    return combine_hook


def in_several_processes() -> bool:
    """Return whether this process belongs to a process group of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_equal(params: Sequence[Tensor], names: Sequence[str], group: dist.ProcessGroup | None) -> None:
    """Check that the parameters are equal on all ranks, to the bit, with one all-reduce of their checksums.

    DTensors need one more all-reduce for each mesh dimension that replicates them, and one for the result.

    Args:
        params: plain tensors, which are compared over ``group``, and DTensors, which are compared over the ranks that
            replicate the same shard.
        names: names of the parameters.
        group: all processes if None.
    Raises:
        RuntimeError: on all ranks, if parameters differ; the message names the first of them.
    """
    if not params:
        return
    sums = torch.stack([_checksum(local(param)).to(params[0].device) for param in params])
    compared: dict[dist.ProcessGroup | None, list[int]] = {}
    for index, param in enumerate(params):
        for over in replicating_groups(param) if is_sharded(param) else [group]:
            compared.setdefault(over, []).append(index)
    differs = torch.zeros(len(params), dtype=torch.int32, device=sums.device)
    for over, indices in compared.items():
        both = torch.stack([sums[indices], ~sums[indices]])  # max(~x) equals ~min(x)
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=over)
        differs[indices] |= both[0] != ~both[1]
    if any(map(is_sharded, params)):
        dist.all_reduce(differs, op=dist.ReduceOp.MAX)
    differ = differs.nonzero().flatten().tolist()
    if differ:
        others = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
        raise RuntimeError(
            f"the replicas differ: {names[differ[0]]}{others} of {len(params)} parameters are not equal on all ranks; "
            "either some passes did not reduce their gradients (did you use no_sync()?), or the ranks started from "
            "different values"
        )


def _checksum(param: Tensor) -> Tensor:
    """Return a 64-bit checksum of a tensor, 0-dim int64."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = param.detach().contiguous().view(-1).view(integers[param.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=param.device)
    for index, piece in enumerate(bits.split(2**20) if len(bits) else ()):
        places = torch.arange(1, 2 * len(piece), 2, dtype=torch.int64, device=param.device)
        total += (piece.to(torch.int64) * places).sum() * (2 * index + 1)  # odd factors lose no bits
    return total
