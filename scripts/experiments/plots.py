"""What the experiments' figures share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def panels(width: float, height: float, down: int = 1, across: int = 1, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure of this size in inches, and its panels row by row; `shared` goes to `Figure.subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(down, across, squeeze=False, **shared).flat)


def columns(rows: list[dict], *names: str) -> list[np.ndarray]:
    """The named columns of a table, None as NaN."""
    return [np.array([row[name] for row in rows], float) for name in names]


def intervals(ax: Axes, x: Sequence[float] | np.ndarray, rows: list[dict], *names: str, **style: Any) -> None:
    """Points with their intervals; `names` are the columns of the value and of the interval's two ends."""
    middle, low, high = columns(rows, *names)
    ax.errorbar(x, middle, np.maximum(0, [middle - low, high - middle]), **style)


def legend_below(figure: Figure, columns: int, **style: Any) -> None:
    """One legend for all panels, which show the same lines as the first."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, **style)
