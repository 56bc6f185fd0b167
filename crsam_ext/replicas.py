"""The replicas of a model in a DistributedDataParallel: what of a step is reduced over them, and when.

Every replica perturbs with its own e, from the gradient of its own batch (m-sharpness, Foret et al., ICLR 2021,
section 4.1), and only ghat is reduced: one all-reduce a step, as for the base optimizer. The passes before the last are
local. In the last one a communication hook makes ghat of every bucket as soon as its gradients are there, and starts
its all-reduce while backward goes on. Where the weights of ghat are known only after all passes, the last pass is local
too, and ghat is reduced in pieces.

Whatever decides about the step, all replicas decide alike: from the reduced gradient, or from sums that were reduced.
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

    LOCAL = "local"  #: each replica keeps its own
    MEAN = "mean"  #: they become their mean over the replicas
    COMBINED = "combined"  #: the hook makes ghat of them, and they become its mean


class Replicas:
    """When the gradients of a DistributedDataParallel are reduced.

    Args:
        ddp: the model.
        sync_perturbation: False for an e of its own in every replica, True for one e in all, or a process group for one
            e in each group.
    Raises:
        ValueError: for a DistributedDataParallel that moves parameters itself.
    """

    def __init__(self, ddp: DistributedDataParallel, sync_perturbation: Any) -> None:
        if getattr(ddp, "mixed_precision", None) is not None:
            raise ValueError("DistributedDataParallel's mixed_precision moves parameters in a step: use torch.autocast")
        self.ddp, self.group = ddp, ddp.process_group
        self.size = dist.get_world_size(self.group)
        self.syncs = sync_perturbation is True
        self._shares_e = sync_perturbation if sync_perturbation not in (True, False) else None
        self._agreed = False
        self._complete = False  # whether a step has been taken
        self._called: set[int] = set()  # buckets that the hook was called for in this pass
        self._has_reduced = False  # whether anything was reduced in this step

    # What the passes of a step are -----------------------------------------------------------------------------------

    def kind(self, index: int, passes: int, weights_known: bool) -> Pass:
        """What is to happen in a pass.

        Args:
            index: of the pass.
            passes: how many there are in the step.
            weights_known: whether the weights of ghat are known before the last.
        """
        if passes == 1:
            return Pass.MEAN
        if self.syncs and not weights_known:
            if not self.owns_hook:
                raise RuntimeError(
                    "this step reduces the gradients of every pass, and a hook of yours may change their differences: "
                    "register it as ddp.register_comm_hook(optimizer, crsam_ext.combine_wrapper(hook))"
                )
            return Pass.MEAN
        if index == 0 and self.syncs and self.owns_hook:
            return Pass.MEAN
        if index == passes - 1 and weights_known and self.owns_hook:
            return Pass.COMBINED
        return Pass.LOCAL

    @property
    def owns_hook(self) -> bool:
        """Whether the communication hook is one of :func:`combine_wrapper`."""
        return any(getattr(hook, "combines", False) for hook, _ in hooks_of(self.ddp))

    @property
    def shares_e(self) -> dist.ProcessGroup | None:
        """The replicas that take the mean of g0 where it was not reduced in its pass."""
        if self.syncs and not self.owns_hook:
            return self.group
        return cast("dist.ProcessGroup | None", self._shares_e)

    def prepare(self, optimizer: Any) -> None:
        """Call before the first pass of a step, and before its forward.

        Raises:
            RuntimeError: for what cannot be made right: ``join()``, and static graphs with a hook of another kind.
        """
        if is_joining(self.ddp):
            raise RuntimeError(
                "DistributedDataParallel.join() knows one all-reduce a backward: give every rank as many batches "
                "(DistributedSampler does), or make the optimizer without model="
            )
        if not hooks_of(self.ddp):
            self.ddp.register_comm_hook(optimizer, combine_wrapper())
        if self.ddp.static_graph and not self.owns_hook:
            raise RuntimeError(
                "static_graph=True needs gradients to stay local in a synchronised backward: register your hook as "
                "ddp.register_comm_hook(optimizer, crsam_ext.combine_wrapper(hook))"
            )

    def context(self, kind: Pass) -> AbstractContextManager[Any]:
        """In which a pass, forward and backward, is run."""
        # The first backward of a static graph may not be in no_sync (pytorch#143580): there the hook keeps it local.
        if kind is not Pass.LOCAL or (self.ddp.static_graph and not self._complete):
            return nullcontext()
        return cast("AbstractContextManager[Any]", self.ddp.no_sync())

    def begin_pass(self) -> None:
        """Call when the gradients of a pass are taken: the next one begins."""
        self._called.clear()

    def was_called(self) -> bool:
        """Whether the hook was called in this pass."""
        return bool(self._called)

    def end_step(self) -> None:
        """Call when a step is complete."""
        self._complete, self._has_reduced = True, False

    def abandon_step(self) -> None:
        """Call when a step is abandoned.

        Where something was reduced in it, others may be waiting for the rest: this rank must not answer them with the
        gradients of its next step. Instead it compares what the next step is, as it did in the first one.
        """
        self._called.clear()
        if self._has_reduced:
            self._agreed = self._has_reduced = False

    def called(self, bucket: GradBucket, kind: Pass) -> None:
        """Call for each call of the hook.

        Raises:
            RuntimeError: if the bucket was reduced in this pass already.
        """
        if bucket.index() in self._called:
            raise RuntimeError(
                "two backwards of the last pass were synchronised, of which only one can be reduced: put all but the "
                "last micro-batch into ddp.no_sync()"
            )
        self._called.add(bucket.index())
        self._has_reduced |= kind is not Pass.LOCAL

    # What is reduced -------------------------------------------------------------------------------------------------

    def agree(self, settings_of_step: Callable[[], dict[str, Any]]) -> None:
        """See, in the first step, whether all replicas take the same steps.

        Args:
            settings_of_step: tells by name what decides about a step; asked in that one only.
        Raises:
            RuntimeError: on all of them, if they do not, saying what differs.
        """
        if self._agreed:
            return
        settings = settings_of_step()
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, settings, group=self.group)
        differ = [name for name in settings if any(other.get(name) != everyone[0].get(name) for other in everyone)]
        if differ:
            told = "; ".join(f"{name}: {', '.join(str(other.get(name)) for other in everyone)}" for name in differ)
            raise RuntimeError(f"the ranks of the model differ in what decides about their steps: {told}")
        self._agreed = True

    def forget(self) -> None:
        """Call when options or state were changed: they are compared again."""
        self._agreed = False

    def mean_(self, tensor: Tensor) -> Tensor:
        """Reduce a small tensor to its mean, in place."""
        dist.all_reduce(tensor.div_(self.size), group=self.group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Reduce a small tensor to its greatest values, in place."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def sum_pieces_(self, pieces: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
        """Reduce pieces to their sums, in place; each while the next one is made."""
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
    """Rows of one dtype, in runs that are reduced at once."""
    start, size = 0, 0
    for index, row in enumerate(rows):
        if index > start and size + row.nbytes > PIECE:
            yield slice(start, index)
            start, size = index, 0
        size += row.nbytes
    if rows:
        yield slice(start, len(rows))


def room(rows: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """New memory for rows of one dtype and device: all of it, and a view for each, aligned as kernels like it."""
    align = ALIGNMENT // rows[0].element_size()
    offsets = [0, *accumulate(-(-row.numel() // align) * align for row in rows)]
    flat = rows[0].new_zeros(offsets[-1])
    return flat, [flat[start : start + row.numel()] for start, row in zip(offsets, rows, strict=False)]


# The hook ------------------------------------------------------------------------------------------------------------


def combine_wrapper(
    hook: Callable[[Any, GradBucket], torch.futures.Future[Tensor]] | None = None, state: Any = None
) -> Callable[[Any, GradBucket], torch.futures.Future[Tensor]]:
    """A communication hook that makes ghat of a bucket and hands it to another hook, whose state is given here.

    Args:
        hook: reduces it, as :func:`torch.distributed.algorithms.ddp_comm_hooks.default_hooks.bf16_compress_hook` does;
            by default an all-reduce.
        state: of ``hook``; by default the process group.

    Example::

        optimizer = CRSAM(ddp.parameters(), torch.optim.SGD, lr=0.1, model=ddp)
        ddp.register_comm_hook(optimizer, crsam_ext.combine_wrapper(bf16_compress_hook))
    """

    def combine_hook(optimizer, bucket):  # type: ignore[no-untyped-def]
        # Annotations are left out: register_comm_hook compares them with the classes.
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
    """Whether this process is one of several that communicate."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_equal(params: Sequence[Tensor], names: Sequence[str], group: dist.ProcessGroup | None) -> None:
    """See whether all ranks hold the same parameters, to the bit: one all-reduce of a checksum of each.

    Args:
        params: plain tensors, which all ranks of ``group`` hold, and DTensors, whose shards only those hold over which
            they are replicated: one all-reduce for each dimension of a mesh that replicates, and one of the outcome.
        names: of the parameters.
        group: all processes if None.
    Raises:
        RuntimeError: on all ranks, if they do not, naming the first that differs.
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
        both = torch.stack([sums[indices], ~sums[indices]])  # the greatest of ~x is that of the least x
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=over)
        differs[indices] |= both[0] != ~both[1]
    if any(map(is_sharded, params)):
        dist.all_reduce(differs, op=dist.ReduceOp.MAX)
    differ = differs.nonzero().flatten().tolist()
    if differ:
        others = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
        raise RuntimeError(
            f"the replicas have parted: {names[differ[0]]}{others} of {len(params)} parameters differ between ranks; "
            "gradients were reduced in some passes only (a no_sync() of one's own?), or the ranks began differently"
        )


def _checksum(param: Tensor) -> Tensor:
    """64 bits of a tensor, 0-dim int64."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = param.detach().contiguous().view(-1).view(integers[param.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=param.device)
    for index, piece in enumerate(bits.split(2**20) if len(bits) else ()):
        places = torch.arange(1, 2 * len(piece), 2, dtype=torch.int64, device=param.device)
        total += (piece.to(torch.int64) * places).sum() * (2 * index + 1)  # odd factors lose no bit
    return total
