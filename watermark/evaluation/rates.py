"""ROC curves, AUC and true-positive rates at a fixed false-positive rate from scores, with intervals."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special, stats

from ringmark.errors import EvaluationError, counted
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
"""The group of each marked and each unmarked image, for example its prompt; images of one group may be dependent."""

GROUPS = 20
"""The fewest groups of each kind that are resampled.

Of 1000 intervals of an AUC of .86 that are called 95 %, this share covered it (groups x images, correlation within a
group): .78 (5 x 8, .9), .88 (10 x 8, .5), .91 (15 x 5, .5), .93 (20 x 5, .5 and .9), .93 (40 x 5, .5).
"""


@dataclass(frozen=True)
class Curve:
    """An ROC curve; intervals are 95 %, (low, high). That of the AUC is None if it is not known.

    `fpr` and `tpr` (N,) increase as `thresholds` (N,) decrease from infinity; scores of at least thresholds[i] are
    called marked. `point` is the operating point at `fpr_limit`, with the highest TPR whose FPR does not exceed it;
    None if there are fewer than `needed` unmarked images.
    """

    name: str
    fpr: Array
    tpr: Array
    thresholds: Array
    auc: float
    auc_interval: Interval | None
    fpr_limit: float
    point: OperatingPoint | None
    positives: int
    negatives: int

    @property
    def needed(self) -> int:
        """The minimum number of unmarked images for `fpr_limit`: 99 for 1 %, 999 for 0.1 %."""
        return needed_references(self.fpr_limit)

    def summary(self) -> dict[str, Any]:
        """The numbers as plain values, without the points of the curve; None if there are too few images."""
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

    `fpr` is measured on the images that the threshold was chosen on (`tpr_at`), or on others (`split_operating_point`).
    Its interval is valid for both: with a threshold just above the (k + 1)-th largest of n unmarked scores, the true
    FPR is distributed as Beta(k + 1, n − k), whose 97.5 % quantile is the upper end of the interval.
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
        """The rates of scores that reach the threshold."""
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
    """Scores (n,), with those that are `doubtful` (n,) bool tied below all others.

    An image that cannot be tested thus counts as unmarked at every threshold that some image does not reach, as an
    inconclusive verdict does.
    """
    sure = scores[~doubtful]
    tied: Array = np.where(doubtful, np.nextafter(sure.min(), -np.inf) if len(sure) else 0.0, scores)
    return tied


def check_fpr(fpr: float) -> None:
    """Raises EvaluationError, evaluation.fpr, for a false-positive rate outside (0, 1]."""
    if not 0 < fpr <= 1:
        raise EvaluationError("evaluation.fpr", f"{fpr:g} is not a false-positive rate above 0 and at most 1")


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

    The AUC's interval is DeLong's. With `groups`, images of one group may be dependent, and the interval is that of the
    clustered bootstrap with this `seed`. Raises EvaluationError: evaluation.classes for an empty class,
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


def pointwise_band(curve: Curve) -> tuple[Array, Array]:
    """Clopper–Pearson's 95 % interval of each TPR of the curve, as (low, high), exact for a threshold fixed beforehand.

    It does not account for the uncertainty of the FPR and is not a simultaneous band for the whole curve.
    """
    hits, tail = np.rint(curve.tpr * curve.positives), 0.025
    misses = curve.positives - hits
    low = np.where(hits > 0, stats.beta.ppf(tail, np.maximum(hits, 1), misses + 1), 0)
    return low, np.where(misses > 0, stats.beta.isf(tail, hits + 1, np.maximum(misses, 1)), 1)


def tpr_at(marked: Array, unmarked: Array, fpr: float) -> OperatingPoint:
    """The point with the highest TPR whose FPR on these images is at most `fpr`, as read off an ROC curve.

    The threshold is chosen and evaluated on the same images, so the result is optimistic; with fewer than
    needed_references(fpr) unmarked images it means little. Raises EvaluationError as `roc` does.
    """
    marked, unmarked = _checked(marked, unmarked)
    n = len(unmarked)
    allowed = int(np.searchsorted(np.arange(n + 1) / n, fpr, "right")) - 1
    return OperatingPoint.of(marked, unmarked, fpr, _threshold(unmarked, allowed))


def split_operating_point(marked: Array, unmarked: Array, fpr: float, seed: int) -> OperatingPoint:
    """Choose a threshold on a random half of the unmarked images; measure rates on the other half and all marked ones.

    The threshold is the conformal one: an unmarked image reaches it with probability at most `fpr`, averaged over
    choices. It does not depend on the marked images, so all of them are used for the TPR. Raises EvaluationError as
    `roc` does, and evaluation.few if half of the unmarked images are too few for this FPR.
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
            subject=counted(len(unmarked), "unmarked image"),
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
            f"an ROC curve needs marked and unmarked images; there are {len(marked)} and {len(unmarked)}",
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
    """Confusion of n keys: `table` (n, n) counts images by embedded key (rows) and chosen key (columns).

    `interval` is Clopper–Pearson's 95 % interval (low, high) of the accuracy, for independent images.
    """

    table: Array
    right: int
    number: int
    accuracy: float
    interval: Interval


def confusion(truth: Array, chosen: Array, n: int) -> Confusion:
    """The confusion of embedded keys (`truth`) with chosen keys of N images, as whole numbers (N,) from 0 to n − 1.

    Raises EvaluationError (evaluation.confusion) without images, for different lengths and for other numbers.
    """
    truth, chosen = np.asarray(truth), np.asarray(chosen)
    if truth.ndim != 1 or truth.shape != chosen.shape or not len(truth):
        fact = f"every image needs one embedded and one chosen key; there are {truth.shape} and {chosen.shape}"
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

    V₁₀ᵢ is the share of unmarked scores below marked score i, V₀₁ⱼ that of marked scores above unmarked score j; ties
    count half. Needs m, n ≥ 2 independent images. See doi 10.1109/LSP.2014.2337313, after DeLong et al. 1988.
    """
    m, n = len(marked), len(unmarked)
    ranks = stats.rankdata(np.concatenate([marked, unmarked]))
    below = (ranks[:m] - stats.rankdata(marked)) / n
    above = 1 - (ranks[m:] - stats.rankdata(unmarked)) / m
    return float(below.var(ddof=1) / m + above.var(ddof=1) / n)


def auc_interval(marked: Array, unmarked: Array, *, level: float = 0.95) -> Interval:
    """DeLong's interval of A = P(marked > unmarked) on the logit scale: logit A ± z sd / (A (1 − A)).

    Images must be independent. On binormal scores with 30 to 200 images per class, 95 % intervals cover A in 92 to 97 %
    of cases up to A = .99. For separated classes see `_separate`. With one image in a class, or only ties, DeLong's
    variance is undefined or 0 and is replaced by the largest possible one, A (1 − A) / min(m, n).
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
    """Percentile bootstrap of P(marked > unmarked), resampling each class separately.

    With `groups`, whole groups are drawn, separately for groups with marked images only, with unmarked images only and
    with both. For separated classes see `_separate`, with the smaller number of groups.
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
    """The AUC with group g weighted by times[g]; scores are sorted once for all draws."""

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
    """The interval for separated classes (AUC 0 or 1), for which estimates from the spread have no width.

    Its other end is Clopper–Pearson's for as many independent pairs, all in the right order, as the smaller class has
    images. This is conservative.
    """
    bound = ((1 - level) / 2) ** (1 / pairs)
    return (bound, 1.0) if estimate == 1 else (0.0, 1 - bound)


def auc(marked: Array, unmarked: Array) -> float:
    """P(marked > unmarked) + P(equal) / 2, of scores (m,) and (n,); infinities are allowed."""
    order = np.sort(unmarked)
    below = np.searchsorted(order, marked, "left").sum() + np.searchsorted(order, marked, "right").sum()
    return float(below / (2 * len(marked) * len(unmarked)))
