"""How well the initial noise is recovered from a model's pictures, by channel and frequency."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ringmark.errors import ModelError

__all__ = ["NoiseRecovery", "radial_frequencies", "rings"]

TIE = 1e-9  # far above the error of `radial_frequencies`, so that every platform rounds a tie alike


def radial_frequencies(height: int, width: int, side: int | None = None) -> Tensor:
    """Frequencies (h, w) float64 of the bins of an unshifted 2-D DFT in cycles per `side` pixels, the shorter side."""
    side = side or min(height, width)
    ky, kx = (torch.fft.fftfreq(n, dtype=torch.float64) * side for n in (height, width))
    return torch.hypot(ky[:, None], kx[None])


def rings(height: int, width: int, side: int | None = None) -> Tensor:
    """The ring (h, w) int64 of each bin: its rounded radial frequency, rounded down in a tie."""
    return (radial_frequencies(height, width, side) - 0.5 - TIE).ceil().long()


@dataclass(frozen=True)
class NoiseRecovery:
    """How well a model's noise is recovered, per channel and ring: `attenuation` and `variance`, both (C, R) float64.

    A bin F of the noise is recovered as a F + rest, with `attenuation` a and `variance` v = E|rest|², for orthonormal
    transforms of unit normal noise. A mark of unit power has a signal-to-noise ratio of a²/v.
    """

    attenuation: Tensor
    variance: Tensor

    FILE: ClassVar[str] = "noise_recovery.json"

    @property
    def null(self) -> Tensor:
        """Variance a² + v of a recovered bin in an unmarked image of this model."""
        return self.attenuation.square() + self.variance

    @classmethod
    def measure(cls, recovered: Tensor, truth: Tensor) -> NoiseRecovery:
        """Measure on recovered and true noise (B, C, h, w): a = Re Σ F̂ F* / Σ |F|², v = mean |F̂ − a F|²."""
        f, g = (torch.fft.fft2(x.double().cpu(), norm="ortho") for x in (truth, recovered))
        ring = rings(*truth.shape[-2:])
        a = _ring_sums((g * f.conj()).real, ring) / _ring_sums(f.abs().square(), ring)
        count = len(truth) * torch.bincount(ring.flatten())
        return cls(attenuation=a, variance=_ring_sums((g - a[:, ring] * f).abs().square(), ring) / count)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of a hash over both tables."""
        return hashlib.sha256(torch.stack([self.attenuation, self.variance]).numpy().tobytes()).hexdigest()[:16]

    def save(self, folder: Path, **settings: object) -> None:
        """Save the tables next to the model's weights, with the settings of the measurement."""
        table = {"attenuation": self.attenuation, "variance": self.variance}
        rounded = {k: [[float(f"{x:.6g}") for x in row] for row in v.tolist()] for k, v in table.items()}
        (folder / self.FILE).write_text(json.dumps(settings | rounded, indent=1))

    @classmethod
    def load(cls, folder: Path) -> NoiseRecovery | None:
        """The tables stored in a model's folder, or None. Raises ModelError for a damaged file."""
        path = folder / cls.FILE
        if not path.is_file():
            return None
        try:
            return cls(**_tables(json.loads(path.read_text())))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelError("model.recovery-damaged", f"damaged ({error})", subject=path) from error


def _tables(stored: dict[str, Any]) -> dict[str, Tensor]:
    """`attenuation` and `variance` from JSON. Raises ValueError, KeyError or TypeError if they are unusable."""
    a, v = (torch.tensor(stored[name], dtype=torch.float64) for name in ("attenuation", "variance"))
    if a.shape != v.shape or a.ndim != 2 or not (a.isfinite() & v.isfinite() & (v > 0)).all():
        raise ValueError("attenuation and variance must be finite tables of the same shape, with positive variance")
    return {"attenuation": a, "variance": v}


def _ring_sums(power: Tensor, ring: Tensor) -> Tensor:
    """Sums (C, R) of (B, C, h, w) over the batch and over the bins of each ring."""
    sums = torch.zeros(power.shape[1], int(ring.max()) + 1, dtype=torch.float64)
    return sums.index_add_(1, ring.flatten(), power.sum(0).flatten(1))
