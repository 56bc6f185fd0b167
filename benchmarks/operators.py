"""GB/s of each operator of the cuda backend, beside a copy of the same bytes, on the parameters of a ResNet-50.

Run ``make gpu``, or ``python -m benchmarks.operators --help``. Operators and copy take turns, so that a machine whose
speed drifts favours none. Results are printed and written as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from crsam_ext import backends
from crsam_ext.ops import AdamOptions, Coefficients, SGDOptions

from .shapes import resnet50

RESULTS = Path(__file__).parent / "results"
SGD = SGDOptions(lr=1e-3, momentum=0.9, dampening=0.0, weight_decay=1e-4, nesterov=False, maximize=False)
ADAMW = AdamOptions(
    lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, decoupled_weight_decay=True, maximize=False
)


def operators(device: torch.device, lengths: list[int]) -> dict[str, tuple[int, Callable[[], object]]]:
    """For each operator, the float32 numbers that it moves for each parameter, and a call of it."""
    cuda = backends.load("cuda")

    def rows() -> list[torch.Tensor]:
        return [torch.rand(n, device=device) for n in lengths]

    live, saved, m, v, *grads = (rows() for _ in range(7))
    groups, none = [0] * len(lengths), [None] * len(lengths)
    steps = [torch.ones((), device=device)] * len(lengths)
    one = torch.full((1,), 0.1, dtype=torch.float64, device=device)
    c = Coefficients(one, one, None, torch.tensor(True, device=device))
    return {
        "grad_norm": (1, lambda: cuda.grad_norm(grads[0], groups, 1, none)),
        "perturb_ +1": (4, lambda: cuda.perturb_(live, saved, grads[0], groups, one, [False], 1, [])),
        "perturb_ -1": (3, lambda: cuda.perturb_(live, saved, grads[0], groups, one, [False], -1, [])),
        "fd_gram": (3, lambda: cuda.fd_gram(*grads, groups, 1, none)),
        "sgd_step_": (7, lambda: cuda.sgd_step_(live, saved, m, grads, groups, steps, [SGD], c)),
        "adamw_step_": (9, lambda: cuda.adamw_step_(live, saved, m, v, grads, groups, steps, [ADAMW], c)),
        "combine_": (6, lambda: cuda.combine_(live, saved, grads, groups, c)),
    }


def seconds(body: Callable[[], object], device: torch.device, calls: int) -> float:
    """Seconds of one call, of several in a row: the host prepares the next one while the device works."""
    for start in (True, False):
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        if start:
            began = time.perf_counter()
            for _ in range(calls):
                body()
    return (time.perf_counter() - began) / calls


def main() -> None:
    """Measure, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=20, help="calls in a row in each round")
    parser.add_argument("--output", type=Path, default=RESULTS / "operators.json")
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    lengths = [math.prod(shape) for shape in resnet50()]
    contestants = operators(device, lengths)
    source = torch.rand(sum(lengths), device=device)
    target = torch.empty_like(source)
    contestants = {"copy": (2, lambda: target.copy_(source)), **contestants}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(arguments.rounds + 1):
        for name, (_, body) in contestants.items():
            taken = seconds(body, device, arguments.calls)
            if round_ > 0:  # the first one warms up
                times[name].append(taken)

    result = {}
    print(f"{'operator':12} {'us p20':>8} {'p50':>8} {'p80':>8} {'GB/s':>7} {'of copy':>8}")
    for name, (moved, _) in contestants.items():
        p20, p50, p80 = (statistics.quantiles(times[name], n=10)[i] for i in (1, 4, 7))
        speed = 4 * moved * sum(lengths) / p50 / 1e9
        ratio = speed / result["copy"]["gb_per_s"] if result else 1.0
        result[name] = {"seconds": {"p20": p20, "p50": p50, "p80": p80}, "gb_per_s": speed, "of_copy": ratio}
        print(f"{name:12} {p20 * 1e6:8.1f} {p50 * 1e6:8.1f} {p80 * 1e6:8.1f} {speed:7.0f} {ratio:8.0%}")
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, object] = {
        "device": machine,
        "versions": versions,
        "command": sys.argv,
        "parameters": sum(lengths),
        "results": result,
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
