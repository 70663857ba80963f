"""The noise levels of a sampler."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Schedule"]


@dataclass(frozen=True, eq=False)
class Schedule:
    """Levels of ascending noise; a latent at level i is x_i = a_i x₀ + s_i ε, and level 0 is the clean end.

    `timesteps` (N,): timesteps[i] conditions the network on level i + 1, for the move i ↔ i + 1. `signal` (N + 1,)
    holds a ≥ 0, decreasing; `noise` (N + 1,) holds s ≥ 0, increasing; both float64. Only level 0 may have no noise, and
    only level N may have no signal. DDIM has a = √ᾱ, s = √(1 − ᾱ) (arXiv 2010.02502); rectified flow has a = 1 − σ, s =
    σ (arXiv 2209.03003). Raises ValueError for anything else.
    """

    timesteps: Tensor
    signal: Tensor
    noise: Tensor

    def __post_init__(self) -> None:
        levels = (len(self.timesteps) + 1,)
        if self.timesteps.ndim != 1 or self.signal.shape != levels or self.noise.shape != levels:
            raise ValueError(
                f"a schedule of N moves has N + 1 levels, not {len(self.timesteps)} moves with "
                f"{len(self.signal)} levels of signal and {len(self.noise)} of noise"
            )
        if self.signal.dtype != torch.float64 or self.noise.dtype != torch.float64:
            raise ValueError(f"signal and noise must be float64, not {self.signal.dtype} and {self.noise.dtype}")
        self._check_signal()
        self._check_noise()

    def _check_signal(self) -> None:
        falls = self.signal.isfinite().all() and (self.signal.diff() <= 0).all()
        if not falls or not (self.signal[:-1] > 0).all() or self.signal[-1] < 0:
            raise ValueError("the signal must be decreasing and positive; it may only be 0 at the noisy end")

    def _check_noise(self) -> None:
        rises = self.noise.isfinite().all() and (self.noise.diff() >= 0).all()
        if not rises or not (self.noise[1:] > 0).all() or self.noise[0] < 0:
            raise ValueError("the noise must be increasing and positive; it may only be 0 at the clean end")

    def __len__(self) -> int:
        """The number of moves N."""
        return len(self.timesteps)

    def at(self, level: int) -> tuple[float, float]:
        """Signal and noise (a_i, s_i) of level i = 0 … N."""
        return float(self.signal[level]), float(self.noise[level])

    def timestep(self, level: int) -> int | float:
        """The timestep that conditions the network on level i = 1 … N."""
        return self.timesteps[level - 1].item()

    def until(self, level: int) -> Schedule:
        """The levels 0 … `level`."""
        return Schedule(self.timesteps[:level], self.signal[: level + 1], self.noise[: level + 1])

    @property
    def straight(self) -> bool:
        """Whether a + s = 1 at every level, as in rectified flow."""
        return bool(((self.signal + self.noise - 1).abs() < 1e-9).all())

    @classmethod
    def from_alpha_bar(cls, alphas_cumprod: Tensor, timesteps: Tensor, clean: float = 1.0) -> Schedule:
        """DDIM's levels at these timesteps (in any order) of a training schedule ᾱ (T,) in [0, 1].

        `clean` is ᾱ at level 0. Raises ValueError for a timestep that is not in 0 … T − 1.
        """
        ascending = timesteps.to("cpu", torch.int64).sort().values
        if len(ascending) and not 0 <= ascending[0] <= ascending[-1] < len(alphas_cumprod):
            raise ValueError(f"timesteps must lie in 0 … {len(alphas_cumprod) - 1}")
        levels = alphas_cumprod.to("cpu", torch.float64)[ascending]
        alpha_bar = torch.cat([torch.tensor([clean], dtype=torch.float64), levels])
        return cls(ascending, signal=alpha_bar.sqrt(), noise=(1 - alpha_bar).sqrt())

    @classmethod
    def from_sigma(cls, sigmas: Tensor, timesteps: Tensor) -> Schedule:
        """Rectified flow's levels at σ (N + 1,), ascending in [0, 1] from the clean end, usually 0."""
        sigma = sigmas.to("cpu", torch.float64)
        return cls(timesteps.to("cpu"), signal=1 - sigma, noise=sigma)
