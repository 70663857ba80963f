"""Cells of an evaluation: the scores of one key, attack, method and statistic, and the rates computed from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from ringmark.watermark.evaluation.gain import Gain
from ringmark.watermark.evaluation.rates import (
    GROUPS,
    Array,
    Curve,
    Groups,
    Interval,
    OperatingPoint,
    bootstrap_interval,
    roc,
    split_operating_point,
    tpr_at,
)
from ringmark.watermark.schemes.base import PublishedStatistic
from ringmark.watermark.statistics import needed_references

__all__ = ["CLEAN", "FPRS", "Cell", "Evaluation", "Row"]

CLEAN = "clean"  # no attack
FPRS = (0.01, 0.001)
NAMES = ("key", "scheme", "attack", "method", "statistic")

Row = dict[str, Any]
"""Plain values by column name."""


@dataclass(frozen=True)
class Cell:
    """Scores of marked (m,) and unmarked images (n,), larger if marked.

    `groups` assigns images to groups; images of one group may be dependent. `scheme` is the scheme's label. `p` holds
    the p-values of both classes and is only set for the detector's score (`is_default`), `published` only for a
    published statistic. `seconds` is the median time per image, `megabytes` the memory of a batch, NaN if it cannot be
    measured.
    """

    key: str
    scheme: str
    attack: str
    method: str
    statistic: str
    marked: Array
    unmarked: Array
    groups: Groups
    p: tuple[Array, Array] | None
    published: PublishedStatistic | None
    seconds: float
    megabytes: float

    @property
    def is_default(self) -> bool:
        """Whether the statistic is the detector's score."""
        return self.p is not None

    @property
    def is_compared(self) -> bool:
        """Whether plots and short tables show the statistic beside the detector's score."""
        return self.published is not None and self.published.compared

    @cached_property
    def curve(self) -> Curve:
        """The ROC curve. Raises EvaluationError as `roc` does.

        The AUC's interval is that of the bootstrap if images of one class share a group: DeLong's, for independent
        images, is then too narrow.
        """
        curve = self._independent
        shared = any(len(set(groups)) < len(groups) for groups in self.groups)
        return replace(curve, auc_interval=self._bootstrap) if shared else curve

    @cached_property
    def _independent(self) -> Curve:
        """The curve with the interval for independent images."""
        return roc(self.marked, self.unmarked, name=f"{self.method}, {self.statistic}")

    @cached_property
    def row(self) -> Row:
        """The numbers by name; None means "too few unmarked images" for a rate, "not measured" otherwise.

        Intervals are 95 %. For the AUC, `delong` is for independent images, and `bootstrap` is clustered by `groups`,
        if there are at least GROUPS of them; `auc` has the one that holds (see `curve`). For rates, they are
        Clopper–Pearson's. `tpr_F` is read off the ROC curve at FPR F. `split_F` takes its threshold from one half of
        the unmarked images and its FPR from the other. `p_F` calls images with p ≤ F marked.
        """
        row: Row = {name: getattr(self, name) for name in NAMES} | {"auc": self.curve.auc}
        row |= _interval("auc", self.curve.auc_interval) | _interval("delong", self._independent.auc_interval)
        row |= _interval("bootstrap", self._bootstrap)
        for fpr in FPRS:
            row |= _rates(f"tpr_{fpr:g}", self._read_off(fpr), ("tpr",))
            split = self._split(fpr)
            row |= {f"split_{fpr:g}_threshold": split and split.threshold} | _rates(f"split_{fpr:g}", split)
        for alpha in FPRS:
            row |= _rates(f"p_{alpha:g}", self._by_p(alpha))
        row |= {"seconds": self.seconds, "megabytes": None if np.isnan(self.megabytes) else self.megabytes}
        return row | {"marked": len(self.marked), "unmarked": len(self.unmarked)}

    @cached_property
    def _bootstrap(self) -> Interval | None:
        if min(len(set(groups)) for groups in self.groups) < GROUPS:
            return None
        return bootstrap_interval(self.marked, self.unmarked, groups=self.groups)

    def _read_off(self, fpr: float) -> OperatingPoint | None:
        enough = len(self.unmarked) >= needed_references(fpr)
        return tpr_at(self.marked, self.unmarked, fpr) if enough else None

    def _split(self, fpr: float) -> OperatingPoint | None:
        enough = (len(self.unmarked) + 1) // 2 >= needed_references(fpr)
        return split_operating_point(self.marked, self.unmarked, fpr, seed=0) if enough else None

    def _by_p(self, alpha: float) -> OperatingPoint | None:
        return OperatingPoint.of(-self.p[0], -self.p[1], alpha, -alpha) if self.p else None


def _interval(name: str, pair: Interval | None) -> Row:
    low, high = pair or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def _rates(name: str, point: OperatingPoint | None, rates: tuple[str, ...] = ("tpr", "fpr")) -> Row:
    """Each rate and its interval; a single rate has just the given name."""
    row: Row = {}
    for rate in rates:
        column = f"{name}_{rate}" if len(rates) > 1 else name
        row[column] = getattr(point, rate) if point else None
        row |= _interval(column, getattr(point, f"{rate}_interval") if point else None)
    return row


@dataclass(frozen=True)
class Evaluation:
    """The outcome of an evaluation.

    `images` has a record per image, key, attack and method; `quality` has a row per key with the mark's cost in image
    quality; `refused` has a line for each file that could not be used; `gains` holds the paired differences of mean
    AUC.
    """

    settings: dict[str, Any]
    cells: list[Cell]
    images: list[Row]
    quality: list[Row]
    refused: list[str]
    gains: list[Gain] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The evaluation as plain values, without `images`."""
        return {
            "ringmark": 1,
            "settings": self.settings,
            "rows": [cell.row for cell in self.cells],
            "gains": [asdict(gain) for gain in self.gains],
            "quality": self.quality,
            "refused": self.refused,
        }
