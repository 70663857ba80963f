"""From scores to ROC, AUC and the true-positive rate at a fixed false-positive rate, with intervals."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from scipy import special, stats

from ringmark.errors import EvaluationError
from ringmark.watermark.statistics import needed_references

__all__ = [
    "Confusion",
    "Curve",
    "OperatingPoint",
    "auc_interval",
    "bootstrap_interval",
    "confusion",
    "delong_variance",
    "pointwise_band",
    "rate",
    "roc",
    "split_operating_point",
    "tied_below",
    "tpr_at",
]


@dataclass(frozen=True)
class Curve:
    """An ROC curve and what is read off it; intervals are 95 %, (low, high).

    `fpr` and `tpr` rise together; `tpr_at` is the TPR at the highest FPR not above `fpr_limit`.
    """

    name: str
    fpr: np.ndarray
    tpr: np.ndarray
    auc: float
    auc_interval: tuple[float, float]
    fpr_limit: float
    tpr_at: float
    tpr_at_interval: tuple[float, float]
    positives: int
    negatives: int

    def summary(self) -> dict:
        """The numbers, without the curve itself."""
        return {k: v for k, v in asdict(self).items() if k not in ("fpr", "tpr")}


@dataclass(frozen=True)
class OperatingPoint:
    """What comes of calling scores of at least `threshold` marked; intervals are Clopper–Pearson's, 95 %, (low, high).

    `fpr` is that of the images scored: those the threshold was chosen on (`tpr_at`), or others (`split_operating_point`).
    """

    fpr_limit: float
    threshold: float
    tpr: float
    tpr_interval: tuple[float, float]
    fpr: float
    fpr_interval: tuple[float, float]
    positives: int
    negatives: int

    @classmethod
    def of(cls, marked: np.ndarray, unmarked: np.ndarray, fpr_limit: float, threshold: float) -> OperatingPoint:
        """Count the scores that reach the threshold."""
        rates = [rate(int((scores >= threshold).sum()), len(scores)) for scores in (marked, unmarked)]
        return cls(fpr_limit, threshold, *rates[0], *rates[1], len(marked), len(unmarked))


def tied_below(scores: np.ndarray, doubtful: np.ndarray) -> np.ndarray:
    """Scores (n,) in which the doubtful are tied below all others: what shows nothing is no evidence of a mark.

    So at any threshold that some image misses they count as unmarked, as a verdict that is inconclusive does.
    """
    sure = scores[~doubtful]
    return np.where(doubtful, np.nextafter(sure.min(), -np.inf) if len(sure) else 0.0, scores)


def roc(
    marked: np.ndarray,
    unmarked: np.ndarray,
    *,
    name: str = "",
    fpr_limit: float = 0.01,
    groups: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int = 0,
) -> Curve:
    """The curve of scores that are larger for marked images. Raises EvaluationError for an empty class or NaN scores.

    The AUC's interval is DeLong's; with `groups`, the prompts of the marked and of the unmarked images, images of one
    prompt need not be independent and it is the clustered bootstrap's, drawn from `seed`.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    marked, unmarked = _checked(marked, unmarked)
    labels = np.repeat([1, 0], [len(marked), len(unmarked)])
    scores = np.concatenate([marked, unmarked])
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    point = tpr_at(marked, unmarked, fpr_limit)
    if groups is None:
        interval = auc_interval(marked, unmarked)
    else:
        interval = bootstrap_interval(marked, unmarked, groups=groups, seed=seed)
    return Curve(
        name,
        fpr,
        tpr,
        float(roc_auc_score(labels, scores)),
        interval,
        fpr_limit,
        point.tpr,
        point.tpr_interval,
        len(marked),
        len(unmarked),
    )


def pointwise_band(curve: Curve, *, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Clopper–Pearson's interval of each TPR of the curve, as (low, high): each is exact for a threshold fixed beforehand.

    It says nothing of the FPR, nor of the whole curve at once.
    """
    hits, tail = np.rint(curve.tpr * curve.positives), (1 - level) / 2
    misses = curve.positives - hits
    low = np.where(hits > 0, stats.beta.ppf(tail, np.maximum(hits, 1), misses + 1), 0)
    return low, np.where(misses > 0, stats.beta.isf(tail, hits + 1, np.maximum(misses, 1)), 1)


def tpr_at(marked: np.ndarray, unmarked: np.ndarray, fpr: float) -> OperatingPoint:
    """The point with the highest TPR whose FPR on these very images is at most `fpr`, as read off an ROC curve.

    Its threshold was chosen on the images it is judged by, so it flatters. Raises EvaluationError like `roc`.
    """
    marked, unmarked = _checked(marked, unmarked)
    n = len(unmarked)
    allowed = int(np.searchsorted(np.arange(n + 1) / n, fpr, "right")) - 1
    return OperatingPoint.of(marked, unmarked, fpr, _threshold(unmarked, allowed))


def split_operating_point(marked: np.ndarray, unmarked: np.ndarray, fpr: float, seed: int) -> OperatingPoint:
    """The threshold chosen on a random half of the unmarked images, and the rates on the other half and all the marked.

    Marked images have no part in the choice, so none is spent on it. The threshold is the conformal one: an unmarked
    image reaches it with probability at most `fpr`, averaged over choices. Raises EvaluationError like `roc`, and where
    half of the unmarked images are too few for that.
    """
    marked, unmarked = _checked(marked, unmarked)
    order = np.random.default_rng(seed).permutation(unmarked)
    choosing, scored = np.split(order, [(len(order) + 1) // 2])
    needed = needed_references(fpr)
    if len(choosing) < needed or not len(scored):
        raise EvaluationError(
            f"{len(unmarked)} unmarked images: a threshold for an FPR of {fpr:g}, chosen on one half and scored on the other, needs at least {max(2, 2 * needed - 1)}; add images or raise the FPR"
        )
    ranks = np.arange(1, len(choosing) + 2) / (len(choosing) + 1)
    allowed = int(np.searchsorted(ranks, fpr, "right")) - 1
    return OperatingPoint.of(marked, scored, fpr, _threshold(choosing, allowed))


def _checked(marked: np.ndarray, unmarked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    marked, unmarked = np.asarray(marked, float), np.asarray(unmarked, float)
    if not len(marked) or not len(unmarked):
        raise EvaluationError(
            f"an ROC needs marked and unmarked images, not {len(marked)} and {len(unmarked)}; label both kinds"
        )
    if not (np.isfinite(marked).all() and np.isfinite(unmarked).all()):
        raise EvaluationError("some scores are not numbers; leave out the images whose verdict is inconclusive")
    return marked, unmarked


def _threshold(unmarked: np.ndarray, allowed: int) -> float:
    """The lowest threshold that at most `allowed` of the scores reach."""
    if allowed >= len(unmarked):
        return -np.inf
    return float(np.nextafter(np.sort(unmarked)[-1 - allowed], np.inf))


def rate(hits: int, n: int) -> tuple[float, tuple[float, float]]:
    """hits / n and its exact interval."""
    interval = stats.binomtest(hits, n).proportion_ci(method="exact")
    return hits / n, (float(interval.low), float(interval.high))


@dataclass(frozen=True)
class Confusion:
    """Which of n keys was chosen: `table` (n, n) counts, rows the keys planted, columns those chosen.

    `interval` of the accuracy is Clopper–Pearson's, 95 %, (low, high); images are independent.
    """

    table: np.ndarray
    right: int
    number: int
    accuracy: float
    interval: tuple[float, float]


def confusion(truth: np.ndarray, chosen: np.ndarray, n: int) -> Confusion:
    """Of images (N,) the keys planted and those chosen, by argmin of a distance, say: whole numbers from 0 to n − 1.

    Raises EvaluationError for no images, for two lengths and for other numbers.
    """
    truth, chosen = np.asarray(truth), np.asarray(chosen)
    if truth.ndim != 1 or truth.shape != chosen.shape or not len(truth):
        raise EvaluationError(
            f"{truth.shape} keys planted, {chosen.shape} chosen: one of each is needed for every image"
        )
    both = np.concatenate([truth, chosen])
    if both.dtype.kind not in "iu" or both.min() < 0 or both.max() >= n:
        raise EvaluationError(f"keys of a confusion matrix must be whole numbers from 0 to {n - 1}; number the keys so")
    table = np.zeros((n, n), int)
    np.add.at(table, (truth, chosen), 1)
    right = int(np.trace(table))
    return Confusion(table, right, len(truth), *rate(right, len(truth)))


def delong_variance(marked: np.ndarray, unmarked: np.ndarray) -> float:
    """DeLong's variance of the AUC, Var(V₁₀)/m + Var(V₀₁)/n, from midranks in O(N log N) (Sun & Xu 2014).

    V₁₀ᵢ is the share of unmarked scores below marked score i, V₀₁ⱼ that of marked scores above unmarked score j, ties
    half; m, n ≥ 2 independent images. No preprint: doi 10.1109/LSP.2014.2337313, after DeLong et al. 1988.
    """
    m, n = len(marked), len(unmarked)
    ranks = stats.rankdata(np.concatenate([marked, unmarked]))
    below = (ranks[:m] - stats.rankdata(marked)) / n
    above = 1 - (ranks[m:] - stats.rankdata(unmarked)) / m
    return float(below.var(ddof=1) / m + above.var(ddof=1) / n)


def auc_interval(marked: np.ndarray, unmarked: np.ndarray, *, level: float = 0.95) -> tuple[float, float]:
    """DeLong's interval of A = P(marked > unmarked) on the logit scale: logit A ± z sd / (A (1 − A)).

    Images are independent. On binormal scores, 30 to 200 a class, 95 % intervals hold A in 92 to 97 % up to A = .99.
    Separate classes: `_separate`. With one image in a class, or none but ties, DeLong's variance is not defined or 0:
    then the largest that there can be, A (1 − A) / min(m, n).
    """
    auc, smaller = _auc(marked, unmarked), min(len(marked), len(unmarked))
    if auc in (0, 1):
        return _separate(auc, smaller, level)
    largest = auc * (1 - auc) / smaller
    variance = (delong_variance(marked, unmarked) if smaller > 1 else 0) or largest
    half = stats.norm.isf((1 - level) / 2) * variance**0.5 / (auc * (1 - auc))
    return float(special.expit(special.logit(auc) - half)), float(special.expit(special.logit(auc) + half))


def bootstrap_interval(
    marked: np.ndarray,
    unmarked: np.ndarray,
    *,
    groups: tuple[np.ndarray, np.ndarray] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap of P(marked > unmarked), each class resampled by itself.

    With `groups` (the marked images' prompts and the unmarked ones', say) whole groups are drawn: by themselves those
    with marked images only, with unmarked only, and with both. Separate classes: `_separate`, by the smaller number of
    groups.
    """
    if groups is None:
        groups = ([("marked", i) for i in range(len(marked))], [("unmarked", i) for i in range(len(unmarked))])
    numbers: dict = {}
    own, other = (np.array([numbers.setdefault(g, len(numbers)) for g in some], int) for some in groups)
    auc = _auc(marked, unmarked)
    if auc in (0, 1):
        return _separate(auc, min(len(set(own)), len(set(other))), level)
    kind = np.isin(np.arange(len(numbers)), own) + 2 * np.isin(np.arange(len(numbers)), other)
    strata = [np.flatnonzero(kind == k) for k in np.unique(kind)]
    order = np.argsort(unmarked, kind="stable")
    ends = [np.searchsorted(np.asarray(unmarked)[order], marked, side) for side in ("left", "right")]
    rng, values = np.random.default_rng(seed), []
    for _ in range(draws):
        drawn = np.concatenate([rng.choice(stratum, len(stratum)) for stratum in strata])
        times = np.bincount(drawn, minlength=len(numbers))
        below = np.concatenate([[0], np.cumsum(times[other[order]])])
        pairs = times[own].sum() * below[-1]
        values.append((times[own] * (below[ends[0]] + below[ends[1]])).sum() / (2 * pairs) if pairs else 0.5)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _separate(auc: float, pairs: int, level: float) -> tuple[float, float]:
    """Where the classes are separate, AUC 0 or 1, intervals from their spread vanish.

    The other end is then Clopper–Pearson's for as many independent pairs as the smaller class gives, all of them in
    order, which is conservative.
    """
    bound = ((1 - level) / 2) ** (1 / pairs)
    return (bound, 1.0) if auc == 1 else (0.0, 1 - bound)


def _auc(marked: np.ndarray, unmarked: np.ndarray) -> float:
    """P(marked > unmarked), ties counted half."""
    below = [np.searchsorted(np.sort(unmarked), marked, side).sum() for side in ("left", "right")]
    return sum(below) / (2 * len(marked) * len(unmarked))
