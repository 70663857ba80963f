"""From scores to ROC, AUC and the true-positive rate at a fixed false-positive rate, with intervals."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special, stats

from ringmark.errors import EvaluationError
from ringmark.watermark.statistics import needed_references

__all__ = [
    "GROUPS",
    "Confusion",
    "Curve",
    "Groups",
    "OperatingPoint",
    "auc",
    "auc_interval",
    "bootstrap_interval",
    "check_fpr",
    "confusion",
    "delong_variance",
    "pointwise_band",
    "rate",
    "roc",
    "split_operating_point",
    "tied_below",
    "tpr_at",
]


Array = np.ndarray[Any, np.dtype[Any]]
Interval = tuple[float, float]
Groups = tuple[Sequence[Hashable], Sequence[Hashable]]
"""For each marked and for each unmarked image, the group (its prompt, say) within which images may depend."""

GROUPS = 5  # of each kind: resampling fewer says nothing about new ones


@dataclass(frozen=True)
class Curve:
    """An ROC curve; intervals are 95 %, (low, high).

    `fpr` and `tpr` (N,) rise together as `thresholds` (N,) fall from infinity: scores of at least thresholds[i] are
    called marked. `point` is the operating point at `fpr_limit`, the highest TPR whose FPR is not above it; None where
    there are fewer than `needed` unmarked images, too few for that rate to be known.
    """

    name: str
    fpr: Array
    tpr: Array
    thresholds: Array
    auc: float
    auc_interval: Interval
    fpr_limit: float
    point: OperatingPoint | None
    positives: int
    negatives: int

    @property
    def needed(self) -> int:
        """The fewest unmarked images for a rate of `fpr_limit`: 99 for 1 %, 999 for 0.1 %."""
        return needed_references(self.fpr_limit)

    def summary(self) -> dict[str, Any]:
        """The numbers as plain values, without the points of the curve; None for what the images cannot tell."""
        point = self.point
        return {
            "name": self.name,
            "auc": self.auc,
            "auc_interval": self.auc_interval,
            "fpr_limit": self.fpr_limit,
            "threshold": point and point.threshold,
            "fpr_at": point and point.fpr,
            "fpr_at_interval": point and point.fpr_interval,
            "tpr_at": point and point.tpr,
            "tpr_at_interval": point and point.tpr_interval,
            "unmarked_needed": self.needed,
            "positives": self.positives,
            "negatives": self.negatives,
        }

    def points(self) -> dict[str, list[float | None]]:
        """The points of the curve as plain values; the infinite threshold is None."""
        finite = [float(t) if np.isfinite(t) else None for t in self.thresholds]
        return {"fpr": self.fpr.tolist(), "tpr": self.tpr.tolist(), "threshold": finite}


@dataclass(frozen=True)
class OperatingPoint:
    """Scores of at least `threshold` are called marked; intervals are Clopper–Pearson's, 95 %, (low, high).

    `fpr` is that of the images scored: those that the threshold was chosen on (`tpr_at`), or others
    (`split_operating_point`). Its interval holds for both: a threshold just above the (k + 1)-th largest of n unmarked
    scores has a true FPR of distribution Beta(k + 1, n − k), whose 97.5 % point is the interval's upper end.
    """

    fpr_limit: float
    threshold: float
    tpr: float
    tpr_interval: Interval
    fpr: float
    fpr_interval: Interval
    positives: int
    negatives: int

    @classmethod
    def of(cls, marked: Array, unmarked: Array, fpr_limit: float, threshold: float) -> OperatingPoint:
        """Count the scores that reach the threshold."""
        tpr, tpr_interval = rate(int((marked >= threshold).sum()), len(marked))
        fpr, fpr_interval = rate(int((unmarked >= threshold).sum()), len(unmarked))
        return cls(
            fpr_limit=fpr_limit,
            threshold=threshold,
            tpr=tpr,
            tpr_interval=tpr_interval,
            fpr=fpr,
            fpr_interval=fpr_interval,
            positives=len(marked),
            negatives=len(unmarked),
        )


def tied_below(scores: Array, doubtful: Array) -> Array:
    """Scores (n,) with the doubtful (n,) bool tied below all others: an image that shows nothing is no evidence.

    At any threshold that some image misses they count as unmarked, as an inconclusive verdict does.
    """
    sure = scores[~doubtful]
    tied: Array = np.where(doubtful, np.nextafter(sure.min(), -np.inf) if len(sure) else 0.0, scores)
    return tied


def check_fpr(fpr: float) -> None:
    """Raises EvaluationError, evaluation.fpr, for a false-positive rate outside (0, 1]."""
    if not 0 < fpr <= 1:
        raise EvaluationError("evaluation.fpr", f"{fpr:g} is no false-positive rate above 0 and at most 1")


def roc(
    marked: Array,
    unmarked: Array,
    *,
    name: str = "",
    fpr_limit: float = 0.01,
    groups: Groups | None = None,
    seed: int = 0,
) -> Curve:
    """The ROC curve of scores (m,) and (n,) that are larger for marked images.

    The AUC's interval is DeLong's. With `groups`, images of one group may depend and the interval is that of the
    clustered bootstrap, drawn from `seed`. Raises EvaluationError: evaluation.classes for an empty class,
    evaluation.scores for scores that are not finite, evaluation.fpr.
    """
    from sklearn.metrics import roc_curve

    check_fpr(fpr_limit)
    marked, unmarked = _checked(marked, unmarked)
    labels = np.repeat([1, 0], [len(marked), len(unmarked)])
    fpr, tpr, thresholds = roc_curve(labels, np.concatenate([marked, unmarked]), drop_intermediate=False)
    if groups is None:
        interval = auc_interval(marked, unmarked)
    else:
        interval = bootstrap_interval(marked, unmarked, groups=groups, seed=seed)
    enough = len(unmarked) >= needed_references(fpr_limit)
    return Curve(
        name=name,
        fpr=fpr,
        tpr=tpr,
        thresholds=thresholds,
        auc=auc(marked, unmarked),
        auc_interval=interval,
        fpr_limit=fpr_limit,
        point=tpr_at(marked, unmarked, fpr_limit) if enough else None,
        positives=len(marked),
        negatives=len(unmarked),
    )


def pointwise_band(curve: Curve, *, level: float = 0.95) -> tuple[Array, Array]:
    """Clopper–Pearson's interval of each TPR of the curve, as (low, high), each exact for a threshold fixed beforehand.

    It covers neither the FPR nor the whole curve at once.
    """
    hits, tail = np.rint(curve.tpr * curve.positives), (1 - level) / 2
    misses = curve.positives - hits
    low = np.where(hits > 0, stats.beta.ppf(tail, np.maximum(hits, 1), misses + 1), 0)
    return low, np.where(misses > 0, stats.beta.isf(tail, hits + 1, np.maximum(misses, 1)), 1)


def tpr_at(marked: Array, unmarked: Array, fpr: float) -> OperatingPoint:
    """The point with the highest TPR whose FPR on these very images is at most `fpr`, as read off an ROC curve.

    Its threshold is chosen on the images that it is judged by, so it is optimistic; with fewer than
    needed_references(fpr) unmarked images it means little. Raises EvaluationError as `roc` does.
    """
    marked, unmarked = _checked(marked, unmarked)
    n = len(unmarked)
    allowed = int(np.searchsorted(np.arange(n + 1) / n, fpr, "right")) - 1
    return OperatingPoint.of(marked, unmarked, fpr, _threshold(unmarked, allowed))


def split_operating_point(marked: Array, unmarked: Array, fpr: float, seed: int) -> OperatingPoint:
    """The threshold chosen on a random half of the unmarked images, and the rates on the other half and all the marked.

    Marked images have no part in the choice, so none is spent on it. The threshold is the conformal one: an unmarked
    image reaches it with probability at most `fpr`, averaged over choices. Raises EvaluationError as `roc` does, and
    evaluation.few where half of the unmarked images are too few for that.
    """
    marked, unmarked = _checked(marked, unmarked)
    order = np.random.default_rng(seed).permutation(unmarked)
    choosing, scored = np.split(order, [(len(order) + 1) // 2])
    needed = needed_references(fpr)
    if len(choosing) < needed or not len(scored):
        least = max(2, 2 * needed - 1)
        raise EvaluationError(
            "evaluation.few",
            f"a threshold for an FPR of {fpr:g}, chosen on one half and scored on the other, needs at least {least}",
            subject=f"{len(unmarked)} unmarked images",
            needed=least,
        )
    ranks = np.arange(1, len(choosing) + 2) / (len(choosing) + 1)
    allowed = int(np.searchsorted(ranks, fpr, "right")) - 1
    return OperatingPoint.of(marked, scored, fpr, _threshold(choosing, allowed))


def _checked(marked: Array, unmarked: Array) -> tuple[Array, Array]:
    marked, unmarked = np.asarray(marked, float), np.asarray(unmarked, float)
    if not len(marked) or not len(unmarked):
        raise EvaluationError(
            "evaluation.classes",
            f"an ROC needs marked and unmarked images; there are {len(marked)} and {len(unmarked)}",
        )
    if not (np.isfinite(marked).all() and np.isfinite(unmarked).all()):
        raise EvaluationError("evaluation.scores", "some scores are not finite")
    return marked, unmarked


def _threshold(unmarked: Array, allowed: int) -> float:
    """The lowest threshold that at most `allowed` of the scores reach."""
    if allowed >= len(unmarked):
        return -np.inf
    return float(np.nextafter(np.sort(unmarked)[-1 - allowed], np.inf))


def rate(hits: int, n: int) -> tuple[float, Interval]:
    """hits / n and its exact interval."""
    interval = stats.binomtest(hits, n).proportion_ci(method="exact")
    return hits / n, (float(interval.low), float(interval.high))


@dataclass(frozen=True)
class Confusion:
    """Which of n keys was chosen: `table` (n, n) counts, rows the keys planted, columns those chosen.

    `interval` of the accuracy is Clopper–Pearson's, 95 %, (low, high); images are independent.
    """

    table: Array
    right: int
    number: int
    accuracy: float
    interval: Interval


def confusion(truth: Array, chosen: Array, n: int) -> Confusion:
    """Of images (N,) the keys planted and those chosen, by argmin of a distance, say: whole numbers from 0 to n − 1.

    Raises EvaluationError, evaluation.confusion, for no images, for two lengths and for other numbers.
    """
    truth, chosen = np.asarray(truth), np.asarray(chosen)
    if truth.ndim != 1 or truth.shape != chosen.shape or not len(truth):
        fact = f"one key planted and one chosen are needed for every image; there are {truth.shape} and {chosen.shape}"
        raise EvaluationError("evaluation.confusion", fact)
    both = np.concatenate([truth, chosen])
    if both.dtype.kind not in "iu" or both.min() < 0 or both.max() >= n:
        raise EvaluationError("evaluation.confusion", f"keys must be whole numbers from 0 to {n - 1}")
    table = np.zeros((n, n), int)
    np.add.at(table, (truth, chosen), 1)
    right = int(np.trace(table))
    accuracy, interval = rate(right, len(truth))
    return Confusion(table=table, right=right, number=len(truth), accuracy=accuracy, interval=interval)


def delong_variance(marked: Array, unmarked: Array) -> float:
    """DeLong's variance of the AUC, Var(V₁₀)/m + Var(V₀₁)/n, from midranks in O(N log N) (Sun & Xu 2014).

    V₁₀ᵢ is the share of unmarked scores below marked score i, V₀₁ⱼ that of marked scores above unmarked score j, ties
    half; m, n ≥ 2 independent images. No preprint: doi 10.1109/LSP.2014.2337313, after DeLong et al. 1988.
    """
    m, n = len(marked), len(unmarked)
    ranks = stats.rankdata(np.concatenate([marked, unmarked]))
    below = (ranks[:m] - stats.rankdata(marked)) / n
    above = 1 - (ranks[m:] - stats.rankdata(unmarked)) / m
    return float(below.var(ddof=1) / m + above.var(ddof=1) / n)


def auc_interval(marked: Array, unmarked: Array, *, level: float = 0.95) -> Interval:
    """DeLong's interval of A = P(marked > unmarked) on the logit scale: logit A ± z sd / (A (1 − A)).

    Images are independent. On binormal scores, 30 to 200 a class, 95 % intervals cover A in 92 to 97 % up to A = .99.
    Separate classes: `_separate`. With one image in a class, or nothing but ties, DeLong's variance is undefined or 0;
    the largest possible one, A (1 − A) / min(m, n), takes its place.
    """
    a, smaller = auc(marked, unmarked), min(len(marked), len(unmarked))
    if a in (0, 1):
        return _separate(a, smaller, level)
    largest = a * (1 - a) / smaller
    variance = (delong_variance(marked, unmarked) if smaller > 1 else 0) or largest
    half = stats.norm.isf((1 - level) / 2) * variance**0.5 / (a * (1 - a))
    return float(special.expit(special.logit(a) - half)), float(special.expit(special.logit(a) + half))


def bootstrap_interval(
    marked: Array,
    unmarked: Array,
    *,
    groups: Groups | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of P(marked > unmarked), each class resampled by itself.

    With `groups`, whole groups are drawn: separately those with marked images only, with unmarked only, and with both.
    Separate classes: `_separate`, by the smaller number of groups.
    """
    if groups is None:
        groups = ([("marked", i) for i in range(len(marked))], [("unmarked", i) for i in range(len(unmarked))])
    numbers: dict[Hashable, int] = {}
    of_marked, of_unmarked = (np.array([numbers.setdefault(g, len(numbers)) for g in gs], int) for gs in groups)
    estimate = auc(marked, unmarked)
    if estimate in (0, 1):
        return _separate(estimate, min(len(set(of_marked)), len(set(of_unmarked))), level)
    all_groups = np.arange(len(numbers))
    kind = np.isin(all_groups, of_marked) + 2 * np.isin(all_groups, of_unmarked)
    strata = [np.flatnonzero(kind == k) for k in np.unique(kind)]
    weighted = _WeightedAuc(np.asarray(marked), np.asarray(unmarked), of_marked, of_unmarked)
    rng, values = np.random.default_rng(seed), []
    for _ in range(draws):
        drawn = np.concatenate([rng.choice(stratum, len(stratum)) for stratum in strata])
        values.append(weighted(np.bincount(drawn, minlength=len(numbers))))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class _WeightedAuc:
    """The AUC where group g counts times[g] times; sorted once for all draws."""

    def __init__(self, marked: Array, unmarked: Array, of_marked: Array, of_unmarked: Array) -> None:
        order = np.argsort(unmarked, kind="stable")
        self.of_marked, self.of_unmarked = of_marked, of_unmarked[order]
        self.left = np.searchsorted(unmarked[order], marked, "left")
        self.right = np.searchsorted(unmarked[order], marked, "right")

    def __call__(self, times: Array) -> float:
        below = np.concatenate([[0], np.cumsum(times[self.of_unmarked])])
        weights = times[self.of_marked]
        pairs = weights.sum() * below[-1]
        return float((weights * (below[self.left] + below[self.right])).sum() / (2 * pairs)) if pairs else 0.5


def _separate(estimate: float, pairs: int, level: float) -> Interval:
    """For separate classes (AUC 0 or 1), whose spread gives an interval of no width.

    The other end is Clopper–Pearson's for as many independent pairs as the smaller class has images, all of them in
    order, which is conservative.
    """
    bound = ((1 - level) / 2) ** (1 / pairs)
    return (bound, 1.0) if estimate == 1 else (0.0, 1 - bound)


def auc(marked: Array, unmarked: Array) -> float:
    """P(marked > unmarked) + P(equal) / 2, of scores (m,) and (n,); infinities are allowed."""
    order = np.sort(unmarked)
    below = np.searchsorted(order, marked, "left").sum() + np.searchsorted(order, marked, "right").sum()
    return float(below / (2 * len(marked) * len(unmarked)))
