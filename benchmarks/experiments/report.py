"""Tables and figures of the results of the experiments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from crsam_ext.curvature import Measurement
from crsam_ext.figures import METHODS, method_color, panels, reference_line

from ..tables import markdown_table
from .analysis import PREDICTORS
from .methods import WITHOUT_ABLATION

NAMES = {
    "test_accuracy": "test accuracy",
    "train_c": "C(w), training set",
    "test_c": "C(w), test set",
    "train_trace": "Hessian trace, training set",
    "test_trace": "Hessian trace, test set",
    "train_gradient_norm": "gradient norm",
    "train_top_eigenvalue": "largest eigenvalue",
    "train_ascent_gap": "ascent gap",
}
CURVES = {"train_c": "-", "train_trace": "--"}  # measures drawn over epochs, and their line styles


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
    """Return the report: all tables and their explanations."""
    lines = [
        f"# Experiments, {about['form']} form",
        "",
        f"`{about['command']}`, torch {about['versions']['torch']}, Python {about['versions']['python']}; "
        f"{about['seconds'] / 60:.0f} minutes in total over all runs.",
        "",
        f"- Every number is a mean ± standard error over {about['seeds']} seeds.",
        "- rho is tuned for each method on a validation split.",
        f"- Curvature is measured in evaluation mode on the first {about['samples']} samples of each set (for texts, "
        f"on a sixteenth as many), the trace with {about['probes']} probes.",
        "- Gradient norm, largest eigenvalue and ascent gap are measured on the training set.",
        f"- Ascent gap: the loss increase after one ascent step of length {about['ascent_rho']:g}, divided by the "
        "largest increase that ten further steps within this radius find.",
    ]
    for task in about["tasks"]:
        lines += ["", f"## {task}", ""]
        lines += markdown_table(
            ["method", "rho", *NAMES.values()],
            (
                [row["method"], f"{row['rho']:g}", *(shown(row[name], name == "test_accuracy") for name in NAMES)]
                for row in last_of(summaries)
                if row["task"] == task
            ),
        )
    lines += [
        "",
        "## Which measure ranks networks by their generalization gap?",
        "",
        "Rank correlation between a measure on the training set and the generalization gap (test loss − training",
        "loss), with a 95 % interval from a bootstrap over whole runs. With fewer than about ten runs, the interval is",
        "too narrow.",
        "",
    ]
    cells = [
        [
            row["task"], row["over"].removesuffix(" checkpoints"), str(row["runs"]),
            NAMES[row["predictor"]].removesuffix(", training set"),
            *(f"{row[kind]:.2f} ({row[f'{kind}_interval'][0]:.2f} to {row[f'{kind}_interval'][1]:.2f})"
              for kind in ("spearman", "kendall")),
        ]
        for row in predictions if "spearman" in row
    ]  # fmt: skip
    lines += markdown_table(["task", "checkpoints", "runs", "measure", "Spearman", "Kendall"], cells)
    return "\n".join(lines) + "\n"


def draw_accuracy(summaries: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the final test accuracy with standard errors, one panel per task."""
    rows = last_of(summaries)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = panels(len(tasks), height=3.4)
    for ax, task in zip(axes, tasks, strict=True):
        base = next(row for row in rows if row["task"] == task and row["method"] == "base")
        reference_line(ax, 100 * base["test_accuracy"][0], "base", vertical=False)
        for index, row in enumerate(row for row in rows if row["task"] == task):
            mean, error = row["test_accuracy"]
            ax.errorbar(index, 100 * mean, 100 * error, fmt="o", color=method_color(row["method"]), capsize=3)
        methods = [row["method"] for row in rows if row["task"] == task]
        ax.set_xticks(range(len(methods)), methods, rotation=60, ha="right", fontsize=8)
        ax.margins(x=0.15)
        ax.set_title(task, fontsize=9)
        ax.set_ylabel("test accuracy, %")
    figure.savefig(path, dpi=100)


def draw_curves(summaries: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw C(w) and the Hessian trace on the training set over epochs, one panel per task.

    Only the methods that all tasks have in common are drawn. The other measures are in the tables.
    """
    tasks = list(dict.fromkeys(row["task"] for row in summaries))
    figure, axes = panels(len(tasks))
    for ax, task in zip(axes, tasks, strict=True):
        for method in WITHOUT_ABLATION:
            rows = [row for row in summaries if row["task"] == task and row["method"] == method]
            for name, line in CURVES.items():
                means, errors = zip(*(row[name] for row in rows), strict=True)
                epochs = [row["epoch"] for row in rows]
                ax.errorbar(epochs, means, errors, fmt=f"o{line}", markersize=3, capsize=2, color=method_color(method))
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_title(task, fontsize=9)
        ax.set_xlabel("epoch")
        ax.set_ylabel("C(w), Hessian trace")
    handles = [
        Line2D([], [], color=METHODS[method], marker="o", markersize=3, label=method) for method in WITHOUT_ABLATION
    ]
    handles += [
        Line2D([], [], color="black", linestyle=line, label=NAMES[name].removesuffix(", training set"))
        for name, line in CURVES.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.savefig(path, dpi=100)


def draw_predictions(predictions: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw Spearman's coefficient and its 95 % interval for each measure, one panel per task."""
    rows = [row for row in predictions if "spearman" in row]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if not tasks:
        return
    figure, axes = panels(len(tasks), height=3.4)
    for ax, task in zip(axes, tasks, strict=True):
        for shift, which, face in ((-0.12, "all checkpoints", "tab:green"), (0.12, "last checkpoints", "white")):
            points = [row for row in rows if row["task"] == task and row["over"] == which]
            x = [PREDICTORS.index(row["predictor"]) + shift for row in points]
            y = [row["spearman"] for row in points]
            ax.vlines(x, *zip(*(row["spearman_interval"] for row in points), strict=True), color="tab:green")
            ax.plot(x, y, "o", color="tab:green", markerfacecolor=face, markersize=5, label=which)
        reference_line(ax, 0.0, "none", vertical=False)
        names = [NAMES[name].removesuffix(", training set") for name in PREDICTORS]
        ax.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
        ax.set_ylim(-1.05, 1.05)
        ax.set_title(task, fontsize=9)
        ax.set_ylabel("Spearman's rank correlation")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=100)
