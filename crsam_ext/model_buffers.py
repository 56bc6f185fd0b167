"""The buffers of a model during a step: every pass sees the same values, and only the first pass changes them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["ModelBuffers", "Snapshot"]

_Held = list[tuple[nn.Module, dict[str, Tensor | None]]]  # the modules and their buffers (references, not copies)


class ModelBuffers:
    """Undoes the changes that the later passes of a step make to the buffers of a model.

    Such buffers are the running statistics of normalization layers, the vectors of spectral norm, and the ranges of
    quantization observers. This works on the buffers, not on ``momentum`` or ``track_running_stats`` of known layers,
    so it is exact for every layer of every library and does not trigger recompilation. The model is traversed in each
    step, so layers may be added and replaced. If a forward replaces a buffer by another tensor, that is undone too.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before, self._after = Snapshot(model), Snapshot(model)

    def begin(self) -> None:
        """Take a snapshot from which the other passes will start. Call before the first pass."""
        self._before.take()

    def rewind(self) -> None:
        """Restore the buffers from which the other passes start. Call before each of these.

        If :meth:`begin` was not called, they start from the buffers that the first pass left.
        """
        if not self._after.taken:
            self._after.take()
        (self._before if self._before.taken else self._after).put()

    def end(self) -> None:
        """Restore the buffers that the first pass left. Call after the step, or when it is abandoned."""
        if self._after.taken:
            self._after.put()
        self._before.taken = self._after.taken = False


class Snapshot:
    """A snapshot of the buffers of a model. Its memory is reused by the next one.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._held: _Held = []
        self._copies: list[tuple[list[Tensor], list[Tensor]]] = []  # buffers and their values, by device and dtype
        self.taken = False

    def take(self) -> None:
        """Copy the current buffers."""
        held = [(module, dict(module._buffers)) for module in _modules(self._model)]
        if not _same(held, self._held) or not self._fits():
            groups: dict[object, dict[int, Tensor]] = {}
            for buffer in (buffer for _, buffers in held for buffer in buffers.values()):
                if buffer is not None and _is_writable(buffer):
                    groups.setdefault((buffer.device, buffer.dtype), {})[id(buffer)] = buffer
            self._copies = [(list(g.values()), list(map(torch.empty_like, g.values()))) for g in groups.values()]
        self._held, self.taken = held, True
        with torch.no_grad():
            for buffers, values in self._copies:
                torch._foreach_copy_(values, buffers)

    def put(self) -> None:
        """Restore the buffers: the same tensors, under the same names, with the same values."""
        for module, buffers in self._held:
            if not _same([(module, module._buffers)], [(module, buffers)]):
                module._buffers.clear()
                module._buffers.update(buffers)
        with torch.no_grad():
            for written, values in self._copies:
                for buffer, value in zip(written, values, strict=True):
                    if not _alike(buffer, value):  # resized in place, as observers do in their first batch
                        buffer.data = torch.empty_like(value)
                torch._foreach_copy_(written, values)

    def _fits(self) -> bool:
        return all(all(map(_alike, buffers, values)) for buffers, values in self._copies)


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a model. This is faster than ``modules()``, which builds every name."""
    seen: set[int] = set()
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            stack.extend(child for child in module._modules.values() if child is not None)


def _same(held: _Held, others: _Held) -> bool:
    """Whether the same modules hold the same tensors under the same names."""
    return len(held) == len(others) and all(
        module is other and len(x) == len(y) and all(name in y and y[name] is buffer for name, buffer in x.items())
        for (module, x), (other, y) in zip(held, others, strict=True)
    )


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
