"""Shared parts of schemes in the Fourier transform of the noise: frequencies, placement of a mark, the cosine test.

Transforms are orthonormal, so a bin of white noise has unit power, and in the unshifted order of torch.fft.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringmark.errors import SchemeError
from ringmark.inversion.noise_recovery import NoiseRecovery, rings
from ringmark.watermark.null import Array
from ringmark.watermark.statistics import cosine_density, cosine_log10_p, cosine_scores, fisher

__all__ = [
    "BUDGET",
    "BandedTest",
    "CosineTest",
    "Placement",
    "middle_phase",
    "mirror",
    "recommend",
    "signed_frequencies",
]


BUDGET = 0.08  # share of the coefficients that a recommended mark may alter


def signed_frequencies(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Whole frequencies (h, 1) and (1, w) of an unshifted DFT, float64."""
    return (
        torch.fft.fftfreq(height, 1 / height, dtype=torch.float64)[:, None],
        torch.fft.fftfreq(width, 1 / width, dtype=torch.float64)[None],
    )


def mirror(x: Tensor) -> Tensor:
    """x(−k) of (…, h, w) in the unshifted order."""
    return x.flip(-2, -1).roll((1, 1), (-2, -1))


def middle_phase(height: int, width: int) -> Tensor:
    """Phases (h, w) that move a pattern from the corner to the middle of the picture, where it rotates and flips."""
    ky, kx = signed_frequencies(height, width)
    return torch.exp(-1j * torch.pi * (ky * (height - 1) / height + kx * (width - 1) / width))


@dataclass(frozen=True, eq=False)
class CosineTest:
    """A `SchemeTest`: the whitened cosine of features (B, d) with a `template` (d,).

    `templates` are those (K, d) of other keys of its kind.
    """

    template: Array
    observe: Callable[[Tensor], Array]
    templates: Callable[[Sequence[Any]], Array]

    def score(self, observed: Array) -> Array:
        """The cosine c (B,) in [-1, 1]; 0 for a vector of zeros."""
        return cosine_scores(observed, self.template)

    def scores(self, observed: Array, templates: Array) -> Array:
        """The same (B, K) for the templates (K, d) of many keys."""
        return cosine_scores(observed, templates)

    def log10_p(self, scores: Array, references: Array | None = None) -> Array:
        """From Student's t; the references are not needed."""
        return cosine_log10_p(scores, len(self.template))

    def density(self, scores: Array) -> Array:
        """The density of c under a spherical null."""
        return cosine_density(scores, len(self.template))


@dataclass(frozen=True, eq=False)
class BandedTest:
    """A `SchemeTest`: the whitened cosines of disjoint bands of rings, each with a p-value of its own, combined.

    `bands` are where each band's features are among all (d,). Under a spherical null, the cosines of disjoint
    bands are independent, and so are their p-values p_b, which `statistics.fisher` combines. The score is −log₁₀ p.
    """

    template: Array
    observe: Callable[[Tensor], Array]
    templates: Callable[[Sequence[Any]], Array]
    bands: Sequence[slice]

    def score(self, observed: Array) -> Array:
        """−log₁₀ p (B,)."""
        return self.scores(observed, self.template[None])[:, 0]

    def scores(self, observed: Array, templates: Array) -> Array:
        """The same (B, K) for the templates (K, d) of many keys."""
        cosines = [cosine_scores(observed[:, band], templates[:, band]) for band in self.bands]
        pairs = zip(cosines, self.bands, strict=True)
        return -fisher([cosine_log10_p(cosine, band.stop - band.start) for cosine, band in pairs])

    def log10_p(self, scores: Array, references: Array | None = None) -> Array:
        """The negative score; the references are not needed."""
        return -scores

    def density(self, scores: Array) -> Array:
        """The density of −log₁₀ p, p being uniform: ln 10 · 10^−s for s ≥ 0."""
        return np.where(scores < 0, 0.0, math.log(10) * 10.0 ** -np.maximum(scores, 0.0))


@dataclass(frozen=True)
class Placement:
    """The placement of a mark: latent channels and the inclusive range of ring radii.

    A radius is in whole frequencies of the shorter side of the reference size; methods take the shape of its latents.
    """

    channels: tuple[int, ...]
    radii: tuple[int, int]

    def __str__(self) -> str:
        plural = "s" if len(self.channels) > 1 else ""
        return f"channel{plural} {', '.join(map(str, self.channels))}, radii {self.radii[0]}-{self.radii[1]}"

    @property
    def fields(self) -> dict[str, list[int]]:
        """Channels and radii as in a key's description."""
        return {"channels": list(self.channels), "radii": list(self.radii)}

    def check(self, latent_shape: tuple[int, int, int]) -> None:
        """Raises SchemeError unless the placement fits a latent (C, h, w)."""
        count, *size = latent_shape
        distinct = len(set(self.channels)) == len(self.channels) > 0
        if not distinct or not all(0 <= c < count for c in self.channels):
            raise SchemeError(
                "scheme.channels",
                f"must be distinct numbers from 0 to {count - 1}",
                subject=f"channels {list(self.channels)}",
            )
        low, high = self.radii
        # DC alone is a single number, whose direction means nothing.
        if not 0 <= low <= high < min(size) // 2 or high == 0:
            raise SchemeError(
                "scheme.radii",
                f"must rise from at least 0 to at most {min(size) // 2 - 1} for latents of {size[0]}x{size[1]}, "
                "and include more than radius 0",
                subject=f"radii {low}-{high}",
            )

    def share(self, latent_shape: tuple[int, int, int]) -> float:
        """The share of the coefficients of a latent (C, h, w) that the mark alters."""
        count, *size = latent_shape
        sizes = torch.bincount(rings(*size).flatten())
        return int(sizes[self.radii[0] : self.radii[1] + 1].sum()) * len(self.channels) / (count * size[0] * size[1])


def recommend(
    recovery: NoiseRecovery | None,
    latent_shape: tuple[int, int, int],
    *,
    budget: float = BUDGET,
    lows: Sequence[int] | None = None,
) -> Placement:
    """The placement with the greatest expected signal, Σ a²/v over its bins, within a share `budget` of all bins.

    `lows` are the lowest radii to choose from, by default 3 and more: lower ones determine the picture's layout. Radii
    beyond a third of the side rarely survive compression and are avoided. Without a measured recovery, or if nothing
    fits the budget, the mark is placed in all channels at middle frequencies, or from the first of `lows` if given.
    """
    count, height, width = latent_shape
    short = min(height, width)
    if recovery is None:
        radii = (lows[0], max(lows[0] + 1, short // 7)) if lows else (max(1, short // 16), max(2, short // 6))
        return Placement(tuple(range(count)), radii)
    sizes = torch.bincount(rings(height, width).flatten()).double()
    gain = recovery.attenuation.clamp_min(0).square() / recovery.variance * sizes
    allowed = budget * count * height * width
    best, chosen = -1.0, None
    for low in lows or range(3, short // 3 + 1):
        for high in range(low + 1, short // 3 + 1):
            number = min(count, int(allowed // sizes[low : high + 1].sum()))
            total, order = gain[:, low : high + 1].sum(1).sort(descending=True)
            if number and (signal := float(total[:number].sum())) > best:
                best, chosen = signal, Placement(tuple(sorted(order[:number].tolist())), (low, high))
    return chosen or recommend(None, latent_shape, lows=lows)
