"""One style for all figures: panels at the width of a page, a color for each kind of peer, a labeled reference line.

Needs matplotlib.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["COLORS", "WIDTH", "panels", "reference_line"]

WIDTH = 9.0  #: of a figure, in inches: at 100 dpi its text is readable in a README
_PER_ROW = 3

#: What is measured: this package, other programs, the formulas written as a loop, a lower bound or a base optimizer.
COLORS = {"crsam_ext": "tab:blue", "other": "tab:orange", "loop": "tab:gray", "reference": "0.35"}


def panels(count: int, height: float = 3.0, **options: Any) -> tuple[Figure, list[Axes]]:
    """Make a figure with panels, at most three in a row.

    Args:
        count: number of panels.
        height: of a row, in inches.
        **options: of :meth:`matplotlib.figure.Figure.subplots`.
    """
    columns = min(count, _PER_ROW)
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
    color = COLORS["reference"]
    if vertical:
        ax.axvline(value, color=color, linewidth=0.8)
        place, align = (value, 1.0), {"ha": "center", "va": "bottom"}
        transform = ax.get_xaxis_transform()
    else:
        ax.axhline(value, color=color, linewidth=0.8)
        place, align = (1.0, value), {"ha": "right", "va": "bottom"}
        transform = ax.get_yaxis_transform()
    ax.text(*place, label, fontsize=7, color=color, transform=transform, **align)
