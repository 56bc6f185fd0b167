"""Host time of a step: Python, dispatch, checks and tables of pointers, without launching kernels.

No GPU is needed. Backend "cuda" is its own C++ (csrc/) with empty launchers (empty_kernels.cpp); "triton" is its own
Python with Triton's launcher, which stops before it passes the compiled kernel to the driver. Both run on CPU tensors.
This omits two costs of a GPU: setting the current device, and the driver's part of the launches.

The floor is the work that no such optimizer can avoid, repeated with the arguments of a real step: reading and clearing
every ``p.grad`` in every pass, marking the parameters as written, returning g0, the calls that launch kernels, saving
and restoring the random state, and torch's own part of ``Optimizer.step``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from crsam_ext import CRSAM
from crsam_ext.backends import cuda, triton
from crsam_ext.noise import SharedNoise
from tests.cuda_on_cpu import build
from tests.triton_driver import without_gpu

__all__ = ["BACKENDS", "HostTime", "measure"]

ROOT = Path(__file__).parents[1]
BACKENDS = ("cuda", "triton")
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
    "sgd": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2}),
}


class HostTime(NamedTuple):
    """Processor seconds of this thread, one entry per round."""

    step: list[float]
    floor: list[float]


def measure(backend: str, base: str, shapes: Sequence[tuple[int, ...]], form: str, rounds: int) -> HostTime:
    """Measure the host time of a step of three passes.

    Args:
        backend: "cuda" or "triton".
        base: "sgd" (with momentum) or "adamw".
        shapes: shapes of the parameters. The time depends mainly on their number.
        form: "closure" for ``step(closure)``, "calls" for first_step, second_step and third_step.
        rounds: number of measured steps, each followed by a measurement of the floor.

    The measurement runs in a separate process, because operators can be registered only once per process.
    """
    arguments = json.dumps([backend, base, shapes, form, rounds])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.host", arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return HostTime(*json.loads(done.stdout.splitlines()[-1]))


def _measure(backend: str, base: str, shapes: Sequence[tuple[int, ...]], form: str, rounds: int) -> HostTime:
    torch.set_num_threads(1)
    with {"cuda": _empty_cuda, "triton": _empty_triton}[backend]():
        # Values are never read. As with autograd, the gradients of the three passes need different addresses.
        params = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]
        grads = [[torch.empty(shape) for shape in shapes] for _ in range(3)]
        cls, options = BASES[base]
        optimizer = CRSAM(params, cls, rho=0.1, backend=backend, **options)
        step = _step_of(optimizer, params, grads, form)
        for _ in range(3):
            step()
        floor = _floor_of(optimizer, params, grads, step)
        times = HostTime([], [])
        for index in range(-10, rounds):
            taken = step(), floor()
            if index >= 0:
                times.step.append(taken[0])
                times.floor.append(taken[1])
    return times


def _step_of(
    optimizer: CRSAM, params: list[torch.nn.Parameter], grads: list[list[Tensor]], form: str
) -> Callable[[], float]:
    """Return a function that makes a step and returns its time in seconds, without the assignment of gradients."""
    index, outside = 0, 0.0

    def assign() -> None:
        nonlocal index, outside
        began = time.thread_time()
        for p, g in zip(params, grads[index % 3], strict=True):
            p.grad = g
        index += 1
        outside += time.thread_time() - began

    def step() -> float:
        nonlocal outside
        began, outside = time.thread_time(), 0.0
        if form == "closure":
            optimizer.step(assign)
        else:
            for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
                assign()
                call(zero_grad=True)
        return time.thread_time() - began - outside

    return step


class _Nothing(torch.optim.Optimizer):
    """An optimizer that does nothing, to measure torch's own part of a step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        noise = SharedNoise(())
        for _ in range(2):
            noise.repeat()
        noise.end()


def _floor_of(
    optimizer: CRSAM, params: list[torch.nn.Parameter], grads: list[list[Tensor]], step: Callable[[], float]
) -> Callable[[], float]:
    calls, host = _record(optimizer, step), optimizer.operators.host
    of_all, g0, nothing = host.Column(params), host.Column(grads[0]), _Nothing(params, {})

    def floor() -> float:
        spent = 0.0
        for given in grads:
            for p, g in zip(params, given, strict=True):
                p.grad = g
            began = time.thread_time()
            for p in params:
                p.grad  # noqa: B018
            host.clear_gradients(params)
            host.mark_written(of_all)
            spent += time.thread_time() - began
        began = time.thread_time()
        for call in calls:
            call()
        nothing.step()
        host.set_gradients(of_all, g0)
        return spent + time.thread_time() - began

    return floor


def _record(optimizer: CRSAM, step: Callable[[], float]) -> list[Callable[[], object]]:
    """Return the calls of a step that launch kernels, as functions without arguments."""
    calls: list[Callable[[], object]] = []

    def recorder(function: Callable[..., object]) -> Callable[..., object]:
        def record(*arguments: Any, **keywords: Any) -> object:
            calls.append(lambda: function(*arguments, **keywords))
            return function(*arguments, **keywords)

        return record

    if optimizer.backend == "triton":
        from crsam_ext.triton_kernels import launch
        from triton.runtime.jit import JITFunction

        with (
            mock.patch.object(launch, "_launch", recorder(launch._launch)),
            mock.patch.object(JITFunction, "run", recorder(JITFunction.run)),
        ):
            step()
    else:
        operators, own = optimizer.operators, optimizer.operators._ops
        names = [name for name in dir(own) if not name.startswith("_")]
        operators._ops = SimpleNamespace(**{name: recorder(getattr(own, name)) for name in names})
        step()
        operators._ops = own
    return calls


@contextmanager
def _extension() -> Iterator[None]:
    """Load csrc/ with empty launchers."""
    path = build.extension(ROOT / "csrc" / "cuda" / "ops_cuda.cpp", ROOT / "benchmarks" / "empty_kernels.cpp")
    with pytest.MonkeyPatch.context() as monkeypatch:
        build.install(monkeypatch, build.load(path))
        yield


@contextmanager
def _empty_cuda() -> Iterator[None]:
    with _extension(), mock.patch.object(cuda, "why_unavailable", return_value=None):
        yield


@contextmanager
def _empty_triton() -> Iterator[None]:
    from crsam_ext.triton_kernels import launch
    from triton.runtime import driver

    with (
        _extension(),
        mock.patch.object(triton, "why_unavailable", return_value=None),
        mock.patch.object(launch, "INTERPRETED_BLOCK", launch.DEFAULT_BLOCK),
        mock.patch.object(driver, "_active", without_gpu(lambda *arguments: None)),
    ):
        yield


if __name__ == "__main__":
    print(json.dumps(_measure(*json.loads(sys.argv[1]))))
