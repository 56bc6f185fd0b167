"""One style for all figures: panels at the width of a page, a color for each kind of peer, a labeled reference line.

Needs matplotlib.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["COLORS", "WIDTH", "panels", "reference_line"]

WIDTH = 9.0  #: of a figure, in inches: at 100 dpi its text is readable in a README
#: What is measured: this package, other programs, the formulas written as a loop, a lower bound or a base optimizer.
COLORS = {"crsam_ext": "tab:blue", "other": "tab:orange", "loop": "tab:gray", "reference": "0.35"}


def panels(count: int, height: float = 3.0, columns: int = 3, **options: Any) -> tuple[Figure, list[Axes]]:
    """Make a figure with panels.

    Args:
        count: number of panels.
        height: of a row, in inches.
        columns: at most so many panels in a row.
        **options: of :meth:`matplotlib.figure.Figure.subplots`.
    """
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flatten())
    for unused in axes[count:]:
        unused.remove()
    for ax in axes[:count]:
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def reference_line(ax: Axes, value: float, label: str, vertical: bool = True) -> None:
    """Draw a line that values are compared with, and write its name beside it."""
    text: dict[str, Any] = {"fontsize": 7, "color": COLORS["reference"], "va": "bottom"}
    if vertical:
        ax.axvline(value, color=COLORS["reference"], linewidth=0.8)
        ax.text(value, 1.0, label, ha="center", transform=ax.get_xaxis_transform(), **text)
    else:
        ax.axhline(value, color=COLORS["reference"], linewidth=0.8)
        ax.text(1.0, value, label, ha="right", transform=ax.get_yaxis_transform(), **text)
