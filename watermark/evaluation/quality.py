"""The cost of a mark in image quality. Marked and unmarked images differ in content, so distributions are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ringmark.watermark.evaluation.rates import Array

__all__ = ["Frechet", "frechet_distance", "frechet_test", "simple_features"]

EDGES = (
    1 / 16,
    1 / 8,
    1 / 4,
    1 / 2,
    1,
)  # upper bounds of the bands in units of the Nyquist frequency; the last band is the corners beyond it
DARK = 1e-6  # of full scale squared, below the rounding to 8 bits; keeps the logarithms of flat images finite


@dataclass(frozen=True)
class Frechet:
    """A distance d² between two sets of images, and its mean and 95 % quantile under permuted labels.

    `p` is the share of permutations, including the identity, with at least this distance.
    """

    distance: float
    expected: float
    limit: float
    p: float


def simple_features(pixels: Array) -> Array:
    """Twelve numbers of a uint8 image (H, W, 3): mean and deviation of each colour, log energies of grey in six bands.

    Bands are octaves of the radial frequency up to Nyquist of the shorter side, and the corners beyond it.
    """
    x = pixels.astype(float) / 255
    grey = x.mean(-1)
    power = np.abs(np.fft.fft2(grey - grey.mean(), norm="forward")) ** 2
    height, width = grey.shape
    radius = np.hypot(np.fft.fftfreq(height, 1 / height)[:, None], np.fft.fftfreq(width, 1 / width))
    band = np.digitize(radius / (min(height, width) / 2), EDGES, right=True)
    energy = np.bincount(band.ravel(), power.ravel(), len(EDGES) + 1)
    return np.concatenate([x.mean((0, 1)), x.std((0, 1)), np.log(energy + DARK)])


def frechet_distance(a: Array, b: Array) -> float:
    """d² = |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) of features (n, d) and (m, d), n, m ≥ 2 (arXiv 1706.08500)."""
    first, second = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(first @ second).real.clip(0)).sum()
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    return float(max(0.0, mean + np.trace(first) + np.trace(second) - 2 * root))


def frechet_test(marked: Sequence[Array], unmarked: Sequence[Array], *, draws: int = 500) -> Frechet:
    """Permutation test of the Fréchet distance between features (d,), which are standardised over all images.

    With few images d² is far from 0 even without a difference; permutations have the same numbers of images and
    therefore the same bias. Images must be independent, with at least two of each kind.
    """
    both = np.stack([*marked, *unmarked])
    spread = both.std(0)
    both = both / np.where(spread > 0, spread, 1)
    n, rng = len(marked), np.random.default_rng(0)
    distance = frechet_distance(both[:n], both[n:])
    drawn = []
    for _ in range(draws):
        order = rng.permutation(len(both))
        drawn.append(frechet_distance(both[order[:n]], both[order[n:]]))
    p = (1 + sum(d >= distance for d in drawn)) / (1 + draws)
    return Frechet(distance=distance, expected=float(np.mean(drawn)), limit=float(np.quantile(drawn, 0.95)), p=p)
