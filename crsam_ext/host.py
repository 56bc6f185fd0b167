"""Per-tensor host work of a step, batched into one call per list of tensors.

The extension, if it was built, has compiled versions of these functions (csrc/host.cpp). The attribute
:attr:`~crsam_ext.ops.Operators.host` of a backend selects one of the two.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain, repeat
from operator import attrgetter, is_not
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

__all__ = [
    "Column",
    "Groups",
    "Host",
    "clear_gradients",
    "fingerprint",
    "mark_written",
    "places",
    "repeats_memory",
    "set_gradients",
    "share_memory",
    "take_gradients",
    "unbind",
]


class Host(Protocol):
    """The interface of this module and of its compiled version."""

    Column: Any
    Groups: Any
    clear_gradients: Any
    fingerprint: Any
    mark_written: Any
    places: Any
    repeats_memory: Any
    set_gradients: Any
    share_memory: Any
    take_gradients: Any
    unbind: Any

    def __hash__(self) -> int: ...


# map() keeps the loop in C.
_grad_of, _shape_of, _dtype_of, _device_of, _nbytes_of, _requires_grad_of = map(
    attrgetter, ("grad", "shape", "dtype", "device", "nbytes", "requires_grad")
)


class Column(list[Any]):
    """An immutable list of tensors (or None) with cached metadata."""

    @cached_property
    def numels(self) -> bytes:
        """The number of elements of each tensor as int64; 0 for None."""
        return array("q", (0 if x is None else x.numel() for x in self)).tobytes()

    @cached_property
    def addresses(self) -> bytes:
        """The address of each tensor as int64; 0 for None and for a tensor without elements."""
        return array("q", (0 if x is None or not x.numel() else x.data_ptr() for x in self)).tobytes()

    @cached_property
    def kind(self) -> tuple[torch.dtype, torch.device] | None:
        """The common dtype and device; None if they differ, or if a tensor is missing or not contiguous."""
        if not self or not all(map(is_not, self, repeat(None))) or not all(map(Tensor.is_contiguous, self)):
            return None
        dtypes, devices = set(map(_dtype_of, self)), set(map(_device_of, self))
        return (*dtypes, *devices) if len(dtypes) == len(devices) == 1 else None

    @cached_property
    def _pointers(self) -> frozenset[int]:
        return frozenset(x.data_ptr() for x in self if x is not None and x.numel())

    @cached_property
    def _layout(self) -> tuple[list[int], list[tuple[int, ...]]]:
        return list(map(_nbytes_of, self)), list(map(Tensor.stride, self))


class Groups(list[int]):
    """The group of each row: an immutable list with cached metadata."""

    @cached_property
    def numbers(self) -> bytes:
        """The groups as int64."""
        return array("q", self).tobytes()

    @cached_property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest group."""
        return min(self, default=0), max(self, default=0)


def take_gradients(params: Column, views: bool) -> Column | None:
    """Take the gradients of all parameters out of ``p.grad`` without a copy, if this is safe for each of them.

    It is safe for a dense tensor with its own storage that has the dtype and memory order of the parameter. The next
    backward may overwrite the memory of a view, as DistributedDataParallel does with its buckets. The gradient must not
    share the memory of the parameter, which is about to be perturbed.

    Args:
        params: parameters of one dtype and device, without gaps in their memory.
        views: whether views are safe, because no backward runs before they are used.
    Returns:
        The gradients. If one is missing or must be copied, all stay in ``p.grad``, and the result is None.
    """
    grads: Any = Column(map(_grad_of, params))
    if not all(map(is_not, grads, repeat(None))):
        return None
    nbytes, strides = params._layout
    try:
        ours = (
            (views or _own_storages(grads, nbytes))
            and list(map(Tensor.stride, grads)) == strides
            and not any(map(_requires_grad_of, grads))
            and params._pointers.isdisjoint(grads._pointers)
            # The sizes in bytes are equal already, but that does not distinguish float16 from bfloat16.
            and set(map(_dtype_of, grads)) == {params[0].dtype}
        )
    except RuntimeError:  # a sparse tensor has neither storage nor strides
        return None
    if not ours:
        return None
    clear_gradients(params)
    grads.kind = params[0].dtype, params[0].device  # without gaps, although perhaps not contiguous
    return grads


def _own_storages(tensors: list[Tensor], nbytes: list[int]) -> bool:
    """Return whether each tensor has its own storage, of ``nbytes``. A view counts as shared even if it is complete."""
    storages = map(Tensor.untyped_storage, tensors)
    return [storage.nbytes() for storage in storages] == nbytes and not any(map(Tensor._is_view, tensors))


def set_gradients(params: Column, grads: Sequence[Tensor | None]) -> None:
    """Assign ``grads`` to the ``grad`` of all parameters."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def clear_gradients(params: list[Tensor]) -> None:
    """Set ``p.grad`` to None for all parameters."""
    for param in params:
        param.grad = None


def share_memory(tensors: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    """Return whether any tensor has the same address as a tensor of the other list."""
    x, y = (c._pointers if isinstance(c, Column) else Column(c)._pointers for c in (tensors, others))
    return not x.isdisjoint(y)


def repeats_memory(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether two tensors of a list have the same address."""
    x = tensors if isinstance(tensors, Column) else Column(tensors)
    return len(x._pointers) < sum(1 for tensor in x if tensor is not None and tensor.numel())


def places(tensors: list[Tensor]) -> list[Any]:
    """Return a comparable value made of the addresses, shapes, strides and dtypes of all tensors."""
    getters = (Tensor.data_ptr, _shape_of, Tensor.stride, _dtype_of)
    return [list(map(getter, tensors)) for getter in getters]


def fingerprint(by_group: Sequence[list[Tensor]], state: Mapping[Any, Any]) -> Any:
    """Return a comparable value: the parameters of each group, their places, and the ids of all values of the state."""
    params = list(chain.from_iterable(by_group))
    kept = {key: x for key, x in state.items() if type(x) is dict}  # some optimizers store plain numbers in the state
    return [
        list(map(len, by_group)),
        list(map(id, params)),
        *places(params),
        list(map(id, kept)),
        list(chain.from_iterable(kept.values())),
        list(map(id, chain.from_iterable(map(dict.values, kept.values())))),
    ]


def mark_written(*written: Any) -> None:
    """Bump the autograd versions of tensors, so that a backward that needs the old values raises an error.

    Args:
        written: tensors, lists of tensors or None, and lists of such lists.
    """
    for x in written:
        if isinstance(x, list) and x and isinstance(x[0], list):
            mark_written(*x)
        else:
            increment_version(x if isinstance(x, Tensor) else [tensor for tensor in x if tensor is not None])


def unbind(numbers: Tensor) -> tuple[Tensor, ...]:
    """Return the elements of a 1-D tensor as 0-dim views."""
    return numbers.unbind()
