"""Figures of an evaluation: ROC curves and histograms for each attack, and AUC by strength."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ringmark.errors import counted
from ringmark.watermark.attacks.chains import parse
from ringmark.watermark.attacks.distortions import ATTACKS
from ringmark.watermark.evaluation.cells import CLEAN, Cell, Evaluation
from ringmark.watermark.evaluation.rates import Array, Curve, pointwise_band
from ringmark.watermark.evaluation.tables import with_interval
from ringmark.watermark.figures import COLOURS, GREY, INK, MARK, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "HistogramDisplay",
    "RocDisplay",
    "StrengthDisplay",
    "histogram_figure",
    "roc_figure",
    "roc_panels",
    "strength_figure",
    "write_plots",
]

STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class RocDisplay:
    """ROC curves over a logarithmic FPR axis, with their pointwise 95 % bands."""

    curves: Sequence[Curve]

    @property
    def floor(self) -> float:
        """The lowest FPR shown: half of what the unmarked images can resolve."""
        return min(0.5 / curve.negatives for curve in self.curves)

    def plot(self, ax: Axes) -> None:
        """Draw the curves, with a vertical line at the FPR limit if there are enough unmarked images for it."""
        for i, curve in enumerate(self.curves):
            self._plot_curve(ax, curve, COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)])
        chance = np.geomspace(self.floor, 1, 100)
        ax.plot(chance, chance, color=GREY, lw=0.8, ls=":", label="chance")
        if all(curve.point for curve in self.curves):
            ax.axvline(self.curves[0].fpr_limit, color=GREY, lw=0.8)
        ax.set(xscale="log", xlim=(self.floor, 1), ylim=(0, 1.02))
        ax.set(xlabel="false-positive rate", ylabel="true-positive rate")
        ax.legend(loc="lower right", fontsize=8, framealpha=0.8, edgecolor="none")

    def _plot_curve(self, ax: Axes, curve: Curve, colour: str, style: str) -> None:
        fpr = np.maximum(curve.fpr, self.floor)
        ax.fill_between(fpr, *pointwise_band(curve), step="post", color=colour, alpha=0.15, lw=0)
        label = f"{curve.name}: AUC {with_interval(curve.auc, curve.auc_interval)}"
        ax.step(fpr, curve.tpr, where="post", color=colour, ls=style, lw=1.6, label=label)


def roc_figure(curves: Sequence[Curve], title: str = "") -> Figure:
    """A figure with these curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    ax = figure.subplots()
    RocDisplay(curves).plot(ax)
    ax.set_title(
        title or f"{curves[0].positives} marked, {counted(curves[0].negatives, 'unmarked image')}", fontsize=10
    )
    return figure


def write_plots(evaluation: Evaluation, folder: Path, *, force: bool = False) -> None:
    """Draw ROC curves and histograms for each attack, and AUC by strength for attacks at several strengths.

    The figures show the detector's score and the published statistics that are compared with it.
    """
    shown = [cell for cell in evaluation.cells if cell.is_default or cell.is_compared]
    for attack in dict.fromkeys(cell.attack for cell in shown):
        cells = [cell for cell in shown if cell.attack == attack]
        slug = CLEAN if attack == CLEAN else parse(attack).slug
        curves = roc_panels(cells)
        for suffix in ("png", "svg"):
            save_figure(curves, folder / f"roc-{slug}.{suffix}", force=force)
        save_figure(histogram_figure(cells), folder / f"histograms-{slug}.png", force=force)
    if displays := _strengths(shown):
        save_figure(strength_figure(displays), folder / "strengths.png", force=force)


def _key_name(cell: Cell) -> str:
    return f"key {cell.key}: {cell.scheme}"


def _statistic_name(cell: Cell) -> str:
    return "detector's score" if cell.is_default else cell.statistic


def _score_label(cell: Cell) -> str:
    """The name of the cell's scores, which are negated values of a statistic that is smaller for marked images."""
    if cell.published is None:
        return "score"
    return cell.statistic if cell.published.larger_if_marked else f"−{cell.statistic}"


def _panels(
    cells: Sequence[Cell], across: Callable[[Cell], str], down: Callable[[Cell], str], size: tuple[float, float]
) -> tuple[Figure, Iterator[tuple[Axes, list[Cell]]]]:
    """A figure, and the axes and cells of each panel that has cells."""
    from matplotlib.figure import Figure

    columns, rows = (list(dict.fromkeys(map(name, cells))) for name in (across, down))
    figure = Figure(figsize=(size[0] * len(columns), size[1] * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)

    def panels() -> Iterator[tuple[Axes, list[Cell]]]:
        for (i, row), (j, column) in product(enumerate(rows), enumerate(columns)):
            chosen = [cell for cell in cells if (across(cell), down(cell)) == (column, row)]
            axes[i, j].set_visible(bool(chosen))
            if chosen:
                yield axes[i, j], chosen

    return figure, panels()


def roc_panels(cells: Sequence[Cell]) -> Figure:
    """ROC curves under one attack: a column per key, a row per statistic, a curve per method."""
    figure, panels = _panels(cells, _key_name, _statistic_name, (5.2, 3.9))
    for ax, chosen in panels:
        RocDisplay([replace(cell.curve, name=cell.method) for cell in chosen]).plot(ax)
        ax.set_title(f"{_key_name(chosen[0])}, {chosen[0].statistic}", fontsize=10)
    first = cells[0]
    figure.suptitle(
        f"{first.attack}: {len(first.marked)} marked, {counted(len(first.unmarked), 'unmarked image')}", fontsize=11
    )
    return figure


@dataclass(frozen=True)
class HistogramDisplay:
    """Scores of marked (m,) and unmarked images (n,)."""

    marked: Array
    unmarked: Array
    label: str

    def plot(self, ax: Axes) -> None:
        """Two histograms over the same bins."""
        both = np.concatenate([self.marked, self.unmarked])
        edges = np.histogram_bin_edges(both, min(40, max(8, len(both) // 6))).tolist()
        ax.hist(self.unmarked, edges, color=INK, alpha=0.6, label="unmarked")
        ax.hist(self.marked, edges, color=MARK, alpha=0.6, label="marked")
        ax.tick_params(labelsize=8)
        ax.locator_params(axis="x", nbins=5)
        ax.locator_params(axis="y", nbins=5, integer=True)
        ax.set_xlabel(self.label, fontsize=8)
        ax.set_ylabel("images", fontsize=8)


def histogram_figure(cells: Sequence[Cell]) -> Figure:
    """Scores of marked and unmarked images under one attack: a row per key and statistic, a column per method."""
    figure, panels = _panels(cells, lambda c: c.method, lambda c: f"{_key_name(c)}\n{c.statistic}", (3.6, 2.5))
    for ax, (cell,) in panels:
        HistogramDisplay(cell.marked, cell.unmarked, _score_label(cell)).plot(ax)
        ax.set_title(f"{cell.method}, {_key_name(cell)}\n{cell.statistic}", fontsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.suptitle(f"scores under {cells[0].attack}", fontsize=11)
    return figure


@dataclass(frozen=True)
class StrengthDisplay:
    """AUC with its interval against the strength of an attack: `lines` by name, in ascending strength."""

    attack: str
    key: str
    lines: dict[str, list[tuple[float, Cell]]]

    def plot(self, ax: Axes) -> None:
        """A line per method and statistic."""
        methods = list(dict.fromkeys(line[0][1].method for line in self.lines.values()))
        for name, line in self.lines.items():
            first = line[0][1]
            curves = [cell.curve for _, cell in line]
            auc = np.array([c.auc for c in curves])
            low, high = np.array([c.auc_interval or (np.nan, np.nan) for c in curves]).T  # no bar at NaN
            ax.errorbar(
                [strength for strength, _ in line],
                auc,
                (auc - low, high - auc),
                marker="o",
                ms=3,
                lw=1.2,
                capsize=2,
                label=name,
                color=COLOURS[methods.index(first.method) % len(COLOURS)],
                ls="-" if first.is_default else "--",
            )
        ax.axhline(0.5, color=GREY, lw=0.8, ls=":")
        ax.set(xlabel=ATTACKS[self.attack].unit, ylabel="AUC")
        ax.set_title(f"{self.attack}\n{self.key}", fontsize=9)


def _strengths(cells: Sequence[Cell]) -> list[StrengthDisplay]:
    """A display for each key and each single attack that was applied at two or more strengths."""
    lines: dict[tuple[str, str], dict[str, list[tuple[float, Cell]]]] = {}
    for cell in cells:
        steps = () if cell.attack == CLEAN else parse(cell.attack).steps
        if len(steps) == 1 and steps[0].strength is not None:
            line = f"{cell.method}, {_statistic_name(cell)}"
            by_line = lines.setdefault((_key_name(cell), steps[0].name), {})
            by_line.setdefault(line, []).append((steps[0].strength, cell))
    return [
        StrengthDisplay(attack, key, {name: sorted(line, key=lambda pair: pair[0]) for name, line in by_line.items()})
        for (key, attack), by_line in lines.items()
        if max(len({strength for strength, _ in line}) for line in by_line.values()) > 1
    ]


def strength_figure(displays: Sequence[StrengthDisplay]) -> Figure:
    """A panel per key and attack, with a row for each key."""
    from matplotlib.figure import Figure

    by_key = {key: [d for d in displays if d.key == key] for key in dict.fromkeys(d.key for d in displays)}
    number = max(map(len, by_key.values()))
    columns = min(4, number)
    rows = -(-number // columns) * len(by_key)
    figure = Figure(figsize=(3.4 * columns, 2.7 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for row, of_key in zip(axes.reshape(len(by_key), -1), by_key.values(), strict=True):
        for ax in row[len(of_key) :]:
            ax.set_visible(False)
        for ax, display in zip(row, of_key, strict=False):
            display.plot(ax)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=9, frameon=False)
    return figure
