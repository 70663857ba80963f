"""The null, a model of noise recovered from unmarked images, and whitening by it.

Bins are those of orthonormal 2-D transforms; rings are `inversion.noise_recovery.rings`. The real and imaginary parts
of a bin and the bins of a ring are assumed to be uncorrelated and of equal variance; the channels of a bin may be
correlated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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

    `name` is recorded in results: "white", or a fingerprint of the measurement.
    """

    covariance: Array
    mean: Tensor | float = 0.0
    name: str = "white"
    _roots: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def white(cls, latent_shape: tuple[int, int, int]) -> Null:
        """White noise on latents (C, h, w), the assumption if nothing was measured."""
        channels, height, width = latent_shape
        return cls(np.tile(np.eye(channels), (int(rings(height, width).max()) + 1, 1, 1)))

    @classmethod
    def of_model(cls, model: Known) -> Null:
        """The null of a model: its measured variances with independent channels, or white noise."""
        if model.recovery is None:
            return cls.white(model.latent_shape)
        variances = model.recovery.null.T.numpy()[:, :, None]
        return cls(variances * np.eye(model.latent_shape[0]), name=model.recovery.fingerprint)

    def whiten(self, transform: Tensor, channels: Sequence[int]) -> Tensor:
        """L⁻¹ F bin by bin, Σ = L Lᵀ the covariance of `channels` on the bin's ring: complex (B, c, h, w) → the same.

        Under this null, after subtracting the mean, the result has the identity as its covariance. For two transforms
        ⟨L⁻¹ F, L⁻¹ K⟩ = F* Σ⁻¹ K, for any root of Σ.
        """
        root = self._root(tuple(channels))[rings(*transform.shape[-2:])].to(transform)
        return torch.einsum("hwij,bjhw->bihw", root, transform)

    def whitened(self, noise: Tensor, channels: Sequence[int]) -> Tensor:
        """The whitened spectrum (B, c, h, w) of noise (B, C, h, w) minus the mean."""
        return self.whiten(spectrum(noise - self.mean, channels), channels)

    def _root(self, channels: tuple[int, ...]) -> Tensor:
        """L⁻¹ (R, c, c) float64 on each ring."""
        if channels not in self._roots:
            of = np.array(channels)
            self._roots[channels] = torch.from_numpy(
                np.linalg.inv(np.linalg.cholesky(self.covariance[:, of[:, None], of]))
            )
        return self._roots[channels]
