"""What a step does for every tensor on the host, in one call for all of them.

The extension has the same functions compiled (csrc/host.cpp), where it was built. Which of the two a backend works with
is its :attr:`~crsam_ext.ops.Operators.host`.
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
    """The functions of this module, as a backend has them: these or the compiled ones."""

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


# Mapped, a loop runs in C.
_grad_of, _shape_of, _dtype_of, _device_of, _nbytes_of, _requires_grad_of = map(
    attrgetter, ("grad", "shape", "dtype", "device", "nbytes", "requires_grad")
)


class Column(list[Any]):
    """A list of tensors, or None, that nobody changes: what is to be known about it is worked out once."""

    @cached_property
    def numels(self) -> bytes:
        """Of each tensor the number of elements as int64, 0 for None."""
        return array("q", (0 if x is None else x.numel() for x in self)).tobytes()

    @cached_property
    def addresses(self) -> bytes:
        """Of each tensor the address as int64, 0 for None and for one without elements."""
        return array("q", (0 if x is None or not x.numel() else x.data_ptr() for x in self)).tobytes()

    @cached_property
    def kind(self) -> tuple[torch.dtype, torch.device] | None:
        """Dtype and device of all of them; None if they differ, or one is missing or has gaps in its memory."""
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
    """The group of each row, a list that nobody changes."""

    @cached_property
    def numbers(self) -> bytes:
        """The groups as int64."""
        return array("q", self).tobytes()

    @cached_property
    def limits(self) -> tuple[int, int]:
        """The least and the greatest of them."""
        return min(self, default=0), max(self, default=0)


def take_gradients(params: Column, views: bool) -> Column | None:
    """Take the gradients of all parameters out of ``p.grad``, if each is ours to hold as it is.

    That is a dense tensor of the parameter's dtype and memory order, with a storage of its own: the memory of a view
    may be written again by the next backward, as DistributedDataParallel does with its buckets. Nor may it be the
    parameter's own memory, which is about to move.

    Args:
        params: of one dtype and device, without gaps in their memory.
        views: whether views may be held: there will be no backward before they are used.
    Returns:
        The gradients; None, and they stay, if one is missing or not ours to hold.
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
            # As many elements in as many bytes: two dtypes of one size can be taken for one another.
            and set(map(_dtype_of, grads)) == {params[0].dtype}
        )
    except RuntimeError:  # a sparse one has neither storage nor strides
        return None
    if not ours:
        return None
    clear_gradients(params)
    grads.kind = params[0].dtype, params[0].device  # without gaps too, though perhaps in another order
    return grads


def _own_storages(tensors: list[Tensor], nbytes: list[int]) -> bool:
    """Whether each tensor has a storage of its own, of so many bytes. A view is one even where it is all of another."""
    storages = map(Tensor.untyped_storage, tensors)
    return [storage.nbytes() for storage in storages] == nbytes and not any(map(Tensor._is_view, tensors))


def set_gradients(params: Column, grads: Sequence[Tensor | None]) -> None:
    """Make ``grads`` the gradients of all parameters."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def clear_gradients(params: list[Tensor]) -> None:
    """Leave no gradient in ``p.grad``."""
    for param in params:
        param.grad = None


def share_memory(tensors: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    """Whether a tensor begins where one of another list does."""
    x, y = (c._pointers if isinstance(c, Column) else Column(c)._pointers for c in (tensors, others))
    return not x.isdisjoint(y)


def repeats_memory(tensors: Sequence[Tensor | None]) -> bool:
    """Whether two tensors of a list begin at the same address."""
    x = tensors if isinstance(tensors, Column) else Column(tensors)
    return len(x._pointers) < sum(1 for tensor in x if tensor is not None and tensor.numel())


def places(tensors: list[Tensor]) -> list[Any]:
    """Addresses, shapes, strides and dtypes of all tensors, as a value that is equal to another if they are."""
    getters = (Tensor.data_ptr, _shape_of, Tensor.stride, _dtype_of)
    return [list(map(getter, tensors)) for getter in getters]


def fingerprint(by_group: Sequence[list[Tensor]], state: Mapping[Any, Any]) -> Any:
    """Which parameters the groups have and where they are, and the identities of all that their state holds."""
    params = list(chain.from_iterable(by_group))
    kept = {key: x for key, x in state.items() if type(x) is dict}  # some optimizers keep numbers of their own beside
    return [
        list(map(len, by_group)),
        list(map(id, params)),
        *places(params),
        list(map(id, kept)),
        list(chain.from_iterable(kept.values())),
        list(map(id, chain.from_iterable(map(dict.values, kept.values())))),
    ]


def mark_written(*written: Any) -> None:
    """Tell autograd that tensors changed, or lists of them: a backward that still needs the old values then raises.

    Args:
        written: tensors, lists of tensors or None, and lists of such lists.
    """
    for x in written:
        if isinstance(x, list) and x and isinstance(x[0], list):
            mark_written(*x)
        else:
            increment_version(x if isinstance(x, Tensor) else [tensor for tensor in x if tensor is not None])


def unbind(numbers: Tensor) -> tuple[Tensor, ...]:
    """The numbers of a 1-D tensor as 0-dim views."""
    return numbers.unbind()
