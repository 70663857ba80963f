"""From scores to ROC, AUC and the true-positive rate at a fixed false-positive rate, with intervals."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

from watermark.errors import EvaluationError

__all__ = ["Curve", "auc_interval", "roc"]


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


def roc(marked: np.ndarray, unmarked: np.ndarray, *, name: str = "", fpr_limit: float = 0.01, seed: int = 0) -> Curve:
    """The curve of scores that are larger for marked images. Raises EvaluationError for an empty class or NaN scores."""
    from sklearn.metrics import roc_auc_score, roc_curve

    marked, unmarked = np.asarray(marked, float), np.asarray(unmarked, float)
    if not len(marked) or not len(unmarked):
        raise EvaluationError(
            f"an ROC needs marked and unmarked images, not {len(marked)} and {len(unmarked)}; label both kinds"
        )
    if not (np.isfinite(marked).all() and np.isfinite(unmarked).all()):
        raise EvaluationError("some scores are not numbers; leave out the images whose verdict is inconclusive")
    labels = np.repeat([1, 0], [len(marked), len(unmarked)])
    scores = np.concatenate([marked, unmarked])
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    hits = round(tpr[fpr <= fpr_limit].max() * len(marked))
    interval = stats.binomtest(hits, len(marked)).proportion_ci(method="exact")
    auc = float(roc_auc_score(labels, scores))
    return Curve(
        name,
        fpr,
        tpr,
        auc,
        auc_interval(marked, unmarked, seed=seed),
        fpr_limit,
        hits / len(marked),
        (float(interval.low), float(interval.high)),
        len(marked),
        len(unmarked),
    )


def auc_interval(
    marked: np.ndarray, unmarked: np.ndarray, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of P(marked > unmarked), each class resampled by itself.

    Where the classes are separate it degenerates; the lower end is then Clopper–Pearson's for as many independent
    pairs as the smaller class gives, all of them in order, which is conservative.
    """
    if min(marked) > max(unmarked) or max(marked) < min(unmarked):
        bound = ((1 - level) / 2) ** (1 / min(len(marked), len(unmarked)))
        return (bound, 1.0) if min(marked) > max(unmarked) else (0.0, 1 - bound)
    rng = np.random.default_rng(seed)
    values = [_auc(rng.choice(marked, len(marked)), rng.choice(unmarked, len(unmarked))) for _ in range(draws)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _auc(marked: np.ndarray, unmarked: np.ndarray) -> float:
    """P(marked > unmarked), ties counted half."""
    below = [np.searchsorted(np.sort(unmarked), marked, side).sum() for side in ("left", "right")]
    return sum(below) / (2 * len(marked) * len(unmarked))
