"""Numbers that say how well an inversion went."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from inversion.errors import ModelError
from inversion.solve import norms

__all__ = ["NoiseRecovery", "cocoercivity", "nmse_db", "rings"]


def nmse_db(estimate: Tensor, truth: Tensor) -> Tensor:
    """10 log₁₀(‖z − z*‖² / ‖z*‖²) of each sample (B,), in dB; average over dB, as arXiv 2409.18442 does."""
    return 20 * torch.log10(norms(estimate.float() - truth.float()) / norms(truth.float()))


def cocoercivity(z: Tensor, residual: Tensor, solution: Tensor) -> Tensor:
    """⟨T z, z − z*⟩ / ‖T z‖² of each sample (B,): the largest β for which cocoercivity holds at z."""
    t = residual.flatten(1)
    return (t * (z - solution).flatten(1)).sum(1) / t.square().sum(1)


def rings(height: int, width: int) -> Tensor:
    """(h, w) int64: the radius of each bin of an unshifted 2-D DFT, rounded to whole frequencies of the shorter side."""
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
        count = len(truth) * torch.bincount(ring.flatten())

        def per_ring(power: Tensor) -> Tensor:
            total = torch.zeros(truth.shape[1], len(count), dtype=torch.float64)
            return total.index_add_(1, ring.flatten(), power.sum(0).flatten(1))

        a = per_ring((g * f.conj()).real) / per_ring(f.abs().square())
        return cls(a, per_ring((g - a[:, ring] * f).abs().square()) / count)

    def save(self, folder: Path, **settings) -> None:
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
            stored = json.loads(path.read_text())
            a, v = (torch.tensor(stored[k], dtype=torch.float64) for k in ("attenuation", "variance"))
            if a.shape != v.shape or a.ndim != 2 or not (a.isfinite() & v.isfinite() & (v > 0)).all():
                raise ValueError("attenuation and variance must be tables of one shape, finite, variance positive")
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path}: damaged ({error}); measure it again with scripts/measure_recovery.py") from error
        return cls(a, v)
