"""Bytes that kernels read, kept on the device and copied there only when they change."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from crsam_ext._compat import relaxed_capture


class TableCache:
    """Tables by their content.

    The copy is asynchronous, through pinned memory. What was copied on a stream serves that stream only, so that a
    later kernel there finds it complete, and memory that is given up is reused in order.

    A graph repeats the copies that were captured. So while one is captured nothing is looked up or stored: the table is
    made anew, and its pinned source stays unchanged for the rest of the process: nobody tells when a graph is gone.
    """

    LIMIT = 256  # entries; some 10 are in use in a training loop

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()
        self._captured: list[tuple[Tensor, Tensor]] = []
        self._lock = threading.RLock()  # what is built may be made of another entry

    def get(
        self,
        key: Hashable,
        device: torch.device,
        build: Callable[[], bytes],
        view: Callable[[Tensor], Any] = lambda table: table,
    ) -> Any:
        """What ``build`` returns, as uint8 on the device, through ``view``; equal keys must stand for equal bytes."""
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
                # Its allocator waits for the copy before it gives the pinned memory away.
                table = _pinned(build()).to(device, non_blocking=True)
            else:
                table = torch.frombuffer(bytearray(build()), dtype=torch.uint8)
            self._entries[key] = view(table)
            if len(self._entries) > self.LIMIT:
                self._entries.popitem(last=False)
            return self._entries[key]


def _pinned(content: bytes) -> Tensor:
    with relaxed_capture():  # pinning memory is no work of a stream, and allowed while any thread captures a graph
        source = torch.empty(len(content), dtype=torch.uint8, device="cpu", pin_memory=True)
    return source.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
