"""Bandwidth in GB/s of each operator of a fused backend, compared with that of a copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from crsam_ext import backends
from crsam_ext.backends.fused import KERNELS
from crsam_ext.ops import Coefficients, Direction
from crsam_ext.precision import compute_dtype
from crsam_ext.updates import AdamOptions, SGDOptions

__all__ = ["Contestant", "contestants", "measure"]

SGD = SGDOptions(lr=1e-3, momentum=0.9, dampening=0.0, weight_decay=1e-4, nesterov=False, maximize=False)
ADAMW = AdamOptions(
    lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, decoupled_weight_decay=True, maximize=False
)


class Contestant(NamedTuple):
    """A call to measure, and the bytes that it reads and writes per parameter."""

    nbytes: int
    call: Callable[[], object]


def contestants(
    backend: str, dtype: torch.dtype, device: torch.device, lengths: Sequence[int]
) -> dict[str, Contestant]:
    """Return a copy and the operators of a backend on rows of the given lengths."""
    operators = backends.load(backend)
    wide = compute_dtype(dtype)

    def rows(row_dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.rand(n, device=device, dtype=row_dtype) for n in lengths]

    live, saved, m, v, h = rows(dtype), rows(wide), rows(wide), rows(wide), rows(wide)
    grads = [rows(dtype) for _ in range(3)]
    for w, p in zip(saved, live, strict=True):
        w.copy_(p)
    source = torch.rand(sum(lengths), device=device)
    target = torch.empty_like(source)
    groups, none = [0] * len(lengths), [None] * len(lengths)
    steps = [torch.ones((), device=device)] * len(lengths)
    one = torch.full((1,), 0.1, dtype=torch.float64, device=device)
    c = Coefficients(torch.stack([2 * one, 0 * one]), None, torch.tensor(True, device=device))

    def of(operator: str, *variant: int) -> int:
        return sum(KERNELS[operator].nbytes(dtype, *variant))

    def perturb(sign: int) -> object:
        return operators.perturb_(live, saved, grads[0], groups, one, [False], sign, [])

    return {
        "copy": Contestant(8, lambda: target.copy_(source)),
        "grad_norm": Contestant(of("grad_norm"), lambda: operators.grad_norm(grads[0], groups, 1, none)),
        "perturb_ +1": Contestant(of("perturb_", 1), lambda: perturb(1)),
        "perturb_ -1": Contestant(of("perturb_", -1), lambda: perturb(-1)),
        "fd_gram": Contestant(of("fd_gram"), lambda: operators.fd_gram(grads, groups, 1, none)),
        "fd_combine_": Contestant(
            of("fd_combine_"),
            lambda: operators.fd_combine_(grads[2], grads, groups, 1, none, c.pass_weights, one[0]),
        ),
        "fd_direction_": Contestant(
            of("fd_direction_"), lambda: operators.fd_direction_(h, grads, groups, c.pass_weights, one[0], c.ok)
        ),
        "step_ sgd": Contestant(
            of("step_", 3, 1), lambda: operators.step_(live, saved, [m], grads, groups, steps, [SGD], c)
        ),
        "step_ adam": Contestant(
            of("step_", 3, 2), lambda: operators.step_(live, saved, [m, v], grads, groups, steps, [ADAMW], c)
        ),
        "step_ sgd, reuse": Contestant(
            of("step_", 1, 1, 1),
            lambda: operators.step_(live, saved, [m], grads[:1], groups, steps, [SGD], c, Direction(h, one[0])),
        ),
        "step_ adam, reuse": Contestant(
            of("step_", 1, 2, 1),
            lambda: operators.step_(live, saved, [m, v], grads[:1], groups, steps, [ADAMW], c, Direction(h, one[0])),
        ),
        "combine_": Contestant(of("combine_", 3), lambda: operators.combine_(live, saved, grads, groups, c)),
    }


def stopwatch(call: Callable[[], object], device: torch.device, calls: int) -> Callable[[], float]:
    """Return a function that measures the seconds per call over several consecutive calls.

    On a GPU, a CUDA graph replays them, so that device time is measured and not host time.
    """
    call()
    if device.type == "cpu":

        def watch() -> float:
            began = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - began) / calls

        return watch

    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def watch_graph() -> float:
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / calls / 1e3

    return watch_graph


def host_seconds(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Return the host seconds that it takes to issue a call, without waiting for its result."""
    call()  # builds tables and copies them to the device
    began = time.perf_counter()
    for _ in range(calls):
        call()
    taken = (time.perf_counter() - began) / calls
    if device.type != "cpu":
        torch.cuda.synchronize(device)
    return taken


def measure(
    backend: str, dtype: torch.dtype, device: torch.device, lengths: Sequence[int], rounds: int, calls: int
) -> dict[str, dict[str, float]]:
    """Return, for the copy and each operator, quantiles of seconds, bytes, GB/s, their ratio to the copy's GB/s, and
    host seconds.

    All run in every round, so that drift of the machine's speed favors none. Ratios are computed within a round.
    """
    entries = contestants(backend, dtype, device, lengths)
    watches = {name: stopwatch(entry.call, device, calls) for name, entry in entries.items()}
    times: dict[str, list[float]] = {name: [] for name in entries}
    for round_ in range(rounds + 1):
        for name, watch in watches.items():
            taken = watch()
            if round_ > 0:  # the first round warms up
                times[name].append(taken)
    results = {}
    for name, entry in entries.items():
        p20, p50, p80 = (statistics.quantiles(times[name], n=10, method="inclusive")[i] for i in (1, 4, 7))
        nbytes = entry.nbytes * sum(lengths)
        shares = [
            (nbytes / own) / (8 * sum(lengths) / copy) for own, copy in zip(times[name], times["copy"], strict=True)
        ]
        results[name] = {
            "p20": p20,
            "p50": p50,
            "p80": p80,
            "bytes": nbytes,
            "gb_per_s": nbytes / p50 / 1e9,
            "of_copy": statistics.median(shares),
            "host": host_seconds(entry.call, device, calls),
        }
    return results
