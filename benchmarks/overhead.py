"""Time of one CR-SAM step without its gradients: this optimizer, a loop per tensor, and a copy of the same bytes.

Run ``make bench``, or ``python -m benchmarks.overhead --help``. All contestants work on the same shapes and gradients,
in one process, in turn, so that a machine whose speed drifts favours none; ratios are taken round by round. Results are
printed and written as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from crsam_ext import CRSAM

from .shapes import resnet50

RHO, ALPHA, BETA = 0.1, 0.1, 0.01
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
# Parameters read or written by a step with momentum, in units of all parameters: see crsam_ext.ops.
TRAFFIC = 18

RESULTS = Path(__file__).parent / "results"

Step = Callable[[list[list[Tensor]]], None]


def loop(params: list[Tensor]) -> Step:
    """The formulas, tensor by tensor, with the gradients cloned: what published implementations do."""
    base = torch.optim.SGD(params, **SGD)

    @torch.no_grad()
    def step(gradients: list[list[Tensor]]) -> None:
        grad, ascent, descent = gradients
        norm = torch.stack([g.norm() for g in grad]).norm()
        kept = [g.clone() for g in grad]
        perturbations = [g * (RHO / (norm + 1e-12)) for g in grad]
        for p, e in zip(params, perturbations, strict=True):
            p.add_(e)
        kept_ascent = [g.clone() for g in ascent]
        for p, e in zip(params, perturbations, strict=True):
            p.sub_(2 * e)
        kept_descent = [g.clone() for g in descent]
        for p, e, g0, gp, gm in zip(params, perturbations, kept, kept_ascent, kept_descent, strict=True):
            p.add_(e)
            p.grad = gp + ALPHA * (gp + gm - 2 * g0) + BETA * (gp - gm)
        base.step()

    return step


def crsam(params: list[Tensor], **options: object) -> Step:
    """This optimizer, through its three calls."""
    optimizer = CRSAM(params, torch.optim.SGD, rho=RHO, alpha=ALPHA, beta=BETA, **options, **SGD)  # type: ignore[arg-type]

    def step(gradients: list[list[Tensor]]) -> None:
        calls = (optimizer.first_step, optimizer.second_step, optimizer.third_step)
        for call, grads in zip(calls, gradients, strict=True):
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            call(zero_grad=True)

    return step


def copy(params: list[Tensor]) -> Step:
    """As many bytes as a step moves, copied: half of them read, half written."""
    source = torch.randn(sum(p.numel() for p in params))
    target = torch.empty_like(source)

    def step(_: list[list[Tensor]]) -> None:
        for _ in range(TRAFFIC // 2):
            target.copy_(source)

    return step


def contestants() -> dict[str, Callable[[list[Tensor]], Step]]:
    """Name and maker of everything that is measured."""
    return {
        "loop per tensor": loop,
        "copy of 18 N bytes": copy,
        "crsam_ext, torch": lambda params: crsam(params, backend="torch"),
        "crsam_ext, torch, compiled": lambda params: crsam(params, backend="torch", compile=True),
        "crsam_ext, torch, compiled, with the Gram matrix": lambda params: crsam(
            params, backend="torch", compile=True, max_regularizer_ratio=1e9
        ),
    }


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds a step for each contestant, one value a round."""
    torch.manual_seed(0)
    gradients = [[1e-3 * torch.randn(shape) for shape in resnet50()] for _ in range(3)]
    steps = {}
    for name, make in contestants().items():
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in resnet50()]
        steps[name] = make(params)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(-2, rounds):  # two rounds to compile and to warm up
        for name, step in steps.items():
            begin = time.perf_counter()
            step(gradients)
            if index >= 0:
                times[name].append(time.perf_counter() - begin)
    return times


def table(times: dict[str, list[float]]) -> str:
    """Quantiles in ms, and the median over rounds of the ratio to the loop and to the copy."""
    loop_times, copy_times = list(times.values())[:2]
    lines = [f"{'':50s}{'p20':>8s}{'p50':>8s}{'p80':>8s}   {'/ loop':>7s}{'/ copy':>7s}"]
    for name, values in times.items():
        p20, _, _, p80 = statistics.quantiles(values, n=5)
        p50 = statistics.median(values)
        ratios = [
            statistics.median(v / o for v, o in zip(values, others, strict=True)) for others in (loop_times, copy_times)
        ]
        lines.append(f"{name:50s}{1e3 * p20:8.1f}{1e3 * p50:8.1f}{1e3 * p80:8.1f}   {ratios[0]:7.2f}{ratios[1]:7.2f}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "overhead-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    times = measure(args.rounds)
    about = {
        "what": "optimizer-only seconds of one CR-SAM step with SGD momentum on the shapes of ResNet-50, fp32",
        "command": " ".join(["python -m benchmarks.overhead", *sys.argv[1:]]),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {args.threads} threads",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    print(f"{about['what']}\n{about['machine']}, torch {torch.__version__}; milliseconds\n\n{table(times)}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**about, "seconds": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
