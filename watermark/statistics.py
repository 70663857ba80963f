"""Distances and tests: float64 arrays in, arrays out.

A score is the larger the more the key is there; a p-value is the probability of at least this score without it.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

__all__ = ["cosine_test", "power_test", "published_distance", "published_p_value"]


def cosine_test(
    recovered: np.ndarray, key: np.ndarray, variance: np.ndarray | float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The whitened cosine c (B,) in [-1, 1] and its one-sided p-values.

    recovered (B, d) and key (d,) are divided by √v, v > 0 the null variance of each feature. t = c √(ν / (1 − c²)),
    ν = d − 1, is Student-t under any spherical null, whatever an image's own scale. A vector of zeros has c = 0.
    """
    f, k = np.asarray(recovered, float) / np.sqrt(variance), np.asarray(key, float) / np.sqrt(variance)
    length = np.linalg.norm(f, axis=-1) * np.linalg.norm(k)
    c = np.clip(np.divide(f @ k, length, out=np.zeros(len(f)), where=length > 0), -1, 1)
    nu = f.shape[-1] - 1
    with np.errstate(divide="ignore"):
        t = c * np.sqrt(nu / (1 - c**2))
    return c, stats.t.sf(t, nu)


def power_test(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For the pattern *zeros*: log mean power outside over inside (B,), and its p-values.

    `inside` (B, d) holds real features; `outside` (B, n) powers of complex bins, each with its conjugate, so that n
    values carry n degrees of freedom. The ratio of means is F-distributed under a null that is white there.
    """
    ratio = np.mean(np.square(inside), -1) / np.mean(outside, -1)
    return -np.log(np.maximum(ratio, np.finfo(float).tiny)), stats.f.cdf(ratio, inside.shape[-1], outside.shape[-1])


def published_distance(recovered: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Mean |F − key| over the mask (B,), complex bins of unnormalised transforms (arXiv 2305.20030); small if marked."""
    return np.abs(np.asarray(recovered) - key).mean(-1)


def published_p_value(recovered: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The p-value of arXiv 2305.20030, for comparison: it is not calibrated.

    Non-central χ² with σ estimated from the bins under test and conjugate bins counted twice; 1 where they do not vary.
    """
    parts = lambda x: np.concatenate([np.real(x), np.imag(x)], -1)
    f, k = parts(np.asarray(recovered)), parts(np.asarray(key))
    sigma = f.std(-1, ddof=1)
    p, some = np.ones(len(f)), sigma > 0
    noncentral = np.square(k).sum() / sigma[some] ** 2
    p[some] = stats.ncx2.cdf(np.square(f[some] - k).sum(-1) / sigma[some] ** 2, k.shape[-1], noncentral)
    return p
