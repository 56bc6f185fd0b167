"""Tune rho on a validation split, run every method with its best rho, and report. An interrupted run continues."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from . import analysis, report
from .methods import METHODS, WITHOUT_ABLATION, rhos_of
from .runs import ASCENT_RHO, Config, run_all
from .tasks import TASKS

RESULTS = Path(__file__).parents[1] / "results"


def methods_of(task: str) -> Sequence[str]:
    return list(METHODS) if TASKS[task].ablation else WITHOUT_ABLATION


def epochs_of(task: str, quick: bool) -> tuple[int, tuple[int, ...]]:
    """Return the number of epochs and those after which curvature is measured: an early one, and each third of the
    run."""
    epochs = TASKS[task].quick_epochs if quick else TASKS[task].epochs
    parts = (1 / 3, 2 / 3, 1) if quick else (1 / 15, 1 / 3, 2 / 3, 1)
    return epochs, tuple(sorted({max(1, round(part * epochs)) for part in parts}))


def tuning_configs(tasks: Sequence[str], quick: bool) -> list[Config]:
    """Return the configurations of the tuning runs. They use fewer seeds than the final runs, and different ones."""
    return [
        Config(task, method, rho, 1000 + seed, epochs_of(task, quick)[0], (epochs_of(task, quick)[0],), tuning=True)
        for task in tasks
        for method in methods_of(task)
        if len(rhos_of(method, quick)) > 1
        for rho in rhos_of(method, quick)
        for seed in range(1 if quick else 2)
    ]


def final_configs(tasks: Sequence[str], quick: bool, best: dict[tuple[str, str], float], seeds: int) -> list[Config]:
    return [
        Config(
            task,
            method,
            best.get((task, method), 0.0),
            seed,
            *epochs_of(task, quick),
            probes=4 if quick else 8,
            samples=200 if quick else 500,
        )
        for task in tasks
        for method in methods_of(task)
        for seed in range(seeds)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write ``experiments[-quick].json``, ``.md`` and three figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer epochs, values of rho, seeds and checkpoints")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all")
    parser.add_argument("--seeds", type=int, help="final runs per method (default: 5; with --quick: 2)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--cache", type=Path, default=Path("runs/experiments"), help="folder of completed runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="output folder")
    args = parser.parse_args(argv)
    seeds = args.seeds or (2 if args.quick else 5)
    console = Console()

    def run(what: str, configs: list[Config]) -> list[dict[str, Any]]:
        with Progress(console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(what, total=len(set(configs)))

            def progress(done: int, result: dict[str, Any]) -> None:
                bar.update(task, completed=done)
                config, accuracy = result["config"], result["rows"][-1]["test_accuracy"]
                where = f"{config['task']}, {config['method']}, rho {config['rho']:g}, seed {config['seed']}"
                line = f"{what} {done}/{len(set(configs))}: {where}: {accuracy:.1%} in {result['seconds']:.0f} s"
                console.print(line, highlight=False, soft_wrap=True)

            return run_all(configs, args.cache, args.workers, progress)

    tuned = run("tuning", tuning_configs(args.tasks, args.quick))
    best = analysis.best_rho(tuned)
    configs = final_configs(args.tasks, args.quick, best, seeds)
    results = run("run", configs)
    summaries, predictions = analysis.summaries(results), analysis.predictions(results)

    form = "quick" if args.quick else "full"
    about = {
        "form": form,
        "command": " ".join(["python -m benchmarks.experiments", *(sys.argv[1:] if argv is None else argv)]),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "tasks": args.tasks,
        "seeds": seeds,
        "probes": configs[0].probes,
        "samples": configs[0].samples,
        "ascent_rho": ASCENT_RHO,
        "seconds": round(sum(result["seconds"] for result in [*tuned, *results])),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / ("experiments-quick" if args.quick else "experiments")
    content = {**about, "tuning": tuned, "runs": results, "predictions": predictions}
    path.with_suffix(".json").write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
    text = report.markdown(about, summaries, predictions)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    report.draw_accuracy(summaries, path.with_name(f"{path.name}-accuracy.png"))
    report.draw_curves(summaries, path.with_name(f"{path.name}-curves.png"))
    report.draw_predictions(predictions, path.with_name(f"{path.name}-predictions.png"))
    console.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
