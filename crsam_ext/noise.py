"""The random numbers of a step: all passes draw the same ones."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["RandomState", "SharedNoise"]


class _Generator(NamedTuple):
    get_state: Callable[[], Any]
    set_state: Callable[[Any], Any]


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
        self._generators.append(_Generator(random.getstate, random.setstate))
        numpy_random = sys.modules.get("numpy.random")
        if numpy_random is not None:  # nobody can draw from a module that was not imported
            self._generators.append(_Generator(partial(numpy_random.get_state, legacy=False), numpy_random.set_state))
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
    if isinstance(x, Tensor):
        return torch.equal(x, y)
    if isinstance(x, dict):  # NumPy's, which holds an array
        return all(_equal(x[key], y[key]) for key in x)
    return bool(x.tobytes() == y.tobytes()) if hasattr(x, "tobytes") else bool(x == y)
