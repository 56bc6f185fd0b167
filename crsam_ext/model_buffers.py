"""The buffers of a model during a step: every pass finds the same ones, and the first pass decides what is left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["ModelBuffers"]


class ModelBuffers:
    """Whatever a forward changes in the buffers of a model: running statistics of normalization layers, the vectors of
    spectral norm, the ranges of quantization observers.

    Works on the buffers rather than on ``momentum`` or ``track_running_stats`` of known layers: exact for every layer
    and every library, and invisible to ``torch.compile``. The model is traversed in each step, so layers may be added
    and replaced. A buffer that a forward replaces by another tensor is put back as well.

    Args:
        model: its buffers are looked after.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before, self._after = _Snapshot(model), _Snapshot(model)

    def begin(self) -> None:
        """Call before the first pass: the other passes will start from these buffers."""
        self._before.take()

    def rewind(self) -> None:
        """Call before each of the other passes.

        Where :meth:`begin` was not called, they start from the buffers that the first pass left.
        """
        if not self._after.taken:
            self._after.take()
        (self._before if self._before.taken else self._after).put()

    def end(self) -> None:
        """Call after the step, or when it is abandoned: the buffers are what the first pass left."""
        if self._after.taken:
            self._after.put()
        self._before.taken = self._after.taken = False


class _Entry(NamedTuple):
    module: nn.Module
    name: str
    buffer: Tensor | None


class _Snapshot:
    """The buffers of a model at one moment. Its memory is kept from one step to the next."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._entries: list[_Entry] = []
        self._copies: list[tuple[list[Tensor], list[Tensor]]] = []  # buffers and their values, by device and dtype
        self.taken = False

    def take(self) -> None:
        entries = list(_entries(self._model))
        if list(map(_identity, entries)) != list(map(_identity, self._entries)) or not self._fits():
            groups: dict[object, dict[int, Tensor]] = {}
            for buffer in (entry.buffer for entry in entries):
                if buffer is not None and _is_writable(buffer):
                    groups.setdefault((buffer.device, buffer.dtype), {})[id(buffer)] = buffer
            self._copies = [(list(g.values()), list(map(torch.empty_like, g.values()))) for g in groups.values()]
        self._entries, self.taken = entries, True
        with torch.no_grad():
            for buffers, values in self._copies:
                torch._foreach_copy_(values, buffers)

    def put(self) -> None:
        for module, name, buffer in self._entries:
            if name in module._buffers and module._buffers[name] is not buffer:
                module._buffers[name] = buffer
        with torch.no_grad():
            for buffers, values in self._copies:
                for buffer, value in zip(buffers, values, strict=True):
                    if not _alike(buffer, value):  # resized in place, as an observer does with its first batch
                        buffer.data = torch.empty_like(value)
                torch._foreach_copy_(buffers, values)

    def _fits(self) -> bool:
        return all(all(map(_alike, buffers, values)) for buffers, values in self._copies)


def _entries(model: nn.Module) -> Iterator[_Entry]:
    """The buffers of all modules. Faster than ``named_buffers()``, which puts together every name."""
    seen: set[int] = set()
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for name, buffer in module._buffers.items():
            yield _Entry(module, name, buffer)
        stack.extend(child for child in module._modules.values() if child is not None)


def _identity(entry: _Entry) -> tuple[int, str, int]:
    return id(entry.module), entry.name, id(entry.buffer)


def _alike(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and x.device == y.device


def _is_writable(buffer: Tensor) -> bool:
    """Whether a forward can change the values of a buffer in place, so that they need a copy."""
    if is_lazy(buffer) or buffer.is_meta or buffer.is_inference():
        return False
    expanded = buffer.layout == torch.strided and any(
        stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
    )
    return not expanded
