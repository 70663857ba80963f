"""How much of the initial noise comes back from a model's pictures, by channel and frequency."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ringmark.errors import ModelError

__all__ = ["NoiseRecovery", "rings"]


def rings(height: int, width: int) -> Tensor:
    """(h, w) int64: the radius of each bin of an unshifted 2-D DFT, in whole frequencies of the shorter side."""
    short = min(height, width)
    ky, kx = torch.fft.fftfreq(height, 1 / short), torch.fft.fftfreq(width, 1 / short)
    return torch.hypot(ky[:, None], kx[None]).round().long()


@dataclass(frozen=True)
class NoiseRecovery:
    """How much of a model's noise comes back, per channel and ring: both (C, R) float64.

    A bin F of the noise is recovered as a F + rest, with `attenuation` a and `variance` v = E|rest|², for orthonormal
    transforms of unit normal noise. A mark of unit power stands at a signal-to-noise ratio a²/v.
    """

    attenuation: Tensor
    variance: Tensor

    FILE: ClassVar[str] = "noise_recovery.json"

    @property
    def null(self) -> Tensor:
        """Variance of a recovered bin of an unmarked image of this model, a² + v."""
        return self.attenuation.square() + self.variance

    @classmethod
    def measure(cls, recovered: Tensor, truth: Tensor) -> NoiseRecovery:
        """From recovered and true noise (B, C, h, w): a = Re Σ F̂ F* / Σ |F|², v = mean |F̂ − a F|²."""
        f, g = (torch.fft.fft2(x.double().cpu(), norm="ortho") for x in (truth, recovered))
        ring = rings(*truth.shape[-2:])
        a = _ring_sums((g * f.conj()).real, ring) / _ring_sums(f.abs().square(), ring)
        count = len(truth) * torch.bincount(ring.flatten())
        return cls(attenuation=a, variance=_ring_sums((g - a[:, ring] * f).abs().square(), ring) / count)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over both tables."""
        return hashlib.sha256(torch.stack([self.attenuation, self.variance]).numpy().tobytes()).hexdigest()[:16]

    def save(self, folder: Path, **settings: object) -> None:
        """Store it beside the model's weights, with the settings it was measured under."""
        table = {"attenuation": self.attenuation, "variance": self.variance}
        rounded = {k: [[float(f"{x:.6g}") for x in row] for row in v.tolist()] for k, v in table.items()}
        (folder / self.FILE).write_text(json.dumps(settings | rounded, indent=1))

    @classmethod
    def load(cls, folder: Path) -> NoiseRecovery | None:
        """What is stored in a model's folder; None if nothing is. Raises ModelError for a damaged file."""
        path = folder / cls.FILE
        if not path.is_file():
            return None
        try:
            return cls(**_tables(json.loads(path.read_text())))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelError("model.recovery-damaged", f"damaged ({error})", subject=path) from error


def _tables(stored: dict[str, Any]) -> dict[str, Tensor]:
    """`attenuation` and `variance` from JSON. Raises ValueError, KeyError or TypeError where they are not usable."""
    a, v = (torch.tensor(stored[name], dtype=torch.float64) for name in ("attenuation", "variance"))
    if a.shape != v.shape or a.ndim != 2 or not (a.isfinite() & v.isfinite() & (v > 0)).all():
        raise ValueError("attenuation and variance must be tables of one shape, finite, variance positive")
    return {"attenuation": a, "variance": v}


def _ring_sums(power: Tensor, ring: Tensor) -> Tensor:
    """(C, R): sums of (B, C, h, w) over the batch and over the bins of each ring."""
    sums = torch.zeros(power.shape[1], int(ring.max()) + 1, dtype=torch.float64)
    return sums.index_add_(1, ring.flatten(), power.sum(0).flatten(1))
