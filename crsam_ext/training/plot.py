"""The figure of loss and accuracy over the epochs."""

from collections.abc import Mapping, Sequence
from typing import IO, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TRAIN, TEST = "#8d99ae", "#d1495b"


def draw(file: IO[bytes], history: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw the loss and the accuracy over the epochs, as PNG.

    Args:
        file: binary file to write to.
        history: the rows of log.csv, at least one.
        title: title of the figure.
    """
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=12)
    loss, accuracy = figure.subplots(1, 2)
    _curves(loss, history, "loss", 1.0)
    _curves(accuracy, history, "accuracy", 100.0)
    loss.set_ylabel("loss")
    accuracy.set_ylabel("accuracy (%)")
    _mark_best(accuracy, history)
    accuracy.legend(loc="lower right", frameon=False)
    loss.legend(loc="upper right", frameon=False)
    figure.savefig(file, format="png")


def _curves(axes: Axes, history: Sequence[Mapping[str, Any]], quantity: str, scale: float) -> None:
    marker = "o" if len(history) == 1 else None
    for split, color in (("train", TRAIN), ("test", TEST)):
        known = [(row["epoch"], scale * row[name]) for row in history if (name := f"{split}_{quantity}") in row]
        epochs, values = [epoch for epoch, _ in known], [value for _, value in known]
        axes.plot(epochs, values, color=color, linewidth=2, marker=marker, label=split)
    axes.set_xlabel("epoch")
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _mark_best(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    best = max((row for row in history if "test_accuracy" in row), key=lambda row: row["test_accuracy"], default=None)
    if best is None:
        return
    percent = 100 * best["test_accuracy"]
    label = f"best: {percent:.2f} % in epoch {best['epoch']}"
    axes.plot([best["epoch"]], [percent], "o", color=TEST, markersize=7, markerfacecolor="white", label=label)
