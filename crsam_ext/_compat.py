"""Interfaces that are private to others, in one place: what is relied on, and what happens without it.

They were tried with torch 2.11 and 2.14, CPython 3.11 and NumPy 2; ``tests/test_compat.py`` has a test for each.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.dlpack import from_dlpack

__all__ = [
    "attributes_of",
    "compiled_from",
    "fully_sharded",
    "gathered_by_fully_shard",
    "hooks_of",
    "is_fsdp_flat",
    "is_joining",
    "is_part_of_zero",
    "local_tensors",
    "makes_gradients_anew",
    "mark_of_numpy",
    "mark_of_python",
    "mark_stepped",
    "relaxed_capture",
    "segment",
    "storage_is_shared",
]

# What torch keeps on an optimizer for itself: hooks, and the names of profiler ranges.
_TORCHS_OWN = ("_optimizer_", "_zero_grad_profile_name", "_warned_capturable_if_run_uncaptured")


def storage_is_shared(storage: torch.UntypedStorage) -> bool:
    """Whether tensors other than the caller's one refer to ``storage``: views, ``detach()``, a NumPy array.

    False where torch does not tell.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    return count is not None and count(storage._cdata) > 2  # the tensor, and ``storage`` itself


def segment(flat: Tensor, start: int, numel: int) -> Tensor:
    """A part of a 1-D tensor, with a storage of its own over that memory.

    safetensors and Accelerate take tensors of one storage for one tied tensor, of which they save one or refuse to save
    any, and torch.save writes storages whole. That DLPack makes a storage of just the part is not documented.
    """
    return from_dlpack(flat[start : start + numel])


def mark_stepped(optimizer: Optimizer) -> None:
    """Tell a scheduler that the optimizer has made a step; otherwise it warns that it comes too early."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def attributes_of(optimizer: Optimizer) -> dict[str, Any]:
    """The attributes of an optimizer that belong into a copy: all but those that torch makes anew."""
    return {name: value for name, value in vars(optimizer).items() if not name.startswith(_TORCHS_OWN)}


def mark_of_python() -> Any:
    """A value that changes whenever numbers are drawn from ``random``, ten times faster than its state; None without.

    It is the memory of the generator, which CPython keeps behind the head of the object.
    """
    generator = _python_generator()
    return None if generator is None else (_memory_of(generator), generator.gauss_next)


def mark_of_numpy(numpy_random: Any) -> Any:
    """Likewise for the global generator of ``numpy.random``, fifty times faster; None if it is no Mersenne Twister.

    It does not tell whether the second of two normal variates was used, which the state keeps (``has_gauss``).
    """
    generator = numpy_random.get_bit_generator()
    if type(generator).__name__ != "MT19937":
        return None
    return generator, ctypes.string_at(generator.ctypes.state_address, 625 * 4)  # 624 words and the position


def _memory_of(generator: random.Random) -> bytes:
    head = object.__basicsize__
    return ctypes.string_at(id(generator) + head, random.Random.__mro__[1].__basicsize__ - head)


@cache
def _python_generator() -> Any:
    """The generator behind the functions of ``random``, if its memory shows what is drawn from it."""
    if sys.implementation.name != "cpython":
        return None
    probe = random.Random(0)
    before, state = _memory_of(probe), probe.getstate()
    probe.random()
    if _memory_of(probe) == before:
        return None
    probe.setstate(state)
    return getattr(random.getstate, "__self__", None) if _memory_of(probe) == before else None


def compiled_from(model: Any) -> Any:
    """The model that ``torch.compile`` was given; any other one as it is."""
    return getattr(model, "_orig_mod", model)


def hooks_of(ddp: Any) -> list[tuple[Any, Any]]:
    """The communication hook of a DistributedDataParallel and its state, if it has one, which it does not tell."""
    return list(getattr(ddp, "_comm_hooks", ()))


def is_joining(ddp: Any) -> bool:
    """Whether a DistributedDataParallel is within ``join()``. False where torch does not tell."""
    return bool(getattr(getattr(ddp, "_join_config", None), "enable", False))


def is_part_of_zero() -> bool:
    """Whether an optimizer is being made by a ZeroRedundancyOptimizer, for the parameters of one rank only."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if type(frame.f_locals.get("self")).__name__ == "ZeroRedundancyOptimizer":
            return True
    return False


def is_fsdp_flat(param: Tensor) -> bool:
    """Whether a parameter is a flat one of FullyShardedDataParallel, or one that lies in such."""
    return bool(getattr(param, "_fsdp_flattened", False))


def local_tensors(dtensors: Iterable[Any]) -> list[Tensor]:
    """What is here of DTensors, to look at only: ``to_local()`` makes a new tensor of each parameter, in 2 us."""
    dtensors = list(dtensors)
    try:
        return list(map(_local_tensor_of, dtensors))
    except AttributeError:
        return [dtensor.to_local().detach() for dtensor in dtensors]


_local_tensor_of = attrgetter("_local_tensor")


def _groups_of_fully_shard() -> Iterator[Any]:
    """The groups of parameters that fully_shard gathers together, of all models; none where torch does not tell."""
    states = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    for reference in list(states.values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None)  # in earlier versions one, or none
        groups = [getattr(state, "_fsdp_param_group", None)] if groups is None else groups
        yield from (group for group in groups if group is not None)


def fully_sharded(params: Iterable[Tensor]) -> list[Any]:
    """Those groups of fully_shard that have one of the parameters; ``is_unsharded`` tells whether one is gathered."""
    wanted = set(map(id, params))
    groups = _groups_of_fully_shard()
    return [group for group in groups if any(id(member.sharded_param) in wanted for member in group.fsdp_params)]


def gathered_by_fully_shard() -> set[int]:
    """The identities of the plain parameters that stand for shards in a model while fully_shard has gathered them."""
    members = (member for group in _groups_of_fully_shard() for member in group.fsdp_params)
    gathered = [getattr(member, "_unsharded_param", None) for member in members]
    return {id(param) for param in gathered if param is not None}


def makes_gradients_anew(group: Any) -> bool:
    """Whether the gradients of a group of fully_shard have memory of their own in every backward."""
    return type(getattr(group, "_reduce_scatter_comm", None)).__name__ == "DefaultReduceScatter"


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """Permit CUDA calls that allocate while any thread captures a graph, as torch's allocator of device memory does.

    torch has a guard for it in C++ only, so this asks the driver itself: on Linux with CUDA. Elsewhere it permits
    nothing, and a thread that pins memory while another one captures a graph makes that capture fail.
    """
    exchange = _exchange_capture_mode()
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED
    if exchange is not None:
        exchange(ctypes.byref(mode))  # leaves the former mode in its place
    try:
        yield
    finally:
        if exchange is not None:
            exchange(ctypes.byref(mode))


@cache
def _exchange_capture_mode() -> Any:
    """The driver's function, if there is such a driver."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return None
