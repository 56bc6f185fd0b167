"""Tables and figures of the results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from crsam_ext.curvature import Measurement
from crsam_ext.figures import panels, reference_line

from .analysis import PREDICTORS
from .methods import METHODS

NAMES = {
    "test_accuracy": "test accuracy",
    "train_c": "C(w), training set",
    "test_c": "C(w), test set",
    "train_trace": "trace, training set",
    "test_trace": "trace, test set",
    "train_gradient_norm": "gradient norm",
    "train_top_eigenvalue": "top eigenvalue",
    "train_ascent_gap": "ascent gap",
}
COLORS = {method: f"C{index}" for index, method in enumerate(METHODS)}


def last_of(summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last checkpoint of each task and method."""
    return list({(row["task"], row["method"]): row for row in summaries}.values())


def shown(value: tuple[float, float], percent: bool = False) -> str:
    mean, error = value
    if math.isnan(mean):
        return "–"
    if percent:
        return f"{100 * mean:.1f} ± {100 * error:.1f} %"
    return str(Measurement(mean, error, 1, 0))


def markdown(about: dict[str, Any], summaries: Sequence[dict[str, Any]], predictions: Sequence[dict[str, Any]]) -> str:
    """Return all tables with explanations."""
    columns = list(NAMES)
    lines = [
        f"# Experiments, {about['form']} form",
        "",
        f"`{about['command']}`, torch {about['versions']['torch']}, Python {about['versions']['python']}; "
        f"{about['seconds'] / 60:.0f} minutes, added up over all runs. Mean ± standard error over {about['seeds']} "
        "seeds. rho is the best of those tried on a validation split, for each method. Curvature is that of the first "
        f"{about['samples']} samples of a set (a sixteenth of that many texts), in evaluation mode, traces with "
        f"{about['probes']} probes; ascent gap: what one step within rho = {about['ascent_rho']:g} finds of the loss "
        "increase that ten more find.",
    ]
    for task in about["tasks"]:
        lines += ["", f"## {task}", "", "| method | rho | " + " | ".join(NAMES.values()) + " |"]
        lines.append("|---" * (2 + len(columns)) + "|")
        for row in last_of(summaries):
            if row["task"] == task:
                cells = [shown(row[name], percent=name == "test_accuracy") for name in columns]
                lines.append(f"| {row['method']} | {row['rho']:g} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Which measure ranks networks by their generalization gap?",
        "",
        "Rank correlation of a measure on the training set with test loss − training loss, and its 95 % interval from",
        "a bootstrap over whole runs. With fewer than about ten runs, the interval is too narrow.",
        "",
        "| task | over | runs | measure | Spearman | Kendall |",
        "|---|---|---|---|---|---|",
    ]
    for row in predictions:
        if "spearman" in row:
            cells = [
                f"{row[kind]:.2f} ({row[f'{kind}_interval'][0]:.2f} to {row[f'{kind}_interval'][1]:.2f})"
                for kind in ("spearman", "kendall")
            ]
            name = NAMES[row["predictor"]].removesuffix(", training set")
            lines.append(f"| {row['task']} | {row['over']} | {row['runs']} | {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def draw_accuracy(summaries: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the final test accuracy, with standard errors."""
    rows = last_of(summaries)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = panels(len(tasks), height=3.4)
    for ax, task in zip(axes, tasks, strict=True):
        base = next(row for row in rows if row["task"] == task and row["method"] == "base")
        reference_line(ax, 100 * base["test_accuracy"][0], "base", vertical=False)
        for index, row in enumerate(row for row in rows if row["task"] == task):
            mean, error = row["test_accuracy"]
            ax.errorbar(index, 100 * mean, 100 * error, fmt="o", color=COLORS[row["method"]], capsize=3)
        methods = [row["method"] for row in rows if row["task"] == task]
        ax.set_xticks(range(len(methods)), methods, rotation=60, ha="right", fontsize=8)
        ax.margins(x=0.15)
        ax.set_title(task, fontsize=9)
        ax.set_ylabel("test accuracy, %", fontsize=8)
    figure.savefig(path, dpi=100)


def draw_curves(summaries: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw all measurements over epochs: a row of panels for each quantity, a column for each task."""
    tasks = list(dict.fromkeys(row["task"] for row in summaries))
    quantities = [name for name in NAMES if name not in ("train_trace", "test_trace")]
    figure = Figure(figsize=(3 * len(tasks), 2.2 * len(quantities)), layout="constrained")
    axes = figure.subplots(len(quantities), len(tasks), squeeze=False, sharex="col")
    for column, task in enumerate(tasks):
        for line, name in enumerate(quantities):
            ax = axes[line][column]
            for method in METHODS:
                rows = [row for row in summaries if row["task"] == task and row["method"] == method]
                if rows:
                    means, errors = zip(*(row[name] for row in rows), strict=True)
                    epochs = [row["epoch"] for row in rows]
                    ax.errorbar(
                        epochs, means, errors, fmt="o-", markersize=3, capsize=2, color=COLORS[method], label=method
                    )
            if name not in ("test_accuracy", "train_ascent_gap"):
                ax.set_yscale("log")
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_formatter("{x:g}")
                ax.tick_params(axis="y", which="both", labelsize=7)
            if column == 0:
                ax.set_ylabel(NAMES[name], fontsize=9)
        axes[0][column].set_title(task, fontsize=10)
        axes[-1][column].set_xlabel("epoch")
    axes[0][0].legend(fontsize=6)
    figure.savefig(path, dpi=100)


def draw_predictions(predictions: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw Spearman's coefficient and its interval for each measure."""
    rows = [row for row in predictions if "spearman" in row]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if not tasks:
        return
    figure, axes = panels(len(tasks), height=3.4, sharey=True)
    for ax, task in zip(axes, tasks, strict=True):
        for shift, which in ((-0.1, "all checkpoints"), (0.1, "last checkpoints")):
            points = [row for row in rows if row["task"] == task and row["over"] == which]
            for row in points:
                low, high = row["spearman_interval"]
                at = PREDICTORS.index(row["predictor"]) + shift
                color = "C0" if which == "all checkpoints" else "C1"
                ax.plot([at, at], [low, high], color=color)
                label = which if row is points[0] else None
                ax.plot(at, row["spearman"], "o", color=color, markersize=4, label=label)
        reference_line(ax, 0.0, "none", vertical=False)
        names = [NAMES[name].removesuffix(", training set") for name in PREDICTORS]
        ax.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        ax.set_ylim(-1.05, 1.05)
        ax.set_title(task, fontsize=10)
    figure.axes[0].set_ylabel("Spearman with the loss gap")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
