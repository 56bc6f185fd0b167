"""How fast the sharpness direction h changes: the stored h compared with the current one, by age.

    python -m benchmarks.experiments.staleness   # two tasks; three minutes on one core

Training computes h in every 20th step and reuses it in the steps between. At selected ages, h is also recomputed from
the formulas, without affecting the training.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crsam_ext.reuse import DIRECTION
from crsam_ext.training.data import epoch_order

from ..tables import markdown_table
from .reuse import RESULTS, Config, Run, length
from .tasks import TASKS, batches

INTERVAL = 20
AGES = (1, 2, 5, 10, 19)
RHO, ALPHA, BETA = 0.2, 0.5, 0.1


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return the gradient of the loss, leaving the running statistics unchanged."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    found = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    return list(found)


@torch.no_grad()
def sharpness_direction(model: nn.Module, x: Tensor, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return g0 and h = ghat - g0 of a batch, at the model's current parameters."""
    params = list(model.parameters())
    w = [param.clone() for param in params]

    def gradient_at(e: Sequence[Tensor], sign: int) -> list[Tensor]:
        for param, start, shift in zip(params, w, e, strict=True):
            param.copy_(start + sign * shift if sign else start)
        with torch.enable_grad():
            return gradient(model, x, y)

    g0 = gradient_at(w, 0)
    e = [RHO / length(g0) * g for g in g0]
    ascent, descent = gradient_at(e, 1), gradient_at(e, -1)
    for param, start in zip(params, w, strict=True):
        param.copy_(start)
    triples = list(zip(g0, ascent, descent, strict=True))
    return g0, [(p - g) + ALPHA * ((p - g) + (m - g)) + BETA * (p - m) for g, p, m in triples]


def cosine(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
    """Return the cosine of the angle between two vectors."""
    return sum(float((s.double() * t.double()).sum()) for s, t in zip(x, y, strict=True)) / (length(x) * length(y))


def measured(task_name: str, seed: int = 0) -> dict[int, dict[str, float]]:
    """Train, and return the means of the measurements over all steps, by the age of h."""
    torch.set_num_threads(1)
    task = TASKS[task_name]
    splits = task.load()
    trained = Run(Config(task_name, f"CR-SAM, reuse {INTERVAL}", RHO, seed, task.epochs), seed)
    found: dict[int, list[dict[str, float]]] = defaultdict(list)
    step, then = 0, []
    for epoch in range(task.epochs):
        for x, y in batches(*splits.train, task.batch_size, epoch_order(len(splits.train[0]), seed, epoch)):
            age = step % INTERVAL
            trained.model.train()
            if age == 0 or age in AGES:
                g0, new = sharpness_direction(trained.model, x, y)
                if age == 0:
                    then = g0
                else:
                    old = [trained.optimizer.state[param][DIRECTION] for param in trained.model.parameters()]
                    found[age].append(
                        {
                            "cosine of h": cosine(old, new),
                            "cosine of g0": cosine(then, g0),
                            "‖h‖ / ‖g0‖": length(new) / length(g0),
                        }
                    )
            trained.step(x, y)
            step += 1
        trained.schedule.step()
    return {age: _means(rows) for age, rows in sorted(found.items())}


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}


def markdown(results: dict[str, dict[int, dict[str, float]]]) -> str:
    """Return a table with one row per task and quantity, one column per age."""
    lines = [
        f"Age: steps since h was computed, in training with interval {INTERVAL} and reuse. Cosines compare the stored",
        "h, and the g0 of the same step, with those of the current batch at the current parameters. All values are",
        "means over the steps of a run.",
        "",
    ]
    lines += markdown_table(
        ["task", "mean of", *(f"age {age}" for age in AGES)],
        (
            [task, name, *(f"{by_age[age][name]:.2f}" for age in AGES)]
            for task, by_age in results.items()
            for name in next(iter(by_age.values()))
        ),
    )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write ``staleness.md`` and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.staleness", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["mnist1d-mlp", "graph"])
    parser.add_argument("--output", type=Path, default=RESULTS, help="output folder")
    args = parser.parse_args(argv)
    results: dict[str, Any] = {task: measured(task) for task in args.tasks}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "staleness.md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
