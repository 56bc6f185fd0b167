"""A step as a CUDA graph: one launch replays all forward and backward passes and the kernels between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .noise import SharedNoise
from .optimizer import CRSAM

__all__ = ["GraphedStep"]

# Options that schedulers change. They become tensors on the device, so every replay reads their current values.
_SCHEDULED = ("lr", "rho", "alpha", "beta")


class GraphedStep:
    """``optimizer.step(closure)``, captured in a CUDA graph and replayed.

    Every call takes one step. The first ``warmup`` steps run eagerly; then a step is captured, once per number of
    passes (see :attr:`crsam_ext.CRSAM.passes`). ``lr``, ``rho``, ``alpha`` and ``beta`` of the groups become tensors on
    the device, unless they are 0, so schedulers keep working, even those that assign numbers. After a change of any
    other option, or if one of these four changes from 0, one step runs eagerly and the next one is captured again. If
    parameters are moved or state is loaded, the warmup starts again.

    Args:
        optimizer: a CRSAM with SGD, Adam or AdamW as its base optimizer, backend "cuda" or "triton", and all parameters
            on one CUDA device.
        closure: as for :meth:`crsam_ext.CRSAM.step`. It must read the batch from the same tensors in every step and
            must not synchronize with the host. A replay does not run its Python code, nor that of hooks.
        warmup: number of eager steps before the capture, at least 1 (default: 3).
    Raises:
        ValueError: if the step cannot be captured, with the reason, or if ``warmup`` is less than 1.

    Example::

        x, y = torch.empty(256, 3, 224, 224, device="cuda"), torch.empty(256, dtype=torch.long, device="cuda")
        step = GraphedStep(optimizer, closure)  # the closure reads x and y
        for images, labels in loader:
            x.copy_(images)
            y.copy_(labels)
            loss = step()  # overwritten by the next step
            scheduler.step()
    """

    def __init__(self, optimizer: CRSAM, closure: Callable[[], Any], warmup: int = 3) -> None:
        reason = optimizer.capture_blocker()
        if reason is not None:
            raise ValueError(f"this step cannot be captured in a CUDA graph: {reason}")
        if warmup < 1:
            raise ValueError(f"warmup must be at least 1, but is {warmup}")
        self.optimizer, self.closure, self.warmup = optimizer, closure, warmup
        self.device = optimizer.param_groups[0]["params"][0].device
        self._stream = torch.cuda.Stream(self.device)
        self._tensors: dict[tuple[int, str], Tensor] = {}
        self._forget()

    def __call__(self) -> Any:
        """Take a step.

        Returns:
            What the closure returned at w. If it is a tensor, the next step overwrites it.
        """
        optimizer = self.optimizer
        self._options_to_device()
        if not optimizer.in_place:
            self._forget()
        passes, baked = optimizer.passes, self._baked()
        graph = self._graphs.get(passes)
        optimizer.prepare_replay(self.device)
        if graph is None or graph.baked != baked:
            # An eager step creates the state, and copies to the device the numbers that a captured step with the same
            # options reads.
            count, last = self._ordinary.get(passes, (0, None))
            if not optimizer.state_is_complete or count < self.warmup or last != baked:
                self._ordinary[passes] = count + 1, baked
                return self._on_stream(lambda: optimizer.step(self.closure))
            graph = self._graphs[passes] = _Graph(optimizer, self.closure, baked, self._stream, self.device)
        self._on_stream(graph.replay)
        return graph.loss

    def _on_stream(self, function: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def _forget(self) -> None:
        self._graphs: dict[int, _Graph] = {}  # by number of passes
        # By number of passes: the count of eager steps, and the options of the last one.
        self._ordinary: dict[int, tuple[int, Any]] = {}

    def _options_to_device(self) -> None:
        for index, group in enumerate(self.optimizer.param_groups):
            for name in _SCHEDULED:
                value = group[name]
                tensor = self._tensors.get((index, name))
                if value is tensor or (tensor is None and not isinstance(value, Tensor) and value == 0):
                    continue
                if tensor is None:
                    tensor = self._tensors[index, name] = torch.zeros((), dtype=torch.float64, device=self.device)
                tensor.copy_(value) if isinstance(value, Tensor) else tensor.fill_(value)
                group[name] = tensor

    def _baked(self) -> Any:
        """Return all options that a graph contains: numbers by value, tensors by identity, as replays read them."""
        optimizer = self.optimizer
        groups = [
            {
                name: id(value) if isinstance(value, Tensor) else value
                for name, value in group.items()
                if name not in ("params", "crsam_steps") and not name.startswith("initial_")
            }
            for group in optimizer.param_groups
        ]
        return groups, optimizer.max_grad_norm, optimizer.max_regularizer_ratio


class _Graph:
    """One captured step."""

    def __init__(
        self, optimizer: CRSAM, closure: Callable[[], Any], baked: Any, stream: torch.cuda.Stream, device: torch.device
    ) -> None:
        self.baked, self._stats = baked, optimizer.stats
        self._graph = torch.cuda.CUDAGraph()
        self._noise = _GraphNoise(self._graph, device, optimizer.passes)
        steps = self._stats.steps
        try:
            with torch.cuda.graph(self._graph, stream=stream):
                self.loss = optimizer.step(closure, noise=self._noise)
        finally:
            self._noise.end()
        self._measured = self._stats.snapshot()
        self._stats.steps = steps
        self._grads = [(param, param.grad) for group in optimizer.param_groups for param in group["params"]]

    def replay(self) -> None:
        self._noise.align()
        self._graph.replay()
        self._stats.replay(self._measured)
        for param, grad in self._grads:
            param.grad = grad


class _GraphNoise(SharedNoise):
    """:class:`crsam_ext.noise.SharedNoise` for a graph: one generator state per pass, advanced in lockstep.

    A graph identifies the states of a generator by their objects. Each state counts the numbers drawn from it, and a
    replay starts where the last one ended.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device, passes: int) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._generator = torch.cuda.default_generators[index]
        self._states = [self._generator.graphsafe_get_state()]
        self._states += [self._states[0].clone_state() for _ in range(passes - 1)]
        self._pass = 0
        for state in self._states:
            graph.register_generator_state(state)

    def repeat(self) -> None:
        self._pass += 1
        self._generator.graphsafe_set_state(self._states[self._pass])

    def end(self) -> None:
        self._generator.graphsafe_set_state(self._states[0])

    def align(self) -> None:
        """Set all states to the first one, because other code may have drawn numbers since the last replay."""
        first = self._states[0].get_state()
        for state in self._states[1:]:
            state.set_state(first)
