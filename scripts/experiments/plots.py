"""Shared parts of the experiments' figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def panels(width: float, height: float, down: int = 1, across: int = 1, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure of this size in inches, and its panels row by row; `shared` is passed to `Figure.subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(down, across, squeeze=False, **shared).flat)


def columns(rows: list[dict], *names: str) -> list[np.ndarray]:
    """The named columns of a table, None as NaN."""
    return [np.array([row[name] for row in rows], float) for name in names]


def intervals(ax: Axes, x: Sequence[float] | np.ndarray, rows: list[dict], *names: str, **style: Any) -> None:
    """Plot points with intervals; `names` are the columns of the value and the two ends of the interval."""
    middle, low, high = columns(rows, *names)
    ax.errorbar(x, middle, np.maximum(0, [middle - low, high - middle]), **style)


def legend_below(figure: Figure, columns: int, **style: Any) -> None:
    """One legend below the figure for all panels, with the lines of the first."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, **style)
