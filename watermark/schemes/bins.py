"""The bins that a tree-ring mark takes in the transform of latents of one size, and the features that its test reads.

Bins are given by flat indices into the unshifted transform (h, w).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ringmark.inversion.noise_recovery import TIE, rings
from ringmark.watermark.schemes.fourier import middle_phase, mirror, signed_frequencies

__all__ = ["Bins", "bins_of", "ring_index"]


def ring_index(mask: str, height: int, width: int, side: int | None = None) -> Tensor:
    """The ring (h, w) int64 of each bin, in cycles per `side` pixels of the latent, by default its shorter side."""
    if mask == "centred":
        return rings(height, width, side)
    ky, kx = signed_frequencies(height, width)
    side = side or min(height, width)
    # Flipping y about an even number of rows puts the published centre at row h/2 − 1, where DC is at h/2.
    distance = torch.hypot((ky + 1 - height % 2) * side / height, kx * side / width)
    return (distance - TIE).ceil().clamp_min(1).long()


@dataclass(frozen=True, eq=False)
class Bins:
    """The bins of a mask and radii: their `ring` and whether they are `inside` (h, w).

    `rows` are one bin of each conjugate pair in the mark, in ascending order, `mirrored` the others; those that are
    their own mirror are `real_only`. Features are
    the real and imaginary parts of the rows, or if `averaged` one mean per circle: ring keys are constant on circles,
    and a test on every bin would confuse two of them.
    """

    ring: Tensor
    inside: Tensor
    rows: Tensor
    mirrored: Tensor
    real_only: Tensor
    averaged: bool

    @property
    def tested(self) -> Tensor:
        """The bins (n,) that features depend on."""
        return self.inside.flatten().nonzero().flatten() if self.averaged else self.rows

    @property
    def numbers(self) -> int:
        """The number d of features per channel."""
        return len(self.circles) if self.averaged else 2 * len(self.rows) - int(self.real_only.sum())

    @cached_property
    def circles(self) -> Tensor:
        """The rings of the mask that have bins, which small latents lack between whole frequencies."""
        return torch.bincount(self.ring[self.inside]).nonzero().flatten()

    def features(self, values: Tensor) -> Tensor:
        """Features (B, c·d) of the `tested` bins (B, c, n), of unit variance if the bins have unit power."""
        return (self._means(values) if self.averaged else self._parts(values)).flatten(1)

    def _parts(self, values: Tensor) -> Tensor:
        real = values.real * torch.where(self.real_only, 1.0, 2**0.5)
        return torch.cat([real, values.imag[..., ~self.real_only] * 2**0.5], -1)

    def _means(self, values: Tensor) -> Tensor:
        """Σ / √n over the n bins of each circle, with phases relative to the middle, where conjugate bins are equal."""
        turned = (values * middle_phase(*self.inside.shape).conj()[self.inside]).real
        circle = torch.bucketize(self.ring[self.inside], self.circles)
        total = torch.zeros(*turned.shape[:-1], len(self.circles), dtype=turned.dtype).index_add_(-1, circle, turned)
        return total / torch.bincount(circle).sqrt()


@lru_cache(maxsize=64)
def bins_of(mask: str, radii: tuple[int, int], size: tuple[int, int], side: int, *, averaged: bool = False) -> Bins:
    """The bins of these inclusive radii on latents of this size (h, w), which all keys of a kind share."""
    ring = ring_index(mask, *size, side)
    inside = (ring >= radii[0]) & (ring <= radii[1])
    index = torch.arange(inside.numel()).view(size)
    opposite = mirror(index)
    rows = index[(inside | mirror(inside)) & (index <= opposite)]
    mirrored = opposite.flatten()[rows]
    return Bins(ring=ring, inside=inside, rows=rows, mirrored=mirrored, real_only=rows == mirrored, averaged=averaged)
