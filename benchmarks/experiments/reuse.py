"""The benefit of reusing the sharpness direction: accuracy and flatness against gradients per step.

    python -m benchmarks.experiments.reuse   # all tasks; one to two hours on two cores; an interrupted run continues

rho is tuned for each method on a validation split; then every method runs with every seed. Finally, steps are timed,
which takes a minute per task even if all its runs are cached.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from crsam_ext import CRSAM, curvature
from crsam_ext.figures import METHODS as METHOD_COLORS
from crsam_ext.figures import panels, reference_line
from crsam_ext.reuse import DIRECTION
from crsam_ext.training import checkpoint
from crsam_ext.training.data import epoch_order

from ..tables import markdown_table
from .analysis import best_rho, mean_and_error
from .methods import METHODS, RHOS
from .runs import evaluate, key_of, run_all
from .tasks import TASKS, Samples, batches

RESULTS = Path(__file__).parents[1] / "results"
VERSION = 1  # increment it when a change of the code changes the result of a run
INTERVALS = (2, 5, 10, 20)
LOOKSAM_WEIGHT = 0.7  # alpha of the paper (Liu et al., CVPR 2022)

TIMED_RHO = 0.1  # its value does not change the cost of a step
TIMED_STEPS = 10  # minimum in a block
TIMED_ROUNDS = 5, 100  # minimum and maximum
TIMED_SECONDS = 50.0  # per task; no round starts after this time


@dataclass(frozen=True)
class Method:
    """One of the compared methods."""

    options: dict[str, Any]  #: options of CRSAM
    budget: float = 1.0  #: multiplies the task's number of epochs
    tuned_as: str = ""  #: the method whose tuned rho it uses, if not its own
    between: str = ""  #: what replaces the direction: "looksam", "random", or "other run"

    @property
    def gradients(self) -> float:
        """Return the mean number of gradients per step."""
        options = self.options
        perturbed = 2.0 if not (options["alpha"] or options["beta"]) else 2 + 1 / options.get("curvature_interval", 1)
        return 1 + (perturbed - 1) / options.get("interval", 1) if options.get("rho", 1) else 1.0

    @property
    def timed_steps(self) -> int:
        """Return the number of steps in a timed block: a multiple of the cycle, so that blocks need equally many
        gradients."""
        cycle = self.options.get("interval", 1) * self.options.get("curvature_interval", 1)
        return cycle * math.ceil(TIMED_STEPS / cycle)


def _methods() -> dict[str, Method]:
    base = {**METHODS["base"], "rho": 0.0}
    methods = {"base": Method(base), "base, 3 x": Method(base, budget=3)}
    for name in ("SAM", "CR-SAM"):
        options = METHODS[name]
        methods[name] = Method(options)
        for k in INTERVALS:
            methods[f"{name}, reuse {k}"] = Method({**options, "interval": k, "reuse": True})
        methods[f"{name}, interval 5"] = Method({**options, "interval": 5})
    crsam = METHODS["CR-SAM"]
    both = {**crsam, "interval": 5, "reuse": True, "curvature_interval": 10}
    reuse5 = {**crsam, "interval": 5, "reuse": True}
    methods |= {
        "CR-SAM, curvature 10": Method({**crsam, "curvature_interval": 10}),
        "CR-SAM, reuse 5, curvature 10": Method(both),
        "LookSAM's rule, 5": Method({**METHODS["SAM"], "interval": 5, "reuse": True}, between="looksam"),
        "random direction, 5": Method(reuse5, tuned_as="CR-SAM, reuse 5", between="random"),
        "direction of another run, 5": Method(reuse5, tuned_as="CR-SAM, reuse 5", between="other run"),
        "SAM, 1.5 x": Method(METHODS["SAM"], budget=1.5, tuned_as="SAM"),
        "CR-SAM, reuse 5, curvature 10, 2.46 x": Method(both, budget=2.46, tuned_as="CR-SAM, reuse 5, curvature 10"),
    }
    return methods


COMPARED = _methods()

#: Methods of each line or group of markers in the figure, by its label.
LINES = {
    "SAM": ["SAM", *(f"SAM, reuse {k}" for k in INTERVALS)],
    "CR-SAM": ["CR-SAM", *(f"CR-SAM, reuse {k}" for k in INTERVALS)],
    "CR-SAM, reuse and curvature_interval": ["CR-SAM, curvature 10", "CR-SAM, reuse 5, curvature 10"],
    "interval alone": ["SAM, interval 5", "CR-SAM, interval 5"],
    "LookSAM's rule": ["LookSAM's rule, 5"],
}
#: Marker, line and color of each label.
STYLES = {
    "SAM": ("o-", METHOD_COLORS["SAM"]),
    "CR-SAM": ("o-", METHOD_COLORS["CR-SAM"]),
    "CR-SAM, reuse and curvature_interval": ("D--", "tab:cyan"),
    "interval alone": ("s", "tab:green"),
    "LookSAM's rule": ("^", "tab:purple"),
}
#: Methods that are far below the others in some tasks; the range of the axis ignores them.
OUTLIERS = ("LookSAM's rule, 5",)


@dataclass(frozen=True)
class Config:
    """All parameters that determine the result of a run."""

    task: str
    method: str
    rho: float
    seed: int
    epochs: int
    tuning: bool = False  #: exclude the validation samples from training, and measure accuracy on them alone

    @property
    def key(self) -> str:
        return "reuse-" + key_of(self, VERSION)


class Run:
    """A model and its optimizer, trained step by step."""

    def __init__(self, config: Config, seed: int) -> None:
        task, self.method = TASKS[config.task], COMPARED[config.method]
        checkpoint.seed_everything(seed)
        self.model = task.model()
        options = {"rho": config.rho, **self.method.options}
        self.optimizer = CRSAM(self.model.parameters(), task.base, model=self.model, **options, **task.base_options)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.epochs)
        self._added: list[torch.Tensor] = []  # LookSAM's direction, of unit length
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def direction(self) -> list[torch.Tensor]:
        """Return the optimizer's stored direction, not a copy: writing to it changes later steps."""
        return [self.optimizer.state[param][DIRECTION] for param in self.model.parameters()]

    def step(self, x: torch.Tensor, y: torch.Tensor, other: Run | None = None) -> None:
        self.model.train()

        def closure() -> torch.Tensor:
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            if self._added and self.optimizer.passes == 1:
                grads = [param.grad for param in self.model.parameters() if param.grad is not None]
                torch._foreach_add_(grads, self._added, alpha=LOOKSAM_WEIGHT * length(grads))
            return loss

        perturbs = self.optimizer.passes > 1
        self.optimizer.step(closure)
        if perturbs and self.method.between:
            self._replace(other)

    def _replace(self, other: Run | None) -> None:
        h = self.direction
        if self.method.between == "looksam":
            g = [param.grad for param in self.model.parameters() if param.grad is not None]
            along = sum(torch.sum(x * y) for x, y in zip(h, g, strict=True)) / length(g) ** 2
            across = [x - along * y for x, y in zip(h, g, strict=True)]
            self._added = [x / length(across) for x in across]
            new = [torch.zeros_like(x) for x in h]
        elif self.method.between == "random":
            new = [torch.randn(x.shape, generator=self._generator) for x in h]
        else:
            assert other is not None
            new = other.direction
        scale = length(h) / max(length(new), 1e-30)
        for x, y in zip(h, new, strict=True):
            x.copy_(scale * y)


def length(tensors: Sequence[torch.Tensor]) -> float:
    """Return the norm of the concatenation of all tensors."""
    return math.sqrt(sum(float(x.detach().double().square().sum()) for x in tensors))


def run(config: Config) -> dict[str, Any]:
    """Train and measure."""
    torch.set_num_threads(1)
    task, start = TASKS[config.task], time.perf_counter()
    splits = task.load()
    train, test = splits.train, splits.validation
    if not config.tuning:
        train = (torch.cat([train[0], splits.validation[0]]), torch.cat([train[1], splits.validation[1]]))
        test = splits.test
    trained = Run(config, config.seed)
    other = None
    if trained.method.between == "other run":
        other = Run(replace(config, method="CR-SAM, reuse 5"), 5000 + config.seed)
    for epoch in range(config.epochs):
        of_other = batches(*train, task.batch_size, epoch_order(len(train[0]), 5000 + config.seed, epoch))
        for x, y in batches(*train, task.batch_size, epoch_order(len(train[0]), config.seed, epoch)):
            if other is not None:
                other.step(*next(of_other))
            trained.step(x, y, other)
        for each in filter(None, (trained, other)):
            each.schedule.step()
    row = evaluate(trained.model, test, "test")
    if not config.tuning:
        row |= measure(trained.model, train, math.ceil(500 * task.share))
    row = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return {"config": asdict(config), "rows": [row], "seconds": round(time.perf_counter() - start, 1)}


def measure(model: nn.Module, train: Samples, count: int) -> dict[str, float]:
    """Return C(w) and the largest eigenvalue at the first training samples."""
    loader = [(train[0][:count], train[1][:count])]
    c = curvature.normalized_trace(model, F.cross_entropy, loader, probes=8)
    try:
        top = curvature.top_eigenvalues(model, F.cross_entropy, loader, tolerance=0.02).values[0]
    except RuntimeError:  # the run has diverged
        top = math.nan
    return {"train_c": c.value, "train_top_eigenvalue": top}


def tuning_configs(task: str) -> list[Config]:
    return [
        Config(task, name, rho, 1000 + seed, epochs_of(task, name), tuning=True)
        for name, method in COMPARED.items()
        if "rho" not in method.options and not method.tuned_as
        for rho in RHOS
        for seed in range(2)
    ]


def final_configs(task: str, best: dict[tuple[str, str], float], seeds: int) -> list[Config]:
    return [
        Config(task, name, best.get((task, method.tuned_as or name), 0.0), seed, epochs_of(task, name))
        for name, method in COMPARED.items()
        for seed in range(seeds)
    ]


def epochs_of(task: str, method: str) -> int:
    return max(1, round(TASKS[task].epochs * COMPARED[method].budget))


# Time of a step ------------------------------------------------------------------------------------------------------


def step_times(
    task: str,
    methods: Iterable[str] | None = None,
    seconds: float = TIMED_SECONDS,
    rounds: tuple[int, int] = TIMED_ROUNDS,
) -> dict[str, list[float]]:
    """Return the time per step relative to the base optimizer: for each method the 20th, 50th and 80th percentile.

    In every round, each method makes one block of steps with the same mini-batches. Its time is divided by that of the
    base optimizer in the same round, because the machine's speed drifts. Times are processor times of the single
    thread, which exclude waiting for other programs. Methods with the same options are timed once. Methods that replace
    the direction are not timed: the replacement is Python code, not part of the optimizer's step.

    Args:
        methods: all by default.
        seconds: no round starts after this time.
        rounds: minimum (at least 2) and maximum number of rounds.
    """
    torch.set_num_threads(1)
    timed: dict[str, str] = {}  # the method whose times each method uses
    by_options: dict[Any, str] = {}
    for name in dict.fromkeys(["base", *(COMPARED if methods is None else methods)]):
        if not COMPARED[name].between:
            timed[name] = by_options.setdefault(tuple(sorted(COMPARED[name].options.items())), name)
    x, y = TASKS[task].load().train
    # All batches have the same size: a smaller last one would make blocks differ.
    data = list(batches(x, y, TASKS[task].batch_size, epoch_order(len(x), 0, 0), drop_last=True))
    runs = {name: Run(Config(task, name, TIMED_RHO, 0, epochs_of(task, name)), 0) for name in by_options.values()}

    def seconds_a_step(run: Run) -> float:
        steps = run.method.timed_steps
        began = time.thread_time()
        for _ in range(steps):
            run.step(*data[run.optimizer.stats.steps % len(data)])
        return (time.thread_time() - began) / steps

    began = time.perf_counter()
    for each in runs.values():  # the first block allocates state and buffers
        seconds_a_step(each)
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    while (done := len(ratios["base"])) < rounds[0] or (done < rounds[1] and time.perf_counter() - began < seconds):
        times = {name: seconds_a_step(each) for name, each in runs.items()}
        for name, value in times.items():
            ratios[name].append(value / times["base"])
    deciles = {name: statistics.quantiles(values, n=10, method="inclusive") for name, values in ratios.items()}
    return {name: [round(deciles[of][i], 4) for i in (1, 4, 7)] for name, of in timed.items()}


# Report --------------------------------------------------------------------------------------------------------------


def summaries(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each task and method."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    rho = {}
    for result in results:
        config = result["config"]
        rows.setdefault((config["task"], config["method"]), []).append(result["rows"][0])
        rho[config["task"], config["method"]] = config["rho"]
    names = ("test_accuracy", "train_c", "train_top_eigenvalue")
    return [
        {"task": task, "method": method, "rho": rho[task, method], "seeds": len(of_method)}
        | {name: mean_and_error([row[name] for row in of_method]) for name in names}
        for (task, method), of_method in rows.items()
    ]


def markdown(rows: Sequence[dict[str, Any]], times: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return a table for each task.

    Args:
        times: the result of :func:`step_times` for each task; a method that was not timed has no entry.
    """
    lines = [
        "# Cheaper steps: all methods",
        "",
        "`python -m benchmarks.experiments.reuse`",
        "",
        "- Accuracy, C(w) and the largest eigenvalue of the Hessian are means ± standard errors over the seeds. C(w) "
        "and the eigenvalue are measured on training samples.",
        "- rho is tuned for each method on a validation split.",
        "- Time per step / base: processor time of one thread for a block of steps, divided by the time of the base "
        "optimizer's block in the same round. The number is the median over rounds; brackets show the 20th and 80th "
        "percentile if they differ by more than 5 %. –: not timed, because the direction is replaced in Python.",
        '- "3 x" and so on: trained for so many times the epochs, for as many gradients as CR-SAM takes.',
        "",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        cells = []
        for row in rows:
            if row["task"] == task:
                method = COMPARED[row["method"]]
                accuracy, error = (100 * x for x in row["test_accuracy"])
                cells.append([
                    row["method"], f"{method.gradients:.2f}", ratio_cell(times.get(task, {}).get(row["method"])),
                    str(epochs_of(task, row["method"])), f"{row['rho']:g}",
                    f"{accuracy:.2f} ± {error:.2f} %",
                    *("–" if math.isnan(row[n][0]) else f"{row[n][0]:.3g} ± {row[n][1]:.1g}"
                      for n in ("train_c", "train_top_eigenvalue")),
                ])  # fmt: skip
        head = ["method", "gradients per step", "time per step / base", "epochs", "rho"]
        head += ["test accuracy", "C(w)", "largest eigenvalue"]
        lines += [f"## {task}", "", *markdown_table(head, cells), ""]
    return "\n".join(lines)


def ratio_cell(quantiles: Sequence[float] | None) -> str:
    """Return the median, and the 20th and 80th percentile if they differ by more than 5 %."""
    if quantiles is None:
        return "–"
    low, median, high = quantiles
    return f"{median:.2f} ({low:.2f}–{high:.2f})" if high > 1.05 * low else f"{median:.2f}"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw test accuracy against gradients per step, one panel per task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = panels(len(tasks))
    for ax, task in zip(axes, tasks, strict=True):
        by_method = {row["method"]: row["test_accuracy"] for row in rows if row["task"] == task}
        mean, error = (100 * x for x in by_method["base"])
        ax.axhspan(mean - error, mean + error, color="0.88")
        reference_line(ax, mean, "base", vertical=False)
        shown = [by_method[name] for names in LINES.values() for name in names if name not in OUTLIERS]
        shown.append(by_method["base"])
        low, high = min(100 * (m - e) for m, e in shown), max(100 * (m + e) for m, e in shown)
        bottom = low - max(high - low, 0.3) / 8  # room for the values below the axis
        ax.set_ylim(bottom, high + (low - bottom) / 2)
        for label, names in LINES.items():
            style, color = STYLES[label]
            known = sorted((COMPARED[name].gradients, by_method[name]) for name in names)
            x, y = [g for g, _ in known], [value for _, value in known]
            means, errors = [100 * m for m, _ in y], [100 * e for _, e in y]
            ax.errorbar(x, means, errors, fmt=style, markersize=4, capsize=2, color=color, label=label)
            for place, value in zip(x, means, strict=True):
                if value < bottom:  # below the axis: write the value
                    ax.annotate(f"{value:.1f} ↓", (place, bottom), (0, 2), textcoords="offset points", color=color,
                                fontsize=8, ha="center")  # fmt: skip
        ax.set_title(task, fontsize=9)
        ax.set_xlabel("gradients per step")
        ax.set_ylabel("test accuracy, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write ``reuse.json``, ``reuse.md`` and ``reuse.png``, after each task with all complete tasks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.reuse", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all")
    parser.add_argument("--seeds", type=int, default=5, help="final runs of each case (default: 5)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--cache", type=Path, default=Path("runs/experiments"), help="folder of completed runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="output folder")
    args = parser.parse_args(argv)

    def progress(task: str, count: int) -> Callable[[int, dict[str, Any]], None]:
        def show(done: int, result: dict[str, Any]) -> None:
            config, accuracy = result["config"], result["rows"][0]["test_accuracy"]
            what = f"{config['method']}, rho {config['rho']:g}, seed {config['seed']}"
            print(f"{task} {done}/{count}: {what}: {accuracy:.2%} in {result['seconds']:.0f} s", flush=True)

        return show

    tuned: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    times: dict[str, dict[str, list[float]]] = {}
    args.output.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        configs = tuning_configs(task)
        tuned += run_all(configs, args.cache, args.workers, progress(f"tuning {task}", len(configs)), run)
        configs = final_configs(task, best_rho(tuned), args.seeds)
        results += run_all(configs, args.cache, args.workers, progress(task, len(configs)), run)
        print(f"{task}: timing steps", flush=True)
        times[task] = step_times(task)
        content = {
            "torch": torch.__version__, "seeds": args.seeds, "step_times": times, "tuning": tuned, "runs": results
        }  # fmt: skip
        (args.output / "reuse.json").write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
        rows = summaries(results)
        (args.output / "reuse.md").write_text(markdown(rows, times), encoding="utf-8")
        draw(rows, args.output / "reuse.png")
    print(markdown(summaries(results), times))


if __name__ == "__main__":
    main()
