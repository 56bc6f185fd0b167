"""The random numbers of a step: all passes draw the same numbers."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from ._compat import mark_of_numpy, mark_of_python

__all__ = ["RandomState", "SharedNoise"]


class _Generator:
    """A global random number generator, whose state is read only if it has changed.

    Args:
        get_state, set_state: functions that read and set the state.
        mark: given the last state, returns a value that is cheaper to read than the state and changes with it, or None
            if there is no such value.
    """

    def __init__(
        self, get_state: Callable[[], Any], set_state: Callable[[Any], Any], mark: Callable[[Any], Any] = lambda _: None
    ) -> None:
        self._get_state, self._set_state, self._mark_after = get_state, set_state, mark
        self._state: Any = None
        self._mark: Any = None

    def get_state(self) -> Any:
        mark = self._mark_after(self._state)
        if mark is None or mark != self._mark:
            self._state, self._mark = self._get_state(), mark
        return self._state

    def set_state(self, state: Any) -> None:
        self._set_state(state)


@cache
def _python() -> _Generator:
    return _Generator(random.getstate, random.setstate, lambda _: mark_of_python())


@cache
def _numpy(module: Any) -> _Generator:
    def mark(last: Any) -> Any:
        return None if last is not None and last.get("has_gauss") else mark_of_numpy(module)

    return _Generator(partial(module.get_state, legacy=False), module.set_state, mark)


class RandomState:
    """A snapshot of the global random number generators.

    It covers the generators of torch, on the CPU and on ``devices``, Python's ``random``, and ``numpy.random`` if it
    has been imported. It does not cover other generators, such as a ``torch.Generator`` or
    ``numpy.random.default_rng()``.

    Args:
        devices: devices whose generators are included; that of the CPU always is.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._generators = [_Generator(torch.default_generator.get_state, torch.default_generator.set_state)]
        for device in devices:
            if device.type not in ("cpu", "meta"):
                module = torch.get_device_module(device)
                get_state, set_state = module.get_rng_state, module.set_rng_state
                self._generators.append(_Generator(partial(get_state, device), partial(set_state, device=device)))
        self._generators.append(_python())
        numpy_random = sys.modules.get("numpy.random")
        if numpy_random is not None:  # if it was not imported, no number was drawn from it
            self._generators.append(_numpy(numpy_random))
        self.states = self.now()

    def now(self) -> list[Any]:
        """Return the current states of the generators."""
        return [generator.get_state() for generator in self._generators]

    def set(self, states: Sequence[Any], which: Sequence[bool] | None = None) -> None:
        """Set all generators, or those that ``which`` selects, to ``states``."""
        pairs = zip(self._generators, states, strict=True)
        for generator, state in pairs if which is None else compress(pairs, which):
            generator.set_state(state)

    def restore(self) -> None:
        """Set all generators to the states of the snapshot."""
        self.set(self.states)


class SharedNoise:
    """Replays the random numbers of the first pass in the other passes.

    Every pass then has the same dropout masks. With different masks, the finite differences would measure the masks.
    The generators of a :class:`RandomState` are replayed. They are shared by all threads: a thread that draws from them
    during a step sees some numbers twice.

    Args:
        devices: devices of the parameters.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._before = RandomState(devices)
        self._after: list[Any] | None = None
        self._used: list[bool] = []

    @property
    def drawn(self) -> bool:
        """Whether any random numbers have been drawn since this object was created."""
        return not all(map(_equal, self._before.now(), self._before.states))

    def repeat(self) -> None:
        """Begin another pass: restore the state before the first pass."""
        if self._after is None:
            self._after = self._before.now()
            # Setting the state of Python's or NumPy's generator takes up to 0.1 ms, and few models draw from them.
            pairs = zip(self._after, self._before.states, strict=True)
            self._used = [isinstance(now, Tensor) or not _equal(now, before) for now, before in pairs]
        self._before.set(self._before.states, self._used)

    def end(self) -> None:
        """End the last pass: set the state after the first pass."""
        if self._after is not None:
            self._before.set(self._after, self._used)


def _equal(x: Any, y: Any) -> bool:
    """Whether two states of one generator are equal."""
    if x is y:
        return True
    if isinstance(x, Tensor):
        return torch.equal(x, y)
    if isinstance(x, dict):  # the state of NumPy, which contains an array
        return all(_equal(x[key], y[key]) for key in x)
    return bool(x.tobytes() == y.tobytes()) if hasattr(x, "tobytes") else bool(x == y)
