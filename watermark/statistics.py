"""Distances and tests on float64 arrays.

Scores are larger for marked images. A p-value is the probability of at least this score in an unmarked image.
Distributions are taken from `scipy.special`: importing `scipy.stats` takes half a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

__all__ = [
    "ALPHA",
    "agreement",
    "conformal_p",
    "corrected",
    "cosine_bound",
    "cosine_density",
    "cosine_log10_p",
    "cosine_p",
    "cosine_scores",
    "cosine_test",
    "fisher",
    "inflation",
    "matched_filter",
    "may_be_undecided",
    "needed_references",
    "power_p",
    "power_scores",
    "published_distance",
    "published_p_value",
    "spread_log10_p",
    "undecided",
    "widened",
]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

LN10 = math.log(10)
ALPHA = 1e-3
"""The default level: one unmarked image in a thousand is called marked."""


def cosine_scores(recovered: Array, key: Array) -> Array:
    """The cosine c in [-1, 1] of whitened vectors (B, d) with a key's; 0 for a vector of zeros.

    For one key (d,) the shape is (B,), for several (K, d) it is (B, K).
    """
    f, k = np.asarray(recovered, float), np.asarray(key, float)
    length = np.multiply.outer(np.linalg.norm(f, axis=-1), np.linalg.norm(k, axis=-1))
    return np.asarray(np.clip(np.divide(f @ k.T, length, out=np.zeros_like(length), where=length > 0), -1, 1))


def cosine_test(recovered: Array, key: Array, variance: Array | float = 1.0) -> tuple[Array, Array]:
    """The whitened cosine c (B,) in [-1, 1] and its one-sided p-values.

    recovered (B, d) and key (d,) are divided by √v, with v > 0 the null variance of each feature. The p-values
    (`cosine_p`) hold under any spherical null and do not depend on an image's scale.
    """
    c = cosine_scores(np.asarray(recovered, float) / np.sqrt(variance), np.asarray(key, float) / np.sqrt(variance))
    return c, cosine_p(c, np.shape(recovered)[-1])


def cosine_p(cosine: Array, features: int) -> Array:
    """One-sided p-values of whitened cosines c in [-1, 1] of `features` numbers each.

    t = c √(ν / (1 − c²)), ν = features − 1, is Student-t under any spherical null.
    """
    return np.asarray(special.stdtr(features - 1, -_student(cosine, features - 1)))


def _student(cosine: Array, nu: int) -> Array:
    with np.errstate(divide="ignore"):
        return np.asarray(cosine * np.sqrt(nu / (1 - np.square(cosine))))


def cosine_log10_p(cosine: Array, features: int) -> Array:
    """log₁₀ of `cosine_p`, exact even where that underflows.

    For c > 0, p = ½ I_x(ν/2, ½) with x = 1 − c², where I is the regularised incomplete beta function:

        log I_x(a, b) = a log x + b log(1 − x) − log a − log B(a, b) + log ₂F₁(a + b, 1; a + 1; x)

    (DLMF 8.17.8). x is kept above the rounding error of 1 − c².
    """
    cosine, nu = np.clip(cosine, -1.0, 1.0), features - 1
    with np.errstate(divide="ignore"):
        log10 = np.log10(cosine_p(cosine, features))
    far = log10 < -250
    x, a, b = np.maximum(1 - np.square(cosine[far]), np.finfo(float).eps), nu / 2, 0.5
    series = np.log(special.hyp2f1(1, a + b, a + 1, x)) - math.log(a) - special.betaln(a, b) - math.log(2)
    log10[far] = (a * np.log(x) + b * np.log1p(-x) + series) / math.log(10)
    return log10


def cosine_bound(features: int, alpha: float) -> float:
    """The smallest whitened cosine with `cosine_p` at most alpha: t*/√(ν + t*²), with t* the quantile of Student's t.

    Two random keys with white spectra are that close with probability alpha.
    """
    t = -float(special.stdtrit(features - 1, alpha))
    return t / math.hypot(math.sqrt(features - 1), t)


def cosine_density(cosine: Array, features: int) -> Array:
    """Density of the whitened cosine c of d features under a spherical null; 0 outside (−1, 1).

    (1 − c²)^((d − 3)/2) / B(1/2, (d − 1)/2)
    """
    inside = np.abs(cosine) < 1
    c = np.where(inside, cosine, 0)
    return np.where(inside, (1 - np.square(c)) ** ((features - 3) / 2) / special.beta(0.5, (features - 1) / 2), 0)


def fisher(log10_p: Sequence[Array]) -> Array:
    """log₁₀ of the combined p-value of independent tests, from that of each; arrays of one shape (Fisher's method).

    With x = −Σ ln p_i over n tests, 2x is χ² with 2n degrees of freedom, so p = e^−x Σ_{k<n} x^k / k!, which is uniform
    if the p_i are independent and uniform.
    """
    x = -math.log(10) * np.sum(log10_p, 0)
    terms = sum(x**k / math.factorial(k) for k in range(len(log10_p)))
    return np.asarray(np.log10(terms) - x / math.log(10))


def corrected(log10_p: Array | float, tests: float) -> Array:
    """log₁₀ min(1, `tests` · p) of p-values of any shape, Bonferroni's p-value of the best of several tests.

    P(p ≤ α) ≤ α however the tests depend on each other, as long as each is sound by itself. Tests that might have been
    made count with those that were where the picture chose among them.

    How conservative it is for the largest cosine of a search, for the 312 features of radii 4-10 in one channel of
    pocket, at α = .05, .01, .001: over 1024 whole shifts of white noise P = .043, .009, .0002, over 4096 half shifts
    .030, .005, .0002 (6000 noises, seed 1); over 4096 half shifts of 18 unmarked images, clean, turned and cropped,
    with 400 keys each, .026, .006, .0008. Few features are more conservative: 60 of them, half shifts, .009, .002,
    .0003.
    """
    return np.minimum(0.0, log10_p + math.log10(tests))


def inflation(log10_p: Array) -> Array:
    """How much wider than normal the scores of unmarked images (n, K) are for each key (K,), at least 1.

    λ = mean z² over images, where z is the normal deviate of each p; √λ is returned. λ is 1 if p is uniform. A variance
    above that of the theory is known as overdispersion, and in genetics its correction as genomic control (Devlin and
    Roeder 1999, doi:10.1111/j.0006-341X.1999.00997.x).
    """
    return np.asarray(np.sqrt(np.maximum(1.0, np.square(_deviate(log10_p)).mean(0))))


def widened(log10_p: Array, inflation: Array) -> Array:
    """log₁₀ p of the same scores if their distribution is that many times wider: Φ(Φ⁻¹(p) / inflation)."""
    wider = special.log_ndtr(_deviate(log10_p) / inflation) / LN10
    return np.where(inflation > 1, wider, log10_p)


def _deviate(log10_p: Array) -> Array:
    """Φ⁻¹(p); p = 1, to which a p-value may be rounded, as the next smaller number."""
    return np.asarray(special.ndtri_exp(np.minimum(log10_p * LN10, -np.finfo(float).epsneg)))


def matched_filter(recovered: Array, key: Array, variance: Array | float = 1.0) -> tuple[Array, Array]:
    """The whitened matched filter z = ⟨f, k⟩ / ‖k‖ (B,) and its one-sided p-values 1 − Φ(z).

    recovered (B, d) and key (d,) are divided by √v, with v > 0 the null variance of each feature. z is standard normal
    under a normal null with variance v in every image; unlike the cosine, it is not scale-invariant. A key of zeros has
    z = 0.
    """
    f, k = np.asarray(recovered, float) / np.sqrt(variance), np.asarray(key, float) / np.sqrt(variance)
    length = np.linalg.norm(k)
    z = f @ k / length if length > 0 else np.zeros(len(f))
    return z, special.ndtr(-z)


def conformal_p(score: Array, reference: Array) -> Array:
    """(1 + #{sᵢ ≥ s}) / (n + 1) for each s of `score` (any shape), from the scores (n,) of unmarked images.

    P(p ≤ α) ≤ α if s and the sᵢ are exchangeable, whatever their distribution, with equality on the grid 1/(n + 1) … 1
    if there are no ties (Vovk et al. 2005; arXiv 0706.3188). NaN never counts as evidence for a mark: a NaN score has p
    = 1, and a NaN reference counts as larger.
    """
    score, reference = np.asarray(score, float), np.sort(np.asarray(reference, float))  # sorts NaN last
    n = len(reference)
    larger = n - np.searchsorted(reference, score, "left")
    return (1 + np.where(np.isnan(score), n, larger)) / (n + 1)


def spread_log10_p(score: Array, reference: Array) -> Array:
    """log₁₀ of one-sided p-values of scores (B,), from mean m and deviation σ of scores (n,) of n ≥ 2 unmarked images.

    t = (s − m) / (σ √(1 + 1/n)) is Student-t with ν = n − 1 if all scores are normal, as the whitened cosine
    t/√(ν + t²) of n features is. Below 1/(n + 1) the p-value relies on the normal tail, which ranks among n references
    cannot confirm.
    """
    n = len(reference)
    t = (score - reference.mean()) / (reference.std(ddof=1) * math.sqrt(1 + 1 / n))
    return cosine_log10_p(t / np.hypot(math.sqrt(n - 1), t), n)


CONTRADICTION = 1e-4
"""The level at which a p-value and a rank contradict each other.

That makes a verdict inconclusive, which should happen to a valid p-value ten times less often than the false alarm at
1e-3 that it guards against.
"""


def agreement(p: Array, conformal: Array, n: int, *, level: float = CONTRADICTION) -> Mask:
    """Whether p-values and conformal p-values of the same scores, from n references, are consistent.

    If p is a score's true tail probability, #{sᵢ ≥ s} = (n + 1) · conformal − 1 is Binomial(n, p). The result is False
    where an exact test of this (twice the smaller tail) rejects at `level`, and where p is NaN. n references
    cannot detect errors in tails far below 1/n. Images tested with the same references are not independent, so false
    disagreements occur in clusters.
    """
    k = np.rint(np.asarray(conformal) * (n + 1)) - 1
    return np.asarray(2 * np.minimum(special.bdtr(k, n, p), special.bdtrc(k - 1, n, p)) >= level)


def needed_references(alpha: float) -> int:
    """The smallest number n of unmarked images for a conformal p-value to reach alpha in (0, 1]: 1/(n + 1) ≤ alpha.

    With this n, only a score above every reference reaches alpha; a single outlier among the references prevents it.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha {alpha}: must be above 0 and at most 1")
    n = math.ceil(1 / alpha) - 1  # one more or less where 1 / alpha was rounded
    return next(m for m in range(max(0, n - 1), n + 2) if 1 / (m + 1) <= alpha)


def undecided(p: Array, conformal: Array, n: int, alpha: float) -> Mask:
    """Whether p-values and conformal p-values of the same scores, from n references, leave significance undecided.

    That is the case if they contradict each other (see `agreement`) and at least one of them reaches alpha. As n
    references resolve nothing below 1/(n + 1), a score above all of them is assumed to reach any alpha.
    """
    reached = np.asarray(conformal) <= max(alpha, 1 / (n + 1))
    return ~agreement(p, conformal, n) & (reached | (np.asarray(p) <= alpha))


def may_be_undecided(p: Array, most: int, n: int) -> Mask:
    """Whether some number k of 0 … `most` references at least as high, out of n, contradicts p (see `agreement`).

    A p-value that all of them allow needs no rank: P(Binomial(n, p) ≤ k) is smallest at k = 0 and P(Binomial(n, p) ≥ k)
    at k = `most`.
    """
    return np.asarray(2 * np.minimum(special.bdtr(0, n, p), special.bdtrc(most - 1, n, p)) < CONTRADICTION)


def power_scores(inside: Array, beside: list[Array], weights: Array) -> Array:
    """How much power the rings of a mark lack compared with their neighbours (B,), the statistic for *zeros*.

        s = mean over channels of (Σ w log Q − log P)

    where P is the mean power of the real features `inside` (B, C, d) and Q that of the complex bins on a side of the
    mask, each with its conjugate; `weights` w, one per side, sum to 1. Attacks also remove power from high frequencies:
    with weights that fit the sides' frequencies, any power law in an image's spectrum cancels out, in each channel.
    """
    logs = np.tensordot(weights, [np.log(np.maximum(q.mean(-1), TINY)) for q in beside], 1)
    return np.asarray((logs - np.log(np.maximum(np.square(inside).mean(-1), TINY))).mean(-1))


def power_p(score: Array, channels: int, inside: int, beside: Array, weights: Array) -> Array:
    """p-values (B,) of `power_scores`, with `inside` real numbers per channel and `beside` (sides,) on the sides.

    Under a null that is white except for a power law, P and Q are χ²ₖ/k, whose logarithm has mean ψ(k/2) − log(k/2) and
    variance ψ′(k/2). p is that of the F-distribution whose two parts have these variances, which is exact for one
    channel and one side. n bins with their conjugates count as n real numbers.
    """
    inner = _degrees(special.polygamma(1, inside / 2) / channels)
    outer = _degrees((np.square(weights) * special.polygamma(1, beside / 2)).sum() / channels)
    moved = _log_mean(inside) - (weights * _log_mean(beside)).sum() - _log_mean(inner) + _log_mean(outer)
    return np.asarray(special.fdtr(inner, outer, np.exp(np.minimum(-score - moved, 700))))  # keeps exp finite


TINY = np.finfo(float).tiny


def _log_mean(k: float | Array) -> Array:
    """E log(χ²ₖ/k)."""
    return special.digamma(np.divide(k, 2)) - np.log(np.divide(k, 2))


def _degrees(variance: float) -> float:
    """k with Var log χ²ₖ = ψ′(k/2) = `variance`, bracketed by 1/x < ψ′(x) < 1/x + 1/x²."""
    from scipy import optimize  # takes a third of a second, and only *zeros* needs it

    low, high = 1 / variance, 1 / variance + 2
    half: float = optimize.brentq(lambda half: float(special.polygamma(1, half)) - variance, low, high)
    return 2 * half


def published_distance(recovered: Array, key: Array) -> Array:
    """Mean |F − key| over the mask (B,) of unnormalised transforms (arXiv 2305.20030); small if marked."""
    return np.asarray(np.abs(np.asarray(recovered) - key).mean(-1))


NOTHING = 1e-6  # of the degrees of freedom; a smaller χ² is the key itself, where SciPy before 1.16 overflows


def published_p_value(recovered: Array, key: Array) -> Array:
    """The p-value of arXiv 2305.20030, for comparison: it is not calibrated.

    Non-central χ² with σ estimated from the bins under test and conjugate bins counted twice; 1 where they do not vary.
    """
    f, k = _parts(np.asarray(recovered)), _parts(np.asarray(key))
    sigma = f.std(-1, ddof=1)
    p, apart = np.ones(len(f)), sigma > 0
    apart[apart] = np.square(f[apart] - k).sum(-1) > NOTHING * k.size * sigma[apart] ** 2
    p[(sigma > 0) & ~apart] = 0.0
    noncentral = np.square(k).sum() / sigma[apart] ** 2
    p[apart] = special.chndtr(np.square(f[apart] - k).sum(-1) / sigma[apart] ** 2, k.shape[-1], noncentral)
    return p


def _parts(x: NDArray[Any]) -> Array:
    """Real parts, then imaginary parts."""
    return np.concatenate([np.real(x), np.imag(x)], -1)
