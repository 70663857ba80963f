"""The null, a model of noise recovered from unmarked images, and whitening by it.

Bins are those of orthonormal 2-D transforms. Rings are those of `inversion.noise_recovery.rings`; their unit is the
shorter side of the latents on which the null was measured. At another size, a bin has the covariance of the ring
nearest to its frequency in cycles per pixel. There is no interpolation, because neighbouring rings hardly differ and
each table must hold exactly at its own size. The real and imaginary parts of a bin and the bins of a ring are assumed
to be uncorrelated and of equal variance; the channels of a bin may be correlated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ringmark.inversion.noise_recovery import NoiseRecovery, rings

__all__ = ["Array", "Null", "spectrum"]

Array = NDArray[np.float64]


class Known(Protocol):
    """What a null needs to know of a model."""

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...

    @property
    def recovery(self) -> NoiseRecovery | None: ...


def spectrum(noise: Tensor, channels: Sequence[int]) -> Tensor:
    """Orthonormal transform of these channels of noise (B, C, h, w), float64 on the CPU, unshifted order."""
    transform: Tensor = torch.fft.fft2(noise[:, list(channels)].double().cpu(), norm="ortho")
    return transform


@dataclass(frozen=True, eq=False)
class Null:
    """Mean (C, h, w), or 0, and covariance (R, C, C) across channels, by ring, of noise recovered from unmarked images.

    `side` is the unit of rings, the shorter side in pixels of the latents that were measured. `name` is recorded in
    results: "white", or a fingerprint of the measurement. Without `layout_known`, images have an unknown mean on the
    lowest rings.
    """

    covariance: Array
    side: int
    mean: Tensor | float = 0.0
    name: str = "white"
    layout_known: bool = True
    _roots: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def white(cls, latent_shape: tuple[int, int, int]) -> Null:
        """White noise on latents (C, h, w), the assumption if nothing was measured."""
        channels, height, width = latent_shape
        tables = np.tile(np.eye(channels), (int(rings(height, width).max()) + 1, 1, 1))
        return cls(tables, min(height, width), layout_known=False)

    @classmethod
    def of_model(cls, model: Known, latent_shape: tuple[int, int, int] | None = None) -> Null:
        """The null of a model: its measured variances with independent channels, or white noise.

        It is for latents of this shape, by default the model's native one.
        """
        if model.recovery is None:
            return cls.white(latent_shape or model.latent_shape)
        channels, *size = model.latent_shape
        variances = model.recovery.null.T.numpy()[:, :, None]
        null = cls(variances * np.eye(channels), min(size), name=model.recovery.fingerprint, layout_known=False)
        return null.at(latent_shape or model.latent_shape)

    def at(self, latent_shape: tuple[int, int, int]) -> Null:
        """The null of latents (C, h, w) of another size: the same covariance by frequency.

        The mean is a layout, such as sky above ground, which keeps its place in the picture: it is resized. Pictures of
        other proportions have another layout, which is not known (see scripts/experiments/sizes.py).
        """
        if not isinstance(self.mean, Tensor) or self.mean.shape == latent_shape:
            return self
        (height, width), (own_height, own_width) = latent_shape[1:], self.mean.shape[1:]
        if height * own_width != width * own_height:
            return replace(self, mean=0.0, layout_known=False)
        mean = functional.interpolate(self.mean[None].double(), (height, width), mode="bicubic", antialias=True)
        return replace(self, mean=mean[0])

    def whiten(self, transform: Tensor, channels: Sequence[int]) -> Tensor:
        """L⁻¹ F bin by bin, Σ = L Lᵀ the covariance of `channels` on the bin's ring: complex (B, c, h, w) → the same.

        Under this null, after subtracting the mean, the result has the identity as its covariance. For two transforms
        ⟨L⁻¹ F, L⁻¹ K⟩ = F* Σ⁻¹ K, for any root of Σ.
        """
        height, width = transform.shape[-2:]
        at = torch.arange(height * width)
        return self.whiten_bins(transform.flatten(2), channels, at, (height, width)).view(transform.shape)

    def whiten_bins(self, bins: Tensor, channels: Sequence[int], at: Tensor, size: tuple[int, int]) -> Tensor:
        """The same for some bins (B, c, n) of transforms of this size (h, w), those `at` these flat indices (n,)."""
        ring = rings(*size, self.side).flatten()[at].clamp_max(len(self.covariance) - 1)
        root = self._root(tuple(channels))[ring].to(bins)
        white: Tensor = torch.einsum("nij,bjn->bin", root, bins)
        return white.contiguous()

    def centred(self, noise: Tensor, channels: Sequence[int]) -> Tensor:
        """The spectrum (B, c, h, w) of noise (B, C, h, w) minus the mean."""
        of, mean = list(channels), self.mean
        return spectrum(noise[:, of] - (mean[of] if isinstance(mean, Tensor) else mean), range(len(of)))

    def whitened(self, noise: Tensor, channels: Sequence[int]) -> Tensor:
        """The same, whitened."""
        return self.whiten(self.centred(noise, channels), channels)

    def _root(self, channels: tuple[int, ...]) -> Tensor:
        """L⁻¹ (R, c, c) float64 on each ring."""
        if channels not in self._roots:
            of = np.array(channels)
            self._roots[channels] = torch.from_numpy(
                np.linalg.inv(np.linalg.cholesky(self.covariance[:, of[:, None], of]))
            )
        return self._roots[channels]
