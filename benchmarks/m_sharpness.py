"""The effect of the number of ranks on accuracy, if each rank computes e from its own part of the batch.

Run ``python -m benchmarks.m_sharpness``; it takes half an hour on two cores. The batch size is constant. Each of m
parts of the batch has its own perturbation ("local", the default with m ranks), or all share that of the whole batch
("global", ``sync_perturbation=True``). One process simulates the m ranks with a list of m closures.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.nn import functional as F

from crsam_ext import CRSAM
from crsam_ext.training import checkpoint
from crsam_ext.training.data import epoch_order

from .experiments.runs import evaluate
from .experiments.tasks import TASKS, batches
from .tables import markdown_table

RESULTS = Path(__file__).parent / "results"
METHODS = {"SAM": {"alpha": 0.0, "beta": 0.0}, "CR-SAM": {"alpha": 0.5, "beta": 0.1}}
PARTS = (1, 2, 4, 8)
RHO = 0.1


def run(task_name: str, method: str, parts: int, local: bool, seed: int, epochs: int | None = None) -> float:
    """Train on training and validation samples, and return the accuracy on the test samples."""
    torch.set_num_threads(1)
    task = TASKS[task_name]
    splits = task.load()
    x, y = (torch.cat(pair) for pair in zip(splits.train, splits.validation, strict=True))
    checkpoint.seed_everything(seed)
    model = task.model()
    optimizer = CRSAM(model.parameters(), task.base, rho=RHO, model=model, **METHODS[method], **task.base_options)
    epochs = epochs or task.epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        model.train()
        for xs, ys in batches(x, y, task.batch_size, epoch_order(len(x), seed, epoch), drop_last=True):

            def closure(part_x: torch.Tensor, part_y: torch.Tensor) -> torch.Tensor:
                loss = F.cross_entropy(model(part_x), part_y) / parts
                loss.backward()
                return loss

            pairs = zip(xs.chunk(parts), ys.chunk(parts), strict=True)
            optimizer.step([partial(closure, *pair) for pair in pairs], sync_perturbation=not local)
        schedule.step()
    return evaluate(model, splits.test, "test")["test_accuracy"]


def table(results: dict[str, list[float]]) -> str:
    """Return means and standard errors in percent: one row per task, method and form, one column per m."""
    seeds = max(map(len, results.values()))
    lines = [
        f"Test accuracy in percent: mean ± standard error over {seeds} seeds. m: number of parts of a batch, or ranks.",
        "local: each part has its own perturbation. global: all parts share that of the whole batch. With m = 1 both",
        "are the same.",
        "",
    ]
    rows = []
    for name in dict.fromkeys(key.rpartition(", ")[0] for key in results):
        cells = [name]
        for parts in PARTS:
            values = results.get(f"{name}, {parts}")
            if values is None:
                cells.append("")
                continue
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            cells.append(f"{100 * statistics.mean(values):.2f} ± {100 * error:.2f}")
        rows.append(cells)
    lines += markdown_table(["task, method, perturbation", *(f"m = {parts}" for parts in PARTS)], rows)
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each case (default: 5)")
    parser.add_argument("--tasks", nargs="+", default=["mnist1d-mlp", "digits-cnn"], choices=sorted(TASKS))
    parser.add_argument("--epochs", type=int, help="epochs per run (default: as set for the task)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="output folder")
    arguments = parser.parse_args()
    cases = [
        (task, method, parts, local)
        for task in arguments.tasks
        for method in METHODS
        for local in (True, False)
        for parts in PARTS
        if local or parts > 1  # a single part is the whole batch
    ]
    results: dict[str, list[float]] = {}
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        futures = {
            (case, seed): pool.submit(run, *case, seed, arguments.epochs)
            for case in cases
            for seed in range(arguments.seeds)
        }
        for (case, _), future in futures.items():
            task, method, parts, local = case
            name = f"{task}, {method}, {'local' if local else 'global'}, {parts}"
            results.setdefault(name, []).append(future.result())
            if len(results[name]) == arguments.seeds:
                print(f"{name:40} {statistics.mean(results[name]):.4f}", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m benchmarks.m_sharpness", *sys.argv[1:]])
    report = {"command": command, "torch": torch.__version__, "rho": RHO, "accuracy": results}
    (arguments.output / "m-sharpness.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.output / "m-sharpness.md").write_text(table(results))
    print("\n" + table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
