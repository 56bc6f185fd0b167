"""Measure one peer: time relative to a copy and to the loop, bytes, launches, memory, synchronizations."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crsam_ext.backends.fused import KERNELS
from crsam_ext.ops import PASSES

from .peers import Case, Phase, make
from .shapes import MODELS

__all__ = ["FUSED_LAUNCHES", "Contest", "Operations", "fused_bytes", "measure", "memory"]

_LEAST_COPY = 64 * 2**20  # bytes: a shorter copy would stay in a cache
#: CR-SAM: norm, scale, perturbation, norm (detects an overflow), perturbation, Gram matrix, coefficients, step. SAM:
#: norm, scale, perturbation, norm of the second gradient, coefficients, step.
FUSED_LAUNCHES = {"crsam": 8, "sam": 6}


def fused_bytes(case: Case, dtype: torch.dtype, gram: bool = True, gathered: bool = False) -> int:
    """Return the bytes that a fused step moves per parameter; benchmarks/README.md derives them.

    Args:
        gram: whether the Gram matrix is computed; if not, the norm of the last gradient shows whether it is finite.
        gathered: whether gradients are first copied into a buffer; they are then not checked for NaN or Inf.
    """

    def of(operator: str, *variant: int) -> int:
        return sum(KERNELS[operator].nbytes(dtype, *variant))

    buffers = 1 if case.base == "sgd" else 2
    norm, given = of("grad_norm"), case.passes if case.passes == PASSES else 1
    total = norm + of("perturb_", 1) + of("step_", given, buffers)
    if case.passes == PASSES:
        total += of("perturb_", -1)
    if gathered:
        return total + 2 * dtype.itemsize * case.passes
    if case.passes == PASSES:
        return total + norm + (of("fd_gram") if gram else norm)
    return total + norm


def _bytes_of(peer: str, case: Case, dtype: torch.dtype, counted: int, elements: int) -> tuple[int, str]:
    """Return the bytes of a step, and how they were determined."""
    if peer.startswith("crsam_ext"):
        return fused_bytes(case, dtype, gram="torch" not in peer) * elements, "derived"
    if peer == "flat, compiled":
        return fused_bytes(case, dtype, gathered=True) * elements, "derived"
    if peer == "torch, base alone":
        return dtype.itemsize * (5 if case.base == "sgd" else 7) * elements, "derived"
    return counted, "counted"


class Operations(TorchDispatchMode):
    """Counts PyTorch's operators, and the bytes of all tensors that they read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.nbytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        returns = function._schema.returns
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if views or torch.Tag.inplace_view in function.tags or "empty" in str(function):
            return result
        self.count += 1
        written = set()
        for given, argument in zip(args, function._schema.arguments, strict=False):
            tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
            writes = argument.alias_info is not None and argument.alias_info.is_write
            reads = not (writes and function._schema.name.endswith(("copy_", "zero_", "fill_")))
            self.nbytes += sum(x.nbytes for x in tensors) * (reads + writes)
            written |= {id(x) for x in tensors} if writes else set()
        for name, given in (kwargs or {}).items():
            if isinstance(given, Tensor):
                self.nbytes += given.nbytes
                written |= {id(given)} if name == "out" else set()
        self.nbytes += sum(x.nbytes for x in tree_leaves(result) if isinstance(x, Tensor) and id(x) not in written)
        return result


def memory(body: Callable[[], object]) -> tuple[int, int, int]:
    """Run ``body`` and return the peak of allocated bytes, the bytes held at its end, and the number of allocations.

    Earlier allocations are not included. On a CPU the numbers come from the events of torch's allocator, on a GPU from
    its counters.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, count = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["allocation.all.allocated"]
        body()
        torch.cuda.synchronize()
        counted = torch.cuda.memory_stats()["allocation.all.allocated"] - count
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before, counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        body()
    # The public list of events sums them up by operator.
    events = trace.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = allocations = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        now, allocations = now + change, allocations + (change > 0)
        peak = max(peak, now)
    return peak, now, allocations


def synchronisations(body: Callable[[], object], device: torch.device) -> int | str:
    """Return how often ``body`` makes the host wait for the device."""
    if device.type != "cuda":
        return "n/a"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            body()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


class Contest:
    """A peer, the loop and a copy on the same shapes and gradients.

    Args:
        model: a name in :data:`benchmarks.shapes.MODELS`.
        peer: a name in :data:`benchmarks.peers.PEERS`.
    """

    def __init__(self, model: str, peer: str, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.key = {"model": model, "method": case.method, "base": case.base, "peer": peer}
        self.key["dtype"] = str(dtype).removeprefix("torch.")
        self.case, self.dtype, self.device = case, dtype, device
        self.shapes = MODELS[model]()
        self.elements = sum(torch.Size(shape).numel() for shape in self.shapes)
        generator = torch.Generator(device).manual_seed(0)

        def tensors(scale: float) -> list[Tensor]:
            made = [torch.randn(s, generator=generator, device=device) for s in self.shapes]
            return [x.mul_(scale).to(dtype) for x in made]

        initial = tensors(0.05)
        self.gradients = [tensors(1e-3) for _ in range(case.passes)]
        # The copy has the size of this project's step, regardless of the peer.
        self.copied = fused_bytes(case, dtype) * self.elements
        n = max(self.elements * 4, _LEAST_COPY) // 4
        self._source, self._target = (torch.zeros(n, device=device) for _ in range(2))
        self.record: dict[str, Any] = {**self.key, "elements": self.elements, "seconds": [], "phases": [], "copy": []}
        self.record["loop"] = []
        self._loop = None if peer == "loop" else make("loop", [Parameter(x.clone()) for x in initial], case)
        self._peer: list[Phase] = []

        def begin() -> None:
            self._peer += make(peer, [Parameter(x.clone()) for x in initial], case)
            self.step()

        # Subtract the parameters, because a peer that moves them frees their old memory.
        parameters = self.elements * dtype.itemsize
        peak, held, _ = memory(begin)
        self.record["peak_bytes"], self.record["held_bytes"] = peak - parameters, held - parameters

    def step(self) -> None:
        """Make one step of the peer."""
        for phase, grads in zip(self._peer, self.gradients, strict=True):
            phase(grads)

    def timed_step(self) -> None:
        """Make a step and record the times of its phases."""
        self.record["phases"].append(self._phases(self._peer))

    def references(self) -> None:
        """Time the copy and the loop, just before the peer; the copy evicts other data from the caches."""
        if self._loop is not None:
            self.record["loop"].append(sum(self._phases(self._loop)))
        moved, began = 0, self._now()
        while moved < self.copied:
            self._target.copy_(self._source)
            moved += 2 * self._source.nbytes
        self.record["copy"].append((self._now() - began) * self.copied / moved)

    def _phases(self, phases: Sequence[Phase]) -> list[float]:
        times = [self._now()]
        for phase, grads in zip(phases, self.gradients, strict=True):
            phase(grads)
            times.append(self._now())
        return [end - begin for begin, end in pairwise(times)]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def finish(self, seconds: list[float]) -> dict[str, Any]:
        """Add the counters to the record and return it."""
        rounds = len(seconds)
        self.record["seconds"] = seconds
        for name in ("phases", "copy", "loop"):
            self.record[name] = self.record[name][-rounds:]
        if self._loop is None:
            self.record["loop"] = seconds
        operations = Operations()
        with _uncompiled(), operations:
            self.step()
        peer = self.key["peer"]
        fused = peer in ("crsam_ext cuda", "crsam_ext triton")
        self.record["bytes"], self.record["bytes_are"] = _bytes_of(
            peer, self.case, self.dtype, operations.nbytes, self.elements
        )
        self.record["operations"] = FUSED_LAUNCHES[self.case.method] if fused else operations.count
        if "compiled" in peer:
            self.record["operations"] = "n/a"  # one call for each row, with one or more loops
        self.record["floor_bytes"] = self.copied
        _, _, self.record["allocations"] = memory(self.step)
        self.record["synchronisations"] = synchronisations(self.step, self.device)
        return self.record


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Run compiled functions eagerly: a dispatch mode cannot see into them and would trigger recompilation."""
    with torch.compiler.set_stance("force_eager"):
        yield


def measure(model: str, peer: str, case: Case, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure without pytest-benchmark and return the record."""
    contest = Contest(model, peer, case, dtype, device)
    contest.step()
    for _ in range(rounds):
        contest.references()
        contest.timed_step()
    return contest.finish([sum(phases) for phases in contest.record["phases"]])
