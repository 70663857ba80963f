"""The noise levels that a sampler walks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Grid"]


@dataclass(frozen=True)
class Grid:
    """Noise levels in ascending order; index 0 is the clean end.

    `timesteps` (N,) int64: timesteps[i] conditions the network on the move between levels i and i + 1.
    `alpha_bar` (N + 1,) float64 in (0, 1], falling: a latent at level i is √ᾱ_i z + √(1 − ᾱ_i) ε.
    """

    timesteps: Tensor
    alpha_bar: Tensor

    def __post_init__(self) -> None:
        if self.timesteps.ndim != 1 or self.alpha_bar.shape != (len(self.timesteps) + 1,):
            raise ValueError(f"a grid of N moves has N + 1 levels, not {len(self.timesteps)} and {len(self.alpha_bar)}")
        if not ((self.alpha_bar > 0) & (self.alpha_bar <= 1)).all() or (self.alpha_bar.diff() > 0).any():
            raise ValueError("alpha_bar must fall and lie in (0, 1]")

    def __len__(self) -> int:
        return len(self.timesteps)

    @classmethod
    def from_schedule(cls, alphas_cumprod: Tensor, timesteps: Tensor, clean: float) -> Grid:
        """The grid through these timesteps (any order) of a schedule whose clean end has ᾱ = `clean`."""
        ascending = timesteps.to("cpu", torch.int64).sort().values
        levels = alphas_cumprod.to("cpu", torch.float64)[ascending]
        return cls(ascending, torch.cat([torch.tensor([clean], dtype=torch.float64), levels]))
