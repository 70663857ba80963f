"""DDIM as one formula, walked both ways (arXiv 2010.02502)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ringmark.inversion.schedule import Grid
from ringmark.inversion.solve import Method, norms, solve

__all__ = ["invert", "sample", "transfer"]


class Denoiser(Protocol):
    """What this module needs of a model."""

    def eps(self, latents: Tensor, t: int, cond: Tensor) -> Tensor: ...

    def embed(self, prompts: list[str]) -> Tensor: ...


def transfer(z: Tensor, eps: Tensor, alpha_from: float, alpha_to: float) -> Tensor:
    """Move a latent between noise levels along ε, in either direction.

    z_b = √ᾱ_b (z_a − √(1 − ᾱ_a) ε)/√ᾱ_a + √(1 − ᾱ_b) ε; for the same ε the way back is exact.
    """
    a, b = float(alpha_from), float(alpha_to)
    return (b / a) ** 0.5 * z + ((1 - b) ** 0.5 - (b * (1 - a) / a) ** 0.5) * eps


def guided(model: Denoiser, cond: Tensor, guidance: float) -> Callable[..., Tensor]:
    """(z, t, rows) → ε_∅ + g (ε_c − ε_∅), both in one call of the network; g = 1 needs no empty prompt.

    `rows` says which of the batch's prompts belong to z; all of them unless given.
    """
    if guidance == 1.0:
        return lambda z, t, rows=...: model.eps(z, t, cond[rows])
    nothing = model.embed([""]).expand_as(cond)

    def eps(z: Tensor, t: int, rows=...) -> Tensor:
        empty, conditional = model.eps(torch.cat([z, z]), t, torch.cat([nothing[rows], cond[rows]])).chunk(2)
        return empty + guidance * (conditional - empty)

    return eps


@torch.inference_mode()
def sample(
    model: Denoiser,
    noise: Tensor,
    cond: Tensor,
    grid: Grid,
    *,
    guidance: float = 1.0,
    progress: Callable[[], None] | None = None,
) -> Tensor:
    """Latents (B, C, h, w) drawn from unit normal noise of that shape by deterministic DDIM.

    `cond` (B, L, W) are prompts' embeddings; guidance ≥ 1, 1 is none. Agrees with diffusers' DDIMScheduler at η = 0.
    """
    eps, z = guided(model, cond, guidance), noise
    for i in reversed(range(len(grid))):
        t = int(grid.timesteps[i])
        z = transfer(z, eps(z, t), grid.alpha_bar[i + 1], grid.alpha_bar[i])
        if progress:
            progress()
    return z


@torch.inference_mode()
def invert(
    model: Denoiser,
    latents: Tensor,
    cond: Tensor,
    grid: Grid,
    *,
    guidance: float = 1.0,
    method: Method | None = None,
    max_steps: int = 3,
    tol: float = 1e-3,
    progress: Callable[[], None] | None = None,
) -> Tensor:
    """The initial noise (B, C, h, w) from which `sample` would draw these latents.

    Naive (`method` None): each move takes ε at the cleaner latent. Exact: solves z' = transfer(z, ε(z')) for the
    noisier latent z' with a fixed-point method, from the naive move, at most `max_steps` steps a move, until the
    equation's residual is below `tol` of ‖z'‖.
    """
    eps, z = guided(model, cond, guidance), latents
    for i in range(len(grid)):
        t, a, b = int(grid.timesteps[i]), grid.alpha_bar[i], grid.alpha_bar[i + 1]
        naive = transfer(z, eps(z, t), a, b)
        z = naive if method is None else _implicit(eps, z, naive, t, a, b, method, max_steps, tol)
        if progress:
            progress()
    return z


def _implicit(
    eps: Callable[..., Tensor],
    z: Tensor,
    naive: Tensor,
    t: int,
    a: float,
    b: float,
    method: Method,
    max_steps: int,
    tol: float,
) -> Tensor:
    """z' with z' = transfer(z, ε(z')), from the naive move."""

    def residual(noisier: Tensor, rows: Tensor) -> Tensor:
        return noisier - transfer(z[rows], eps(noisier.to(z.dtype), t, rows), a, b)

    return solve(residual, naive, method, max_steps=max_steps, tol=tol * norms(naive)).value.to(z.dtype)
