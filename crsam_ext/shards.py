"""Sharded parameters: the DTensors of fully_shard, of tensor parallelism and of replicate().

A step works on the local part of a parameter, its *shard*. The shard is not moved, because fully_shard gathers from
this memory. Elementwise operations need nothing else. Sums over parameters are sums over shards, and are reduced over
exactly those dimensions of a parameter's mesh that shard it. Along a dimension that replicates the parameter, every
rank already has the sum, and a reduction would count it once per replica. All decisions about a step depend on such
sums only, so they are the same on all ranks.

Users see DTensors: in ``p.grad`` and in the state, which torch.distributed.checkpoint saves and reshards.
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

#: Size of a communication buffer in bytes; the default of DistributedDataParallel.
PIECE = 25 * 2**20

# Code that creates a DTensor has imported this module. The import takes half a second and loads SymPy, so other users
# do not pay for it.
_DTENSORS = "torch.distributed.tensor"

#: The process groups of the mesh dimensions that shard a parameter, in the order of the mesh, which is the same on all
#: ranks. Empty for a parameter that is complete on every rank.
Groups = tuple[Any, ...]


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor, sharded or replicated."""
    module = sys.modules.get(_DTENSORS)
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def local(tensor: Any) -> Tensor:
    """Return the local shard of a DTensor, which shares its memory; any other tensor is returned unchanged."""
    shard: Tensor = tensor.to_local().detach() if is_sharded(tensor) else tensor
    return shard


def flattened(g: Tensor) -> Tensor:
    """Return a dense tensor as a 1-D view in memory order."""
    return g.as_strided((g.numel(),), (1,))


def local_gradient(param: Any, grad: Any) -> Tensor:
    """Return the local shard of a gradient, with the placements of the parameter.

    If every rank has a partial sum, as for a parameter that sequence parallelism replicates, all ranks of the mesh
    reduce it first.
    """
    if is_sharded(param) and is_sharded(grad):
        if not placed_alike(param, grad):
            grad = grad.redistribute(param.device_mesh, param.placements)
        grad = grad.to_local()
    shard: Tensor = grad.wait() if isinstance(grad, AsyncCollectiveTensor) else grad
    return shard


def placed_alike(param: Any, grad: Any) -> bool:
    """Return whether two tensors are DTensors with the same placements."""
    return is_sharded(param) and is_sharded(grad) and bool(grad.placements == param.placements)


def as_shard_of(param: Any, shard: Tensor) -> Tensor:
    """Return a DTensor like ``param`` that shares the memory of ``shard``; ``shard`` itself if ``param`` is not one."""
    if not is_sharded(param):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def groups_of(param: Any) -> Groups:
    """Return the process groups over which a sum over the elements of a parameter must be reduced."""
    if not is_sharded(param):
        return ()
    placements = enumerate(param.placements)
    return tuple(param.device_mesh.get_group(dim) for dim, placed in placements if not placed.is_replicate())


def replicating_groups(param: Any) -> list[Any]:
    """Return the process group of each mesh dimension that replicates a DTensor; its ranks have the same shard."""
    placements = enumerate(param.placements)
    return [param.device_mesh.get_group(dim) for dim, placed in placements if placed.is_replicate()]


def check_placements(param: Any) -> None:
    """Raise ValueError if a DTensor holds partial sums."""
    if is_sharded(param) and any(placed.is_partial() for placed in param.placements):
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} has the placements {param.placements}, a partial sum on each "
            "rank; redistribute it to Shard or Replicate before you create the optimizer"
        )


def check_state(name: str, value: Any, like: Any) -> None:
    """Raise ValueError if a value of the state differs from ``like``, usually its parameter, in mesh or placements."""
    what = f"state {name!r} of a parameter of shape {tuple(like.shape)}"
    if is_sharded(value) != is_sharded(like):
        kind, kind_of_like = (("a DTensor" if is_sharded(x) else "a plain tensor") for x in (value, like))
        what += f" is {kind}, but the parameter is {kind_of_like}"
    elif not is_sharded(value):
        return
    elif value.device_mesh != like.device_mesh:
        what += f" is on {value.device_mesh}, but the parameter is on {like.device_mesh}"
    elif value.placements != like.placements:
        what += f" has the placements {value.placements}, but the parameter has {like.placements}"
    else:
        return
    raise ValueError(f"{what}: load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict")


def sum_over(parts: Mapping[Groups, Tensor]) -> Tensor:
    """Reduce each tensor over its groups and return the sum of all, with one all-reduce per group.

    Args:
        parts: tensors of one shape, the local part of each sum, by the groups over which it is reduced. The order is
            the same on all ranks, because they reduce over one group after the other.
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
