"""The random numbers of a step: all passes draw the same ones."""

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
    """A global generator of random numbers, whose state is read only where it has changed.

    Args:
        get_state, set_state: its functions.
        mark: a value that changes with the state, and takes less time, given the last state; None where only the state
            tells.
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
    """The states of the global random number generators at one moment.

    These are the generators of torch, on the CPU and on ``devices``, of Python's ``random``, and of ``numpy.random``.
    Any other generator, such as a ``torch.Generator`` or ``numpy.random.default_rng()``, belongs to whoever made it.

    Args:
        devices: whose generators are included; the CPU's always is.
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
        if numpy_random is not None:  # nobody can draw from a module that was not imported
            self._generators.append(_numpy(numpy_random))
        self.states = self.now()

    def now(self) -> list[Any]:
        """The present states of the generators."""
        return [generator.get_state() for generator in self._generators]

    def set(self, states: Sequence[Any], which: Sequence[bool] | None = None) -> None:
        """Set the generators to ``states``, all or those that ``which`` selects."""
        pairs = zip(self._generators, states, strict=True)
        for generator, state in pairs if which is None else compress(pairs, which):
            generator.set_state(state)

    def restore(self) -> None:
        """Set all generators back."""
        self.set(self.states)


class SharedNoise:
    """Replays the random numbers of the first pass in the other passes.

    Every pass then has the same dropout masks; otherwise the finite differences would measure the masks. What is
    replayed is a :class:`RandomState`. The global generators are one for all threads: a thread that draws from them
    while a step runs sees some numbers twice.

    Args:
        devices: of the parameters.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._before = RandomState(devices)
        self._after: list[Any] | None = None
        self._used: list[bool] = []

    @property
    def drawn(self) -> bool:
        """Whether any random numbers have been drawn."""
        return not all(map(_equal, self._before.now(), self._before.states))

    def repeat(self) -> None:
        """Begin another pass: go back to the state before the first."""
        if self._after is None:
            self._after = self._before.now()
            # Setting a state of Python's or NumPy's takes up to 0.1 ms, and few models draw from them.
            pairs = zip(self._after, self._before.states, strict=True)
            self._used = [isinstance(now, Tensor) or not _equal(now, before) for now, before in pairs]
        self._before.set(self._before.states, self._used)

    def end(self) -> None:
        """End the last pass: go on from the state after the first."""
        if self._after is not None:
            self._before.set(self._after, self._used)


def _equal(x: Any, y: Any) -> bool:
    """Whether two states of one generator are equal."""
    if x is y:
        return True
    if isinstance(x, Tensor):
        return torch.equal(x, y)
    if isinstance(x, dict):  # NumPy's, which holds an array
        return all(_equal(x[key], y[key]) for key in x)
    return bool(x.tobytes() == y.tobytes()) if hasattr(x, "tobytes") else bool(x == y)
