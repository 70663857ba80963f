"""The test for tree-ring's pattern *zeros*: the power that a mark's rings lack compared with their neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ringmark.inversion.noise_recovery import radial_frequencies
from ringmark.watermark.null import Array
from ringmark.watermark.schemes.bins import Bins
from ringmark.watermark.schemes.fourier import mirror
from ringmark.watermark.statistics import power_p, power_scores, spread_log10_p

__all__ = ["Neighbours", "PowerTest"]

SIDE, LEAST_BESIDE = 2, 8  # rings on each side of the mark; minimum number of bins of a side


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The bins beside a mark in these inclusive `radii`, in cycles per `side` pixels of the latent."""

    bins: Bins
    radii: tuple[int, int]
    side: int

    @cached_property
    def masks(self) -> list[Tensor]:
        """Masks (h, w): SIDE rings inside the mark, if they have LEAST_BESIDE bins, and SIDE rings outside it."""
        (low, high), ring = self.radii, self.bins.ring
        spans = ((low - SIDE, low - 1), (high + 1, high + SIDE))
        bands = [(first <= ring) & (ring <= last) & (self._frequency > 0) for first, last in spans]
        within, beyond = ((band | mirror(band)) & ~self._reached for band in bands)
        both = within & beyond  # can overlap, because the published mask is not its own mirror
        return [side for side in (within & ~both, beyond & ~both) if side.sum() >= LEAST_BESIDE]

    @property
    def counts(self) -> Array:
        """The number of bins of each side (sides,)."""
        return np.array([float(side.sum()) for side in self.masks])

    @property
    def weights(self) -> Array:
        """Weights w (sides,) with Σ w = 1 and, for two sides, Σ w L = the mask's L, where L is the mean log frequency.

        If power follows a power law in frequency, Σ w log(power of a side) is then the log power of the mask. A mask
        without rings inside is compared directly with those outside: its p is too large if power falls with frequency,
        as it does in attacked pictures, and too small if power rises.
        """
        mask, (first, *second) = self._log_frequency(self._reached), list(map(self._log_frequency, self.masks))
        share = (second[0] - mask) / (second[0] - first) if second else 1.0
        return np.array([share, 1 - share][: 1 + len(second)])

    @property
    def _reached(self) -> Tensor:
        """Mask (h, w) of the marked bins and their conjugates."""
        return self.bins.inside | mirror(self.bins.inside)

    @cached_property
    def _frequency(self) -> Tensor:
        """Distance (h, w) from DC, in the unit of radii."""
        height, width = self.bins.ring.shape
        return radial_frequencies(height, width, self.side)

    def _log_frequency(self, where: Tensor) -> float:
        return float(self._frequency[where & (self._frequency > 0)].log().mean())


@dataclass(frozen=True, eq=False)
class PowerTest:
    """A `SchemeTest` of `channels` channels, whose transforms (B, c, h, w) `whitened` computes from noise.

    Without references, p is that of white noise. With references it comes from their spread, since power differs more
    between rings than in white noise, even in unmarked images.
    """

    whitened: Callable[[Tensor], Tensor]
    bins: Bins
    neighbours: Neighbours
    channels: int

    @property
    def template(self) -> None:
        """None: the score is not a cosine."""
        return None

    def observe(self, noise: Tensor) -> Array:
        """Features of the mask, then the powers on its sides (B, d)."""
        transform = self.whitened(noise)
        inside = self.bins.features(transform.flatten(-2)[..., self.bins.tested])
        power = transform.abs().square()
        return torch.cat([inside, *(power[..., side].flatten(1) for side in self.neighbours.masks)], 1).numpy()

    def score(self, observed: Array) -> Array:
        """The score s (B,) of `statistics.power_scores`."""
        ends = np.cumsum([self.bins.numbers, *self.neighbours.counts]).astype(int) * self.channels
        parts = [part.reshape(len(observed), self.channels, -1) for part in np.split(observed, ends[:-1], axis=1)]
        return power_scores(parts[0], parts[1:], self.neighbours.weights)

    def log10_p(self, scores: Array, references: Array | None = None) -> Array:
        """From the spread of the references, or from the F-distribution of white noise without them."""
        if references is not None:
            return spread_log10_p(scores, references)
        p = power_p(scores, self.channels, self.bins.numbers, self.neighbours.counts, self.neighbours.weights)
        return np.log10(np.maximum(p, np.finfo(float).tiny))  # where p underflows, the smallest number above it

    def density(self, scores: Array) -> None:
        """None: not known in closed form."""
        return None
