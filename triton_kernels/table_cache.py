"""Caches bytes for kernels on the device, so that they are copied only if they change."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from crsam_ext._compat import relaxed_capture


class TableCache:
    """A cache of tables by their content.

    The copy is asynchronous, through pinned memory. An entry is valid only for the stream of its copy, so that later
    kernels on this stream run after the copy, and freed memory is reused in order.

    A graph replays captured copies. So the cache is not used during a capture: every table is built again, and its
    pinned source is never freed or changed, because there is no callback when a graph is destroyed.
    """

    LIMIT = 256  # entries; a training loop uses about 10

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()
        self._captured: list[tuple[Tensor, Tensor]] = []
        self._lock = threading.RLock()  # reentrant, because `view` may get another entry

    def get(
        self,
        key: Hashable,
        device: torch.device,
        build: Callable[[], bytes],
        view: Callable[[Tensor], Any] = lambda table: table,
    ) -> Any:
        """Return ``view`` of the bytes of ``build``, as uint8 on the device. Equal keys must mean equal bytes."""
        on_gpu = device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            source = _pinned(build())
            table = source.to(device, non_blocking=True)
            self._captured.append((table, source))
            return view(table)
        key = (key, device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0)
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
            if on_gpu:
                # The pinned allocator reuses the source's memory only after the copy.
                table = _pinned(build()).to(device, non_blocking=True)
            else:
                table = torch.frombuffer(bytearray(build()), dtype=torch.uint8)
            self._entries[key] = view(table)
            if len(self._entries) > self.LIMIT:
                self._entries.popitem(last=False)
            return self._entries[key]


def _pinned(content: bytes) -> Tensor:
    with relaxed_capture():  # pinning memory is not a stream operation, so it can be permitted during a capture
        source = torch.empty(len(content), dtype=torch.uint8, device="cpu", pin_memory=True)
    return source.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
