"""One style for all figures: panels at page width, one color per kind of peer or method, labeled reference lines.

Needs matplotlib.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["COLORS", "METHODS", "WIDTH", "method_color", "panels", "reference_line"]

WIDTH = 9.0  #: width of a figure in inches; saved at 100 dpi, its text is readable in a README
#: Kinds of peers: this package, other programs, the formulas written as a loop, a lower bound or a base optimizer.
COLORS = {"crsam_ext": "tab:blue", "other": "tab:orange", "loop": "tab:gray", "reference": "0.35"}
#: Training methods. Variants of a method have its color and differ by position, marker or line style.
METHODS = {
    "base": COLORS["reference"],
    "SGD": COLORS["reference"],
    "SAM": COLORS["other"],
    "CR-SAM": COLORS["crsam_ext"],
}


def panels(count: int, height: float = 3.0, columns: int = 3, **options: Any) -> tuple[Figure, list[Axes]]:
    """Make a figure with panels.

    Args:
        count: number of panels.
        height: height of a row in inches.
        columns: maximum number of panels in a row.
        **options: passed to :meth:`matplotlib.figure.Figure.subplots`.
    """
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flatten())
    for unused in axes[count:]:
        unused.remove()
    for ax in axes[:count]:
        ax.tick_params(labelsize=8)
        ax.xaxis.label.set_size(8)
        ax.yaxis.label.set_size(8)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def method_color(method: str) -> str:
    """Return the color of a method; the part after a comma names a variant."""
    return METHODS[method.partition(",")[0]]


def reference_line(ax: Axes, value: float, label: str, vertical: bool = True) -> None:
    """Draw a line to compare values with, and write its name next to it."""
    text: dict[str, Any] = {"fontsize": 7, "color": COLORS["reference"]}
    if vertical:
        ax.axvline(value, color=COLORS["reference"], linewidth=0.8)
        ax.text(value, 1.0, label, ha="center", va="bottom", transform=ax.get_xaxis_transform(), **text)
    else:
        ax.axhline(value, color=COLORS["reference"], linewidth=0.8)
        ax.text(1.01, value, label, ha="left", va="center", transform=ax.get_yaxis_transform(), **text)
