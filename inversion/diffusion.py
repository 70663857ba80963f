"""Deterministic sampling and its inversion, for every schedule with x_i = a_i x₀ + s_i ε.

DDIM (arXiv 2010.02502) and the Euler steps of rectified flow (arXiv 2209.03003) are two of them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ringmark.inversion.condition import Condition
from ringmark.inversion.schedule import Schedule
from ringmark.inversion.solve import Method, norms, solve

__all__ = ["Denoiser", "invert", "sample", "transfer"]


class Denoiser(Protocol):
    """What sampling and inversion need from a model."""

    def predict(self, latents: Tensor, level: int, schedule: Schedule, cond: Condition) -> tuple[Tensor, Tensor]:
        """(x̂₀, ε̂) of latents at `level` ≥ 1, with latents = a x̂₀ + s ε̂, in 32 bits or more."""
        ...


def transfer(x0: Tensor, eps: Tensor, signal: float, noise: float) -> Tensor:
    """The latent a x₀ + s ε at the level with this signal a and noise s."""
    return signal * x0 + noise * eps


@torch.inference_mode()
def sample(model: Denoiser, noise: Tensor, cond: Condition, schedule: Schedule) -> Tensor:
    """Latents (B, C, h, w) drawn deterministically from unit normal noise of that shape.

    `cond` has one row per latent. Agrees with diffusers' DDIMScheduler at η = 0 and with its
    FlowMatchEulerDiscreteScheduler.
    """
    z = noise
    for level in range(len(schedule), 0, -1):
        z = transfer(*model.predict(z, level, schedule, cond), *schedule.at(level - 1)).to(noise.dtype)
    return z


@torch.inference_mode()
def invert(
    model: Denoiser,
    latents: Tensor,
    cond: Condition,
    schedule: Schedule,
    *,
    method: Method | None = None,
    max_steps: int = 3,
    tol: float = 1e-3,
) -> Tensor:
    """The initial noise (B, C, h, w) from which `sample` would draw these latents.

    Given the cleaner latent z, the noisier z′ solves T(z′) = w (a x̂₀(z′) + s ε̂(z′) − z) = 0. Naive inversion
    (`method` None) takes one step from z′ = z to z − T(z), which for DDIM is the usual inversion. Exact inversion
    continues from there with a fixed-point method, at most `max_steps` steps per move, until ‖T‖ ≤ `tol` ‖z′‖. `cond`
    has one row per latent.
    """
    z, rows = latents, torch.arange(len(latents), device=latents.device)
    for level in range(1, len(schedule) + 1):
        missed = _Missed(model, schedule, level, z, cond)
        noisier = z - missed(z, rows)
        if method is not None:
            noisier = solve(missed, noisier, method, max_steps=max_steps, tol=tol * norms(noisier)).value
        z = noisier.to(latents.dtype)
    return z


class _Missed:
    """T(z′) = w (a x̂₀(z′) + s ε̂(z′) − z), the error of the move from z′ at `level` to the cleaner latent z.

    The weight w gives T slope 1 in z′ for a fixed output of the network, so that plain steps contract.
    """

    def __init__(self, model: Denoiser, schedule: Schedule, level: int, cleaner: Tensor, cond: Condition) -> None:
        self.model, self.schedule, self.level = model, schedule, level
        self.cleaner, self.cond = cleaner, cond
        self.signal, self.noise = schedule.at(level - 1)
        self.weight = _weight(schedule, level)

    def __call__(self, noisier: Tensor, rows: Tensor) -> Tensor:
        pair = self.model.predict(noisier.to(self.cleaner.dtype), self.level, self.schedule, self.cond[rows])
        return self.weight * (transfer(*pair, self.signal, self.noise) - self.cleaner[rows])


def _weight(schedule: Schedule, level: int) -> float:
    """w of the move to `level`, where the latent has signal a′ and noise s′.

    It is 1 for rectified flow (fixed velocity), otherwise a′/a (fixed ε̂), or s′/s without signal (fixed x̂₀).
    """
    (signal, noise), (signal_there, noise_there) = schedule.at(level - 1), schedule.at(level)
    if schedule.straight or (signal_there == 0 and noise == 0):
        return 1.0
    return signal_there / signal if signal_there else noise_there / noise
