"""Parameters of which every rank holds a part: the DTensors of fully_shard, of tensor parallelism and of replicate().

A step works on the part that is here, its *shard*, which stays where it is: fully_shard gathers from memory of its own.
All that is elementwise needs nothing else. Sums over parameters are sums over shards, and are reduced over exactly
those dimensions of a parameter's mesh that shard it: where a dimension replicates it, every rank has the sum already,
and would add it once for each replica. What decides about a step is made of such sums, and so is the same on all ranks.

What others see are DTensors: gradients in ``p.grad``, and the state, which torch.distributed.checkpoint saves and
reshards.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor

__all__ = [
    "PIECE",
    "Groups",
    "as_shard_of",
    "check_placements",
    "check_state",
    "flattened",
    "groups_of",
    "is_sharded",
    "local",
    "local_gradient",
    "placed_alike",
    "replicating_groups",
    "sum_over",
]

#: Of what is sent at once, in bytes: DistributedDataParallel's own default.
PIECE = 25 * 2**20

# Whoever makes a DTensor has imported it. For all others it would be half a second more, and SymPy.
_DTENSORS = "torch.distributed.tensor"

#: The process groups of the dimensions of a mesh that shard a parameter, in the order of the mesh, which is the same on
#: all ranks; none for one that every rank holds whole.
Groups = tuple[Any, ...]


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which this rank has a part or, where it is replicated, all."""
    module = sys.modules.get(_DTENSORS)
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def local(tensor: Any) -> Tensor:
    """The shard of a DTensor, sharing its memory; any other tensor as it is."""
    shard: Tensor = tensor.to_local().detach() if is_sharded(tensor) else tensor
    return shard


def flattened(g: Tensor) -> Tensor:
    """A dense tensor as its memory lies."""
    return g.as_strided((g.numel(),), (1,))


def local_gradient(param: Any, grad: Any) -> Tensor:
    """The shard of a gradient, placed as the parameter is.

    Where every rank has computed a part of a sum, as it does for what sequence parallelism replicates, that sum is made
    first, by all ranks of the mesh.
    """
    if is_sharded(param) and is_sharded(grad):
        if not placed_alike(param, grad):
            grad = grad.redistribute(param.device_mesh, param.placements)
        grad = grad.to_local()
    shard: Tensor = grad.wait() if isinstance(grad, AsyncCollectiveTensor) else grad
    return shard


def placed_alike(param: Any, grad: Any) -> bool:
    """Whether two tensors are DTensors of the same placements."""
    return is_sharded(param) and is_sharded(grad) and bool(grad.placements == param.placements)


def as_shard_of(param: Any, shard: Tensor) -> Tensor:
    """A tensor of the mesh, placements and shape of a parameter, over the memory of ``shard``; for a DTensor only."""
    if not is_sharded(param):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def groups_of(param: Any) -> Groups:
    """The groups over which a sum over the elements of a parameter is to be reduced."""
    if not is_sharded(param):
        return ()
    placements = enumerate(param.placements)
    return tuple(param.device_mesh.get_group(dim) for dim, placed in placements if not placed.is_replicate())


def replicating_groups(param: Any) -> list[Any]:
    """The groups of ranks that have the same shard of a DTensor, for each dimension of its mesh that replicates it."""
    placements = enumerate(param.placements)
    return [param.device_mesh.get_group(dim) for dim, placed in placements if placed.is_replicate()]


def check_placements(param: Any) -> None:
    """Raise ValueError for a DTensor that holds parts of a sum."""
    if is_sharded(param) and any(placed.is_partial() for placed in param.placements):
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} is placed {param.placements}: a part of a sum on each rank; "
            "redistribute it to Shard or Replicate before making the optimizer"
        )


def check_state(name: str, value: Any, like: Any) -> None:
    """Raise ValueError where a value of the state is not placed as its parameter is, or another tensor like that."""
    what = f"state {name!r} of a parameter of shape {tuple(like.shape)}"
    if is_sharded(value) != is_sharded(like):
        kind, kind_of_like = (("a DTensor" if is_sharded(x) else "a plain tensor") for x in (value, like))
        what += f" is {kind}, and the parameter {kind_of_like}"
    elif not is_sharded(value):
        return
    elif value.device_mesh != like.device_mesh:
        what += f" is on {value.device_mesh}, and the parameter on {like.device_mesh}"
    elif value.placements != like.placements:
        what += f" is placed {value.placements}, and the parameter {like.placements}"
    else:
        return
    raise ValueError(f"{what}: load it by torch.distributed.checkpoint.state_dict.set_optimizer_state_dict")


def sum_over(parts: Mapping[Groups, Tensor]) -> Tensor:
    """The sum of tensors of one shape, each reduced over its groups: one all-reduce for each group that occurs.

    Args:
        parts: what this rank has of each sum, by the groups over which it is to be reduced; in an order that is the
            same on all ranks, as they reduce over one group after the other.
    """
    pending = dict(parts)
    for group in dict.fromkeys(group for groups in parts for group in groups):
        rest: dict[Groups, Tensor] = {}
        for groups in [groups for groups in pending if group in groups]:
            _add(rest, tuple(g for g in groups if g is not group), pending.pop(groups))
        stacked = torch.stack(list(rest.values()))
        dist.all_reduce(stacked, group=group)
        for groups, reduced in zip(rest, stacked, strict=True):
            _add(pending, groups, reduced)
    return pending[()]


def _add(sums: dict[Groups, Tensor], groups: Groups, part: Tensor) -> None:
    sums[groups] = sums[groups] + part if groups in sums else part
