"""Pictures of results. matplotlib is imported where something is drawn."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ringmark.data.files import one_line, write_atomic
from ringmark.errors import SchemeError
from ringmark.inversion.noise_recovery import NoiseRecovery
from ringmark.watermark.detect.detector import Detector
from ringmark.watermark.detect.verdict import Judged, Verdict, p_text
from ringmark.watermark.evaluation.rates import Curve, pointwise_band
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.base import scheme_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "explain",
    "key_figure",
    "markdown",
    "plot_roc",
    "recovery_figure",
    "roc_figure",
    "save_figure",
    "table",
    "write_table",
]

INK, MARK, GREY = "#1b3a5c", "#d1495b", "#9aa5b1"
COLOURS = (INK, MARK, "#2a9d8f", "#e9a23b", GREY)


def plot_roc(curves: Sequence[Curve], ax: Axes) -> None:
    """ROC curves and their bands over a logarithmic FPR axis, which starts at what the number of negatives can resolve."""
    floor = min(0.5 / c.negatives for c in curves)
    for curve, colour, style in zip(curves, COLOURS * 4, ["-", "--", "-.", ":"] * 5, strict=False):
        draw_curve(ax, curve, floor, curve.name, color=colour, ls=style, lw=1.8)
    chance = np.geomspace(floor, 1, 100)
    ax.plot(chance, chance, color=GREY, lw=0.8, ls=":", label="chance")
    ax.axvline(curves[0].fpr_limit, color=GREY, lw=0.8)
    ax.set(xscale="log", xlim=(floor, 1), ylim=(0, 1.02), xlabel="false-positive rate", ylabel="true-positive rate")
    ax.legend(loc="lower right", fontsize=8, frameon=False)


def draw_curve(ax: Axes, curve: Curve, floor: float, name: str, *, color: str, ls: str = "-", lw: float = 1.5) -> None:
    """A curve over FPRs of at least `floor`, with its pointwise band, and its AUC in the legend."""
    fpr, (low, high) = np.maximum(curve.fpr, floor), curve.auc_interval
    ax.fill_between(fpr, *pointwise_band(curve), step="post", color=color, alpha=0.15, lw=0)
    label = f"{name}: AUC {curve.auc:.3f} [{low:.3f}, {high:.3f}]"
    ax.step(fpr, curve.tpr, where="post", color=color, ls=ls, lw=lw, label=label)


def recovery_figure(recovery: NoiseRecovery) -> Figure:
    """Correlation of true and recovered noise against ring radius, a line a latent channel: a / √(a² + v)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for channel, values in enumerate(recovery.attenuation / recovery.null.sqrt()):
        ax.plot(values.numpy(), ".-", color=COLOURS[channel % len(COLOURS)], lw=1.2, label=f"channel {channel}")
    ax.axhline(0, color=GREY, lw=0.8)
    ax.set(xlabel="ring radius", ylabel="correlation of true and recovered noise", ylim=(-0.2, 1))
    ax.legend(fontsize=8, frameon=False)
    return figure


def key_figure(key: Key) -> Figure:
    """A key's spectrum, a panel a latent channel. Whoever sees the figure has the key.

    Raises SchemeError for a scheme whose keys cannot be drawn.
    """
    from matplotlib.figure import Figure

    panels = scheme_of(key).key_panels()
    if not panels:
        raise SchemeError("scheme.no-picture", "keys of this scheme cannot be drawn", subject=f"key {key.fingerprint}")
    figure = Figure(figsize=(3.2 * len(panels), 3.6), layout="constrained")
    for ax, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        ax.imshow(panel.values, cmap="RdBu_r", vmin=-2.5, vmax=2.5, extent=_frequency_extent(*panel.values.shape))
        ax.set_title(panel.title, fontsize=10)
        ax.set_xlabel("frequency, periods an image side")
    figure.suptitle(f"key {key.fingerprint}: as secret as the key", fontsize=10, parse_math=False)
    return figure


def roc_figure(curves: Sequence[Curve], title: str = "") -> Figure:
    """One figure with these curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    ax = figure.subplots()
    plot_roc(curves, ax)
    ax.set_title(title or f"{curves[0].positives} marked, {curves[0].negatives} unmarked images", fontsize=10)
    return figure


def save_figure(figure: Figure, path: Path, mode: int = 0o644) -> None:
    """Write a figure, whole or not at all, in the format that the suffix names; parent folders are made.

    `mode` is the new file's, cut by the umask.
    """
    picture, kind = io.BytesIO(), path.suffix.lower().removeprefix(".")
    figure.savefig(picture, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write_atomic(path, picture.getvalue(), mode)


def table(curves: Sequence[Curve], seconds: Sequence[float] | None = None) -> str:
    """The curves' numbers as a Markdown table, with 95 % intervals."""
    limit = f"TPR at {curves[0].fpr_limit:.3g} FPR"
    rows = [["", "AUC", limit, "marked + unmarked", *(["s an image"] if seconds else [])]]
    for i, c in enumerate(curves):
        interval = lambda pair: "[{:.3f}, {:.3f}]".format(*pair)
        cells = [
            c.name,
            f"{c.auc:.3f} {interval(c.auc_interval)}",
            f"{c.tpr_at:.3f} {interval(c.tpr_at_interval)}",
            f"{c.positives} + {c.negatives}",
        ]
        rows.append(cells + ([f"{seconds[i]:.2f}"] if seconds else []))
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table, columns aligned; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def write_table(path: Path, rows: list[dict]) -> None:
    """Rows with the same keys as a CSV file with a header."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def explain(detector: Detector, judged: Judged, name: str) -> Figure:
    """What the best key's verdict rests on: image, recovered spectrum with the ring, key, and the score on its null.

    Whoever sees the figure sees the key.
    """
    from matplotlib.figure import Figure

    verdict = judged.best
    figure = Figure(figsize=(13, 3.7), layout="constrained")
    axes = figure.subplots(1, 4)
    axes[0].imshow(np.asarray(judged.sample.image))
    axes[0].set_title("image")
    for ax, panel in zip(axes[1:], detector.schemes[verdict.key].panels(judged.noise[None]), strict=False):
        extent, low = _frequency_extent(*panel.values.shape), panel.radii[0]
        alpha = np.where(panel.inside, 1, 0.25)
        ax.imshow(panel.values, cmap="RdBu_r", vmin=-2.5, vmax=2.5, extent=extent, alpha=alpha)
        for radius in (low - 0.5, panel.radii[1] + 0.5):
            ax.add_patch(_circle(radius))
        ax.set_title(panel.title)
        ax.set_xlabel("frequency, periods an image side")
    _plot_null(axes[3], detector, verdict)
    axes[0].set_axis_off()
    figure.suptitle(f"{one_line(name)}: {verdict.sentence()}", fontsize=11, parse_math=False)
    return figure


def _frequency_extent(height: int, width: int) -> tuple[float, float, float, float]:
    return (-width / 2 - 0.5, width / 2 - 0.5, height / 2 - 0.5, -height / 2 - 0.5)


def _circle(radius: float):
    from matplotlib.patches import Circle

    return Circle((0, 0), radius, fill=False, color=INK, lw=1, ls="--")


def _plot_null(ax: Axes, detector: Detector, verdict: Verdict) -> None:
    """The score's density on unmarked images, those of a calibration, and where this image stands."""
    scheme = detector.schemes[verdict.key]
    ax.set_title("score on its null")
    reach = min(0.999, max(0.3, abs(verdict.score) * 1.15))  # a cosine's density ends at 1
    grid = np.linspace(-reach, reach, 1001)
    density = None if verdict.by_search else detector.density(verdict.key, grid)
    if density is None:
        text = f"{scheme.score_name} = {verdict.score:.2f}\n{p_text(verdict.p_value)}"
        ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes)
        ax.set_axis_off()
        return
    ax.fill_between(grid, density, color=GREY, alpha=0.5, label="unmarked")
    if (scores := detector.reference_scores(verdict.key)) is not None:
        ax.hist(scores, "auto", density=True, histtype="step", color=INK, label=f"{len(scores)} unmarked images")
    if (limit := detector.threshold(verdict.key)) is not None:
        ax.axvline(limit, color=INK, lw=1, ls="--", label=f"p = {detector.alpha:g}")
    ax.axvline(verdict.score, color=MARK, lw=2, label="this image")
    ax.set(xlabel=scheme.score_name, yticks=[], ylim=(0, 1.5 * ax.get_ylim()[1]))  # room for the legend
    ax.legend(fontsize=8, frameon=False, loc="upper left")
