"""Stopping on signals, and agreeing on the step after which all processes of a run stop or save."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from .errors import RESUME_ME, Stopped
from .ranks import Ranks

_NOTHING, _SAVE, _STOP, _INTERRUPT = range(4)
_SIGNALS = {
    name: request
    for name, request in (("SIGTERM", _STOP), ("SIGUSR1", _STOP), ("SIGINT", _INTERRUPT))
    if hasattr(signal, name)
}


class Requests:
    """Requests to stop or save. After each step, all processes agree on them.

    A request to one process reaches the others through an all-reduce on the CPU, which runs concurrently with the step.
    So it costs no time, and takes effect after the current step or the next one.

    Args:
        ranks: the processes of the run.
        save_minutes: minutes between two checkpoints.
    """

    def __init__(self, ranks: Ranks, save_minutes: float) -> None:
        self._ranks, self._period = ranks, 60 * save_minutes
        self._asked, self._saved = _NOTHING, time.monotonic()
        self._group: Any = dist.new_group(backend="gloo") if ranks.size > 1 else None
        self._work: Any = None
        self._flag = torch.zeros((), dtype=torch.int64)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Treat signals as requests within the context; a second SIGINT acts immediately.

        The context must last until the files are closed: when one process ends, torchrun sends SIGTERM to all others,
        including the one that is still writing.
        """
        before = {}

        def handle(number: int, frame: FrameType | None) -> None:
            self._asked = max(self._asked, _SIGNALS[signal.Signals(number).name])
            if number == signal.SIGINT:
                signal.signal(number, signal.default_int_handler)

        for name in _SIGNALS:
            before[name] = signal.signal(getattr(signal, name), handle)
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler)

    def begin_step(self) -> None:
        """Call before a step."""
        if self._group is not None:
            self._flag.fill_(self._own())
            self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)

    def end_step(self) -> None:
        """Call after a step. The requests are then the same on all processes."""
        if self._group is None:
            self._flag.fill_(self._own())
        else:
            self._work.wait()

    def _own(self) -> int:
        """Return the request to this process. Only rank 0 checks whether a checkpoint is due."""
        due = self._ranks.is_first and time.monotonic() - self._saved > self._period
        return max(self._asked, _SAVE if due else _NOTHING)

    @property
    def save(self) -> bool:
        """Whether a checkpoint must be written."""
        return self._flag.item() != _NOTHING

    def saved(self) -> None:
        """Record that a checkpoint has been written."""
        self._saved = time.monotonic()

    def raise_if_stopped(self, step: int) -> None:
        """Raise an exception that ends the run, if a stop was requested.

        Raises:
            Stopped: a stop was requested.
        """
        flag = self._flag.item()
        if flag in (_STOP, _INTERRUPT):
            status = RESUME_ME if flag == _STOP else 130
            raise Stopped(f"stopped after step {step} on request; --resume continues from there", status)
