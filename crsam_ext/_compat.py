"""All uses of private interfaces of other packages: the assumptions, and the fallback if an interface is missing.

Tested with torch 2.11 and 2.14, CPython 3.11 and NumPy 2; ``tests/test_compat.py`` has a test for each.
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

# Attributes of an optimizer that are private to torch: hooks, and the names of profiler ranges.
_TORCHS_OWN = ("_optimizer_", "_zero_grad_profile_name", "_warned_capturable_if_run_uncaptured")


def storage_is_shared(storage: torch.UntypedStorage) -> bool:
    """Return whether ``storage`` has users other than the caller's tensor: views, ``detach()``, a NumPy array.

    Return False if torch does not provide the reference count.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    return count is not None and count(storage._cdata) > 2  # two users are the tensor and ``storage`` itself


def segment(flat: Tensor, start: int, numel: int) -> Tensor:
    """Return a part of a 1-D tensor that has its own storage over the same memory.

    safetensors and Accelerate treat tensors with a common storage as tied: they save only one or refuse to save any.
    torch.save writes whole storages. It is undocumented that DLPack creates a storage for just this part.
    """
    return from_dlpack(flat[start : start + numel])


def mark_stepped(optimizer: Optimizer) -> None:
    """Mark the optimizer as stepped; otherwise an lr scheduler warns that it is called before the first step."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def attributes_of(optimizer: Optimizer) -> dict[str, Any]:
    """Return the attributes of an optimizer that belong in a copy: all except those that torch creates again."""
    return {name: value for name, value in vars(optimizer).items() if not name.startswith(_TORCHS_OWN)}


def mark_of_python() -> Any:
    """Return a value that changes whenever numbers are drawn from ``random``; None if it is unavailable.

    The value is the raw memory of the generator, which CPython stores after the object header. Reading it is ten times
    faster than ``random.getstate()``.
    """
    generator = _python_generator()
    return None if generator is None else (_memory_of(generator), generator.gauss_next)


def mark_of_numpy(numpy_random: Any) -> Any:
    """Return a value that changes with the global generator of ``numpy.random``; None if it is not MT19937.

    It does not include the cached second normal variate (``has_gauss`` of the state). Reading it is fifty times faster
    than reading the state.
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
    """Return the generator behind the functions of ``random``; None if its memory does not reflect its state."""
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
    """Return the model that was given to ``torch.compile``; any other model is returned unchanged."""
    return getattr(model, "_orig_mod", model)


def hooks_of(ddp: Any) -> list[tuple[Any, Any]]:
    """Return the communication hooks of a DistributedDataParallel with their states; there is no public accessor."""
    return list(getattr(ddp, "_comm_hooks", ()))


def is_joining(ddp: Any) -> bool:
    """Return whether a DistributedDataParallel is within ``join()``; False if torch does not expose this."""
    return bool(getattr(getattr(ddp, "_join_config", None), "enable", False))


def is_part_of_zero() -> bool:
    """Return whether a ZeroRedundancyOptimizer is creating the optimizer, for the parameters of one rank only."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if type(frame.f_locals.get("self")).__name__ == "ZeroRedundancyOptimizer":
            return True
    return False


def is_fsdp_flat(param: Tensor) -> bool:
    """Return whether a parameter is a flat parameter of FullyShardedDataParallel, or a view of one."""
    return bool(getattr(param, "_fsdp_flattened", False))


def local_tensors(dtensors: Iterable[Any]) -> list[Tensor]:
    """Return the local shards of DTensors, for reading only.

    This avoids ``to_local()``, which takes 2 us to create a new tensor per parameter.
    """
    dtensors = list(dtensors)
    try:
        return list(map(_local_tensor_of, dtensors))
    except AttributeError:
        return [dtensor.to_local().detach() for dtensor in dtensors]


_local_tensor_of = attrgetter("_local_tensor")


def _groups_of_fully_shard() -> Iterator[Any]:
    """Yield the parameter groups of fully_shard in all models; none if torch does not expose them."""
    states = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    for reference in list(states.values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None)  # earlier versions of torch have at most one group
        groups = [getattr(state, "_fsdp_param_group", None)] if groups is None else groups
        yield from (group for group in groups if group is not None)


def fully_sharded(params: Iterable[Tensor]) -> list[Any]:
    """Return the groups of fully_shard that contain any of the parameters; ``is_unsharded`` is True while gathered."""
    wanted = set(map(id, params))
    groups = _groups_of_fully_shard()
    return [group for group in groups if any(id(member.sharded_param) in wanted for member in group.fsdp_params)]


def gathered_by_fully_shard() -> set[int]:
    """Return the ids of the plain parameters that replace the DTensors in a model while fully_shard gathers them."""
    members = (member for group in _groups_of_fully_shard() for member in group.fsdp_params)
    gathered = [getattr(member, "_unsharded_param", None) for member in members]
    return {id(param) for param in gathered if param is not None}


def makes_gradients_anew(group: Any) -> bool:
    """Return whether every backward allocates new memory for the gradients of a group of fully_shard."""
    return type(getattr(group, "_reduce_scatter_comm", None)).__name__ == "DefaultReduceScatter"


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """Permit CUDA calls that allocate memory while any thread captures a graph, as torch's device allocator does.

    torch has this guard in C++ only, so this function calls the driver, on Linux with CUDA. On other platforms it is a
    no-op: if one thread pins memory while another one captures a graph, the capture fails.
    """
    exchange = _exchange_capture_mode()
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED
    if exchange is not None:
        exchange(ctypes.byref(mode))  # stores the previous mode in its argument
    try:
        yield
    finally:
        if exchange is not None:
            exchange(ctypes.byref(mode))


@cache
def _exchange_capture_mode() -> Any:
    """Return the function of the CUDA driver; None if there is no driver."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return None
