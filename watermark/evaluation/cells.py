"""Cells of an evaluation: the scores of one key under one attack by one method and statistic, and their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ringmark.watermark.evaluation.rates import (
    Curve,
    OperatingPoint,
    bootstrap_interval,
    roc,
    split_operating_point,
    tpr_at,
)
from ringmark.watermark.statistics import needed_references

__all__ = ["CLEAN", "DISTANCE", "FPRS", "Cell", "Evaluation"]

CLEAN = "clean"  # the attack that is none
DISTANCE = "published distance"
FPRS = (0.01, 0.001)
GROUPS = 5  # of each kind: drawing from fewer says nothing of how others would differ


@dataclass(frozen=True)
class Cell:
    """Scores of marked (m,) and unmarked images (n,), larger if marked, and `groups`, what they are not independent in.

    `p`, of both, is there for the detector's own statistic only; `by_default` says that it is this one. `seconds` is
    the median time an image, `megabytes` the memory of a batch, NaN where it cannot be measured.
    """

    key: str
    scheme: str
    attack: str
    method: str
    statistic: str
    marked: np.ndarray
    unmarked: np.ndarray
    groups: tuple[list, list]
    p: tuple[np.ndarray, np.ndarray] | None
    seconds: float
    megabytes: float

    @property
    def by_default(self) -> bool:
        return self.p is not None

    @cached_property
    def curve(self) -> Curve:
        """Raises EvaluationError like `roc`."""
        return roc(self.marked, self.unmarked, name=f"{self.method}, {self.statistic}")

    @cached_property
    def row(self) -> dict:
        """The numbers by name; None is "too few unmarked images" for a rate, "not measured" else.

        Intervals are 95 %: AUC DeLong's, `bootstrap` clustered by `groups` where there are GROUPS of them, rates
        Clopper–Pearson's. `tpr_F` is read off the ROC at FPR F; `split_F` has its threshold from one half of the
        unmarked images and its FPR from the other; `p_F` calls p ≤ F marked.
        """
        names = ("key", "scheme", "attack", "method", "statistic")
        found = {name: getattr(self, name) for name in names} | {"auc": self.curve.auc}
        found |= _interval("auc", self.curve.auc_interval)
        several = min(len(set(groups)) for groups in self.groups) >= GROUPS
        resampled = bootstrap_interval(self.marked, self.unmarked, groups=self.groups) if several else None
        found |= _interval("bootstrap", resampled)
        n = len(self.unmarked)
        for fpr in FPRS:
            enough = n >= needed_references(fpr)
            found |= _rates(f"tpr_{fpr:g}", tpr_at(self.marked, self.unmarked, fpr) if enough else None, ("tpr",))
            enough = (n + 1) // 2 >= needed_references(fpr)
            split = split_operating_point(self.marked, self.unmarked, fpr, seed=0) if enough else None
            found |= {f"split_{fpr:g}_threshold": split and split.threshold} | _rates(f"split_{fpr:g}", split)
        for alpha in FPRS:
            point = self.p and OperatingPoint.of(-self.p[0], -self.p[1], alpha, -alpha)
            found |= _rates(f"p_{alpha:g}", point)
        found |= {"seconds": self.seconds, "megabytes": None if np.isnan(self.megabytes) else self.megabytes}
        return found | {"marked": len(self.marked), "unmarked": n}


def _interval(name: str, pair: tuple[float, float] | None) -> dict:
    low, high = pair or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def _rates(name: str, point: OperatingPoint | None, rates: tuple[str, ...] = ("tpr", "fpr")) -> dict:
    """Each rate and its interval; one rate alone goes by the name."""
    found = {}
    for rate in rates:
        full = f"{name}_{rate}" if len(rates) > 1 else name
        found[full] = point and getattr(point, rate)
        found |= _interval(full, point and getattr(point, f"{rate}_interval"))
    return found


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: `settings`, cells, a record an image, key, attack and method, the mark's cost in quality.

    `refused` says in a line each which files could not be used.
    """

    settings: dict
    cells: list[Cell]
    images: list[dict]
    quality: list[dict]
    refused: list[str]

    def record(self) -> dict:
        """As plain values, without the images."""
        rows = [cell.row for cell in self.cells]
        return {"settings": self.settings, "rows": rows, "quality": self.quality, "refused": self.refused}
