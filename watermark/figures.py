"""Figures. A display holds the numbers and its `plot(ax)` draws them. matplotlib is only imported when drawing."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ringmark.data.files import one_line, refuse_foreign, write_atomic
from ringmark.errors import SchemeError
from ringmark.inversion.noise_recovery import NoiseRecovery
from ringmark.watermark.detect.detector import Detector
from ringmark.watermark.detect.verdict import Judged, Verdict, p_text
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.base import Panel, scheme_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "GREY",
    "INK",
    "MARK",
    "ExplainDisplay",
    "PValueDisplay",
    "Panel",
    "RecoveryDisplay",
    "ScoreDisplay",
    "SpectrumDisplay",
    "drawable",
    "explain",
    "key_figure",
    "recovery_figure",
    "save_figure",
]

Array = np.ndarray[Any, np.dtype[Any]]

INK, MARK, GREY = "#1b3a5c", "#d1495b", "#9aa5b1"
COLOURS = (INK, MARK, "#2a9d8f", "#e9a23b", GREY)
FONT = "DejaVu Sans"  # ships with matplotlib
SECRET = "This picture shows the key. Keep it as secret as the key."
NAME_LENGTH, LINE_LENGTH = 100, 110  # characters that fit across the explain picture
MOST = 1e4  # largest −log₁₀ p drawn; p may be 0
BELOW_LEGEND = 0.68  # share of the axes' height that legends leave free


def save_figure(figure: Figure, path: Path, mode: int = 0o644, *, force: bool = False) -> None:
    """Write a figure atomically in the format of the suffix (PNG, SVG), creating parent folders.

    The umask limits `mode`. The file's metadata name ringmark as its creator. Raises StoreError if, without `force`, it
    would replace a file that ringmark did not write.
    """
    refuse_foreign(path, force)
    picture, kind = io.BytesIO(), path.suffix.lower().removeprefix(".")
    metadata = {"Date": None, "Creator": "ringmark"} if kind == "svg" else {"Software": "ringmark"}
    figure.savefig(picture, format=kind, dpi=150, metadata=metadata)
    write_atomic(path, picture.getvalue(), mode)


# -- text -------------------------------------------------------------------------------------------------------------


def drawable(text: str, length: int | None = None) -> str:
    """The text in one line, with characters that FONT lacks escaped and the middle cut if beyond `length` ≥ 30."""
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    font = FT2Font(findfont(FONT))
    pieces = [c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in one_line(text)]
    if length is None or sum(map(len, pieces)) <= length:
        return "".join(pieces)
    head, tail = _begin(pieces, length // 2), _begin(pieces[::-1], (length - 1) // 2)
    return "".join([*head, "…", *tail[::-1]])


def _begin(pieces: list[str], length: int) -> list[str]:
    """As many of the first pieces as fit in `length` characters."""
    ends = np.cumsum([len(piece) for piece in pieces])
    return pieces[: int(np.searchsorted(ends, length, "right"))]


# -- noise recovery ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecoveryDisplay:
    """Correlation (C, R) of true and recovered noise by latent channel and ring radius."""

    correlation: Array

    @classmethod
    def of(cls, recovery: NoiseRecovery) -> RecoveryDisplay:
        """Correlations a / √(a² + v) from attenuation a and variance v."""
        return cls((recovery.attenuation / recovery.null.sqrt()).numpy())

    def plot(self, ax: Axes) -> None:
        """Draw a line per channel."""
        for channel, values in enumerate(self.correlation):
            ax.plot(values, ".-", color=COLOURS[channel % len(COLOURS)], lw=1.2, label=f"channel {channel}")
        ax.axhline(0, color=GREY, lw=0.8)
        ax.set(xlabel="ring radius", ylabel="correlation of true and recovered noise", ylim=(-0.2, 1))
        ax.legend(fontsize=8, frameon=False)


def recovery_figure(recovery: NoiseRecovery) -> Figure:
    """A figure of how well noise is recovered, by ring."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    RecoveryDisplay.of(recovery).plot(figure.subplots())
    return figure


# -- spectra of keys and noise ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpectrumDisplay:
    """A spectrum, faded outside the mark; the colour range is ±2.5 `scale`."""

    panel: Panel

    @property
    def scale(self) -> float:
        """The root mean square of all values or of those in the mark, whichever is larger; 1 if all are zero."""
        values, inside = self.panel.values, self.panel.inside
        return float(max(np.sqrt(np.square(v).mean()) for v in (values, values[inside]))) or 1.0

    def plot(self, ax: Axes) -> None:
        """Draw the spectrum, with dashed circles around the mark, which are ellipses if the sides differ."""
        from matplotlib.ticker import MaxNLocator

        height, width = self.panel.values.shape
        extent = (-width / 2 - 0.5, width / 2 - 0.5, height / 2 - 0.5, -height / 2 - 0.5)
        opacity = np.where(self.panel.inside, 1, 0.25)
        limit = 2.5 * self.scale
        ax.imshow(self.panel.values, cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent, alpha=opacity)
        for radius in (self.panel.radii[0] - 0.5, self.panel.radii[1] + 0.5):
            self._plot_circle(ax, *(2 * radius * n / self.panel.side for n in (width, height)))
        empty = "" if self.panel.values[self.panel.inside].any() else ", all zero"
        ax.set_title(f"{self.panel.title}{empty}", fontsize=10)
        ax.set_xlabel("frequency, periods per image side", fontsize=9)
        ax.tick_params(labelsize=8)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))

    @staticmethod
    def _plot_circle(ax: Axes, width: float, height: float) -> None:
        from matplotlib.patches import Ellipse

        if width > 0:
            ax.add_patch(Ellipse((0, 0), width, height, fill=False, color=INK, lw=1, ls="--"))


def key_figure(key: Key) -> Figure:
    """A figure of a key's spectrum, with a panel per latent channel. The figure reveals the key.

    Raises SchemeError, scheme.no-picture, for a scheme whose keys cannot be drawn.
    """
    from matplotlib.figure import Figure

    panels = scheme_of(key).key_panels()
    if not panels:
        raise SchemeError("scheme.no-picture", "keys of this scheme cannot be drawn", subject=f"key {key.fingerprint}")
    figure = Figure(figsize=(3.2 * max(2, len(panels)), 4), layout="constrained")
    for ax, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        SpectrumDisplay(panel).plot(ax)
    figure.suptitle(f"key {key.fingerprint}", fontsize=11, parse_math=False)
    figure.supxlabel(SECRET, fontsize=9, color=MARK)
    return figure


# -- what a verdict rests on ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreDisplay:
    """An image's score among those of unmarked images.

    `density` (N,) is the null density at the scores `x` (N,), if it is known; `references` (n,) are the scores of a
    calibration's unmarked images, if there are any; `limit` is the score at which p equals `alpha`, if it is known.
    """

    name: str
    score: float
    alpha: float
    x: Array
    density: Array | None = None
    references: Array | None = None
    limit: float | None = None

    def plot(self, ax: Axes) -> None:
        """Draw the density as a filled curve, the references as a histogram, and score and limit as vertical lines."""
        if self.density is not None:
            ax.fill_between(self.x, self.density, color=GREY, alpha=0.5, label="unmarked, theory")
        if self.references is not None:
            label = f"{len(self.references)} unmarked images"
            ax.hist(self.references, "auto", density=True, histtype="step", color=INK, label=label)
        if self.limit is not None:
            ax.axvline(self.limit, ymax=BELOW_LEGEND, color=INK, lw=1, ls="--", label=f"p = {self.alpha:g}")
        ax.axvline(self.score, ymax=BELOW_LEGEND, color=MARK, lw=2, label=f"this image: {self.score:.3g}")
        ax.set_title("score among unmarked images", fontsize=10)
        ax.set_xlabel(self.name, fontsize=9)
        ax.tick_params(labelsize=8)
        ax.locator_params(axis="x", nbins=5)
        ax.set(yticks=[], ylim=(0, ax.get_ylim()[1] / BELOW_LEGEND))
        ax.legend(fontsize=8, frameon=False, loc="upper left")


@dataclass(frozen=True)
class PValueDisplay:
    """An image's p-value, for scores whose null distribution cannot be drawn."""

    name: str
    score: float
    log10_p: float
    alpha: float

    def plot(self, ax: Axes) -> None:
        """Draw the p-value with the region of marked images shaded; evidence grows to the right."""
        from matplotlib.ticker import MaxNLocator

        at, limit = min(-self.log10_p, MOST), -np.log10(self.alpha)
        end = 1.15 * max(at, limit, 1)
        label = f"key present: p ≤ {self.alpha:g}"
        ax.axvspan(limit, end, ymax=BELOW_LEGEND, color=MARK, alpha=0.15, lw=0, label=label)
        ax.axvline(limit, ymax=BELOW_LEGEND, color=INK, lw=1, ls="--")
        ax.axvline(at, ymax=BELOW_LEGEND, color=MARK, lw=2, label=f"this image: {p_text(10**self.log10_p)}")
        ax.set(xlim=(-0.05 * end, end), yticks=[], ylim=(0, 1))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.set_title(f"{self.name}\n{self.score:.3g}", fontsize=10)
        ax.set_xlabel("−log10 p", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.legend(fontsize=8, frameon=False, loc="upper left")


@dataclass(frozen=True)
class ExplainDisplay:
    """The evidence for a verdict: the image (H, W, 3), the spectra of the recovered noise and the key, and the score.

    `name` is the image's name, `verdict` the sentence, `present` its outcome.
    """

    name: str
    verdict: str
    present: bool | None
    image: Array
    panels: Sequence[Panel]
    evidence: ScoreDisplay | PValueDisplay

    WIDTH = 13.0
    LINE, PANELS, MARGIN = 0.27, 3.4, 0.12  # inches

    @property
    def lines(self) -> list[str]:
        """The verdict, wrapped to the width of the figure."""
        return textwrap.wrap(drawable(self.verdict), LINE_LENGTH)

    def figure(self) -> Figure:
        """The figure: name and verdict on top, the panels in a row, a warning at the bottom."""
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        header = (1 + len(self.lines)) * self.LINE + 2 * self.MARGIN
        footer = self.LINE + self.MARGIN
        height = header + self.PANELS + footer
        layout = ConstrainedLayoutEngine(rect=(0, footer / height, 1, self.PANELS / height))
        figure = Figure(figsize=(self.WIDTH, height), layout=layout)
        self._plot_panels(figure)
        self._write(figure, height)
        return figure

    def _plot_panels(self, figure: Figure) -> None:
        first, *middle, last = figure.subplots(1, 2 + len(self.panels))
        first.imshow(self.image)
        first.set_axis_off()
        first.set_title("image", fontsize=10)
        for ax, panel in zip(middle, self.panels, strict=True):
            SpectrumDisplay(panel).plot(ax)
        self.evidence.plot(last)

    def _write(self, figure: Figure, height: float) -> None:
        colour = {True: MARK, False: INK, None: "black"}[self.present]
        name = drawable(self.name, NAME_LENGTH)
        rows = [(name, {"color": "black"}), *((line, {"color": colour, "weight": "bold"}) for line in self.lines)]
        for i, (text, style) in enumerate(rows):
            y = 1 - (self.MARGIN + (i + 0.5) * self.LINE) / height
            self._line(figure, y, text, **style)
        self._line(figure, (self.MARGIN + 0.5 * self.LINE) / height, SECRET, color=MARK)

    @staticmethod
    def _line(figure: Figure, y: float, text: str, **style: Any) -> None:
        figure.text(0.5, y, text, ha="center", va="center", fontsize=11, family=FONT, parse_math=False, **style)


def explain(detector: Detector, judged: Judged, name: str) -> Figure:
    """A figure of the evidence for the best key's verdict. The figure reveals the key."""
    verdict = judged.best
    return ExplainDisplay(
        name=name,
        verdict="; ".join(filter(None, [judged.sentence(), verdict.by_stage()])),
        present=verdict.present,
        image=np.asarray(judged.sample.image),
        panels=_panels(detector, judged),
        evidence=_evidence(detector, verdict),
    ).figure()


def _panels(detector: Detector, judged: Judged) -> list[Panel]:
    """The spectra of the recovered noise and the key; empty for a scheme that cannot be drawn."""
    verdict = judged.best
    panels = detector.schemes[verdict.key].panels(judged.noise[None].nan_to_num(0.0, 0.0, 0.0))
    titles = [", picture as given" if verdict.by_search else "", f" {verdict.key[:8]}"]
    return [
        panel._replace(title=f"{panel.title}{title}".replace(", ", "\n", 1))
        for panel, title in zip(panels, titles, strict=False)
    ]


def _evidence(detector: Detector, verdict: Verdict) -> ScoreDisplay | PValueDisplay:
    """The score among unmarked images if its density or references are known, otherwise the p-value."""
    name = detector.schemes[verdict.key].score_name
    limit = detector.threshold(verdict.key)
    reach = 1.15 * max(0.3, abs(verdict.score), limit or 0)
    x = np.linspace(-reach, reach, 1001)
    density = detector.density(verdict.key, x)
    if density is not None:  # a score that cannot be negative needs no room there
        possible = x >= x[density > 0][0]
        x, density = x[possible], density[possible]
    references = detector.reference_scores(verdict.key)
    if verdict.by_search or not np.isfinite(verdict.score) or (density is None and references is None):
        title = f"largest {name} of the search" if verdict.by_search else name
        return PValueDisplay(name=title, score=verdict.score, log10_p=verdict.log10_p, alpha=detector.alpha)
    return ScoreDisplay(
        name=name,
        score=verdict.score,
        alpha=detector.alpha,
        x=x,
        density=density,
        references=references,
        limit=limit,
    )
