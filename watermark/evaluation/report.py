"""An evaluation as tables and plots: evaluation.md, .csv and .json, scores.csv, and a picture of each attack."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ringmark.data.files import write_atomic
from ringmark.watermark.attacks.chains import parse
from ringmark.watermark.attacks.distortions import ATTACKS
from ringmark.watermark.evaluation.cells import CLEAN, DISTANCE, FPRS, Cell, Evaluation
from ringmark.watermark.figures import COLOURS, GREY, INK, MARK, draw_curve, markdown, save_figure, write_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NONE = "none"

__all__ = ["histogram_figure", "pivot", "roc_panels", "strength_figure", "summary", "write_plots", "write_tables"]


def write_tables(found: Evaluation, folder: Path) -> None:
    """Raises EvaluationError for an empty class or scores that are not numbers."""
    record = found.record()
    write_table(folder / "evaluation.csv", record["rows"])
    write_table(folder / "scores.csv", found.images)
    write_atomic(folder / "evaluation.json", json.dumps(record, indent=1))
    write_atomic(folder / "evaluation.md", _report(found, record))


def write_plots(found: Evaluation, folder: Path) -> None:
    """For each attack ROC curves and histograms, of the own statistic and the published distance; and AUC by strength."""
    shown = _shown(found.cells)
    for attack, cells in _by_attack(shown).items():
        slug = CLEAN if attack == CLEAN else parse(attack).slug
        roc = roc_panels(cells)
        for suffix in ("png", "svg"):
            save_figure(roc, folder / f"roc-{slug}.{suffix}")
        save_figure(histogram_figure(cells), folder / f"histograms-{slug}.png")
    if strengths := _strengths(shown):
        save_figure(strength_figure(strengths), folder / "strengths.png")


def _shown(cells: Sequence[Cell]) -> list[Cell]:
    """Those with the detector's own statistic or the published distance: what plots and the short table show."""
    return [cell for cell in cells if cell.by_default or cell.statistic == DISTANCE]


def _by_attack(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    return {attack: [c for c in cells if c.attack == attack] for attack in dict.fromkeys(c.attack for c in cells)}


def summary(found: Evaluation) -> str:
    """The short table: AUC and its interval for each key, attack and method, by the own statistic and the published one."""
    rows = [["key", "scheme", "attack", "method", "AUC, own statistic", "AUC, published distance"]]
    shown = _shown(found.cells)
    for own, published in zip(shown[::2], shown[1::2], strict=True):
        cells = [_with_interval(cell.row, "auc") for cell in (own, published)]
        rows.append([own.key, own.scheme, own.attack, own.method, *cells])
    return markdown(rows)


def _report(found: Evaluation, record: dict) -> str:
    """evaluation.md."""
    settings, rows = record["settings"], record["rows"]
    parts = [
        "# Evaluation",
        f"Model {settings['model']['name']}, {settings['steps']} DDIM steps, guidance {settings['guidance']:g}, seed {settings['seed']}; {_numbers(rows)}; {settings['images']}.",
        f"Calibrations: {', '.join(f'{method} {name or NONE}' for method, name in settings['calibrations'].items())}; {NONE} means the null that is known of the model.{_unfit(settings['calibration_unfit'])}",
        f"{len(found.refused)} files could not be used. Intervals are 95 %: DeLong's for the AUC, Clopper-Pearson's for rates. An image of which nothing can be said, one flat colour say, counts as the least marked of all; the means are over the attacks, without {CLEAN}.",
        "## AUC",
        pivot(found.cells, "auc"),
        _cross_check(rows),
    ]
    for fpr in FPRS:
        parts += [f"## TPR at {100 * fpr:g} % FPR", _or_too_few(found.cells, f"tpr_{fpr:g}")]
    for fpr in FPRS:
        parts += [
            f"## Threshold for {100 * fpr:g} % FPR chosen on one half of the unmarked images, FPR on the other half",
            _or_too_few(found.cells, f"split_{fpr:g}_fpr"),
            "TPR at that threshold:",
            _or_too_few(found.cells, f"split_{fpr:g}_tpr"),
        ]
    own = [cell for cell in found.cells if cell.by_default]
    for alpha in FPRS:
        parts += [f"## Share of unmarked images with p ≤ {alpha:g}", pivot(own, f"p_{alpha:g}_fpr")]
        parts += [f"Share of marked images with p ≤ {alpha:g}:", pivot(own, f"p_{alpha:g}_tpr")]
    parts += [
        "## Time and memory",
        _cost(found.cells),
        "## What the mark costs the pictures",
        _quality(record["quality"]),
    ]
    return "\n\n".join(parts) + "\n"


def _unfit(reasons: dict[str, str]) -> str:
    """Which methods the calibration at hand does not fit, and why."""
    return "".join(f" {method}: {why}." for method, why in reasons.items())


def _cross_check(rows: list[dict]) -> str:
    """How far DeLong's intervals are from those of the bootstrap."""
    ends = [
        [row[f"auc_{end}"] - row[f"bootstrap_{end}"] for end in ("low", "high")]
        for row in rows
        if row["bootstrap_low"] is not None and row["auc"] < 1
    ]
    if not ends:
        return "The bootstrap has nothing to say: too few prompts, or classes that do not overlap."
    return f"Ends of DeLong's intervals and of those of a stratified bootstrap, clustered by prompt, differ by {np.abs(ends).max():.3f} at most and by {np.abs(ends).mean():.3f} on average."


def _numbers(rows: list[dict]) -> str:
    """'200 marked and 200 unmarked images', or the least and the most."""
    span = lambda kind: "-".join(dict.fromkeys(str(f(row[kind] for row in rows)) for f in (min, max)))
    return f"{span('marked')} marked and {span('unmarked')} unmarked images"


def pivot(cells: Sequence[Cell], name: str) -> str:
    """A number of the rows with its interval: keys, statistics and methods down, attacks across, then the attacks' mean.

    An attack whose number is not there has an empty cell; the mean is over those that have one, without `CLEAN`.
    """
    attacks, down = list(_by_attack(cells)), {}
    for cell in cells:
        down.setdefault((cell.key, cell.scheme, cell.statistic, cell.method), {})[cell.attack] = cell.row
    rows = [["key", "scheme", "statistic", "method", *attacks, *(["mean"] if attacks != [CLEAN] else [])]]
    for names, by_attack in down.items():
        values = [row[name] for attack, row in by_attack.items() if attack != CLEAN and row[name] is not None]
        mean = [f"{np.mean(values):.3f}" if values else ""]
        shown = [_with_interval(by_attack[attack], name) for attack in attacks]
        rows.append([*names, *shown, *(mean if attacks != [CLEAN] else [])])
    return markdown(rows)


def _or_too_few(cells: Sequence[Cell], name: str) -> str:
    if all(cell.row[name] is None for cell in cells):
        return "Too few unmarked images for this rate."
    return pivot(cells, name)


def _with_interval(row: dict, name: str) -> str:
    if row[name] is None:
        return ""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*(row[name + end] for end in ("", "_low", "_high")))


def _cost(cells: Sequence[Cell]) -> str:
    rows = [["method", "median s an image", "MB a batch"]]
    for method in dict.fromkeys(cell.method for cell in cells):
        some = [cell for cell in cells if cell.method == method]
        memory = "" if np.isnan(some[0].megabytes) else f"{some[0].megabytes:.0f}"
        rows.append([method, f"{np.median([cell.seconds for cell in some]):.2f}", memory])
    return markdown(rows)


def _quality(rows: list[dict]) -> str:
    """Fréchet distances against labels drawn by lot, and the share of images that show what their prompt asks for."""
    if not rows:
        return "Too few images."
    table = [["key", "Fréchet distance", "by lot: mean", "95 % point", "p"]]
    numbers = lambda row: [f"{row['frechet_' + name]:.3f}" for name in ("distance", "expected", "limit", "p")]
    table += [[row["key"], *numbers(row)] for row in rows]
    said = "Marked and unmarked images show different things, so distributions of simple features are compared: colour means and deviations, energies of six frequency bands. By lot: the same images with labels drawn at random."
    obeyed = [n for n in rows[0] if not n.startswith("frechet") and n.endswith(("_marked", "_unmarked"))]
    if not obeyed:
        return f"{said}\n\n{markdown(table)}"
    second = [["key", *(name.replace("_", ", ") for name in obeyed)]]
    second += [[row["key"], *(_with_interval(row, name) for name in obeyed)] for row in rows]
    return f"{said}\n\n{markdown(table)}\n\nShare of images in which a classifier sees the sky and the ground of the prompt:\n\n{markdown(second)}"


def _panels(
    cells: Sequence[Cell], across: Callable[[Cell], str], down: Callable[[Cell], str], size: tuple[float, float]
):
    """A figure, and for each panel its axes, its two names and its cells."""
    from matplotlib.figure import Figure

    columns, rows = (list(dict.fromkeys(map(name, cells))) for name in (across, down))
    figure = Figure(figsize=(size[0] * len(columns), size[1] * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    panels = []
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            some = [c for c in cells if (across(c), down(c)) == (column, row)]
            panels.append((axes[i, j], column, row, some))
            axes[i, j].set_visible(bool(some))
    return figure, panels


def _key_name(cell: Cell) -> str:
    return f"key {cell.key}: {cell.scheme}"


def roc_panels(cells: Sequence[Cell]) -> Figure:
    """ROC curves under one attack, a column a key, a row a statistic: logarithmic FPR, pointwise exact 95 % bands."""
    down = lambda cell: "own statistic" if cell.by_default else cell.statistic
    figure, panels = _panels(cells, _key_name, down, (5.2, 3.9))
    for ax, name, _, some in panels:
        floor = 0.5 / len(some[0].unmarked)
        for i, cell in enumerate(some):
            draw_curve(ax, cell.curve, floor, cell.method, color=COLOURS[i % len(COLOURS)])
        chance = np.geomspace(floor, 1, 100)
        ax.plot(chance, chance, color=GREY, lw=0.8, ls=":")
        ax.set(xscale="log", xlim=(floor, 1), ylim=(0, 1.02))
        ax.set(xlabel="false-positive rate", ylabel="true-positive rate")
        ax.set_title(f"{name}, {some[0].statistic}", fontsize=10)
        ax.legend(loc="lower right", fontsize=8, framealpha=0.8, edgecolor="none")
    first = cells[0]
    figure.suptitle(f"{first.attack}: {len(first.marked)} marked, {len(first.unmarked)} unmarked images", fontsize=11)
    return figure


def histogram_figure(cells: Sequence[Cell]) -> Figure:
    """Scores of marked and unmarked images under one attack: a row a key and statistic, a column a method."""
    down = lambda c: f"{_key_name(c)}\n{c.statistic}"
    figure, panels = _panels(cells, lambda c: c.method, down, (3.6, 2.5))
    for ax, column, row, (cell,) in panels:
        both = np.concatenate([cell.marked, cell.unmarked])
        edges = np.histogram_bin_edges(both, min(40, max(8, len(both) // 6)))
        ax.hist(cell.unmarked, edges, color=INK, alpha=0.6, label="unmarked")
        ax.hist(cell.marked, edges, color=MARK, alpha=0.6, label="marked")
        ax.set_title(f"{column}, {row}", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.locator_params(axis="x", nbins=5)
        ax.locator_params(axis="y", nbins=5, integer=True)
        ax.set_xlabel("score" if cell.by_default else "−distance", fontsize=8)
        ax.set_ylabel("images", fontsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.suptitle(f"scores under {cells[0].attack}", fontsize=11)
    return figure


def _strengths(cells: Sequence[Cell]) -> dict[str, dict[str, list[tuple[float, Cell]]]]:
    """Single attacks that occur with two strengths or more: for each key, by attack, strengths and cells, rising."""
    found: dict[str, dict[str, list[tuple[float, Cell]]]] = {}
    for cell in cells:
        steps = () if cell.attack == CLEAN else parse(cell.attack).steps
        if len(steps) == 1 and steps[0].strength is not None:
            found.setdefault(_key_name(cell), {}).setdefault(steps[0].name, []).append((steps[0].strength, cell))
    rising = lambda some: sorted(some, key=lambda pair: pair[0])
    several = lambda some: len({strength for strength, _ in some}) > 1
    chosen = {key: {n: rising(some) for n, some in by.items() if several(some)} for key, by in found.items()}
    return {key: by for key, by in chosen.items() if by}


def strength_figure(strengths: dict[str, dict[str, list[tuple[float, Cell]]]]) -> Figure:
    """AUC with DeLong's interval against an attack's strength: a panel a key and attack, a line a method and statistic."""
    from matplotlib.figure import Figure

    number = max(map(len, strengths.values()))
    columns = min(4, number)
    each = -(-number // columns)  # rows of one key
    rows = each * len(strengths)
    figure = Figure(figsize=(3.4 * columns, 2.7 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).reshape(len(strengths), -1)
    for (key, by_attack), own in zip(strengths.items(), axes, strict=True):
        for ax in own[len(by_attack) :]:
            ax.set_visible(False)
        for ax, (name, some) in zip(own, by_attack.items(), strict=False):
            _plot_strengths(ax, name, some)
            ax.set_title(f"{name}\n{key}", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=9, frameon=False)
    return figure


def _plot_strengths(ax: Axes, name: str, some: list[tuple[float, Cell]]) -> None:
    methods = list(dict.fromkeys(cell.method for _, cell in some))
    for method, by_default in product(methods, (True, False)):
        line = [(x, cell.curve) for x, cell in some if (cell.method, cell.by_default) == (method, by_default)]
        x, auc = [x for x, _ in line], np.array([curve.auc for _, curve in line])
        low, high = np.array([curve.auc_interval for _, curve in line]).T
        style = {"color": COLOURS[methods.index(method) % len(COLOURS)], "ls": "-" if by_default else "--"}
        label = f"{method}, {'own statistic' if by_default else DISTANCE}"
        ax.errorbar(x, auc, (auc - low, high - auc), marker="o", ms=3, lw=1.2, capsize=2, label=label, **style)
    ax.axhline(0.5, color=GREY, lw=0.8, ls=":")
    ax.set(xlabel=ATTACKS[name].unit, ylabel="AUC")
