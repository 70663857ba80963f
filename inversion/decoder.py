"""Decoder inversion: the latent that a decoder turned into an image.

With E the encoder, D the decoder and x the image, T(z) = E(D(z)) − E(x) is zero at the latent we look for, and
z₀ = E(x) is near it (arXiv 2409.18442). No gradient is taken, so nothing is stored but the iterates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from inversion.methods import Adam, Anderson
from inversion.solve import Method, Residual, Solution, norms, solve

__all__ = ["gradient_residual", "invert_decoder", "invert_decoder_by_gradient", "quantisation_level"]

Map = Callable[[Tensor], Tensor]

GREY_LEVEL = 2 / 255  # one step of an 8-bit image whose range is [-1, 1]


@torch.inference_mode()
def invert_decoder(
    encode: Map,
    decode: Map,
    images: Tensor,
    method: Method = Anderson(),
    *,
    max_steps: int = 8,
    tol: float | Tensor | Literal["auto"] | None = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Solution:
    """Latents z with E(D(z)) = E(x) for images x (B, 3, H, W) in [-1, 1]; `max_steps=0` is the encoder alone.

    Works for any two maps. Each image keeps the iterate with the smallest pixel residual ‖D(z) − x‖, which every
    evaluation yields for free; a step costs one E and one D. `tol="auto"` stops an image once ‖T‖ has fallen to what
    rounding x to 8 bits alone causes (the discrepancy principle): iterating past it fits the rounding noise.
    """
    target = encode(images)
    images = images.to(target.device)
    if max_steps and isinstance(tol, str):
        tol = quantisation_level(encode, images, target)

    def residual(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        decoded = decode(z.to(target.dtype))
        return encode(decoded).float() - target[rows].float(), (decoded - images[rows]).float()

    return solve(
        residual, target, method, max_steps=max_steps, tol=None if isinstance(tol, str) else tol, progress=progress
    )


def quantisation_level(encode: Map, images: Tensor, target: Tensor, draws: int = 3) -> Tensor:
    """σ_q (B,): median over `draws` of ‖E(x + u) − E(x)‖, u uniform over ± half a grey level.

    The same u serves every image, so that an image's level does not depend on its batch.
    """
    generator = torch.Generator().manual_seed(0)
    spread = []
    for _ in range(draws):
        u = (torch.rand(images[:1].shape, generator=generator) - 0.5) * GREY_LEVEL
        spread.append(norms((encode(images + u.to(images)) - target).float()))
    return torch.stack(spread).median(0).values


def gradient_residual(decode: Map, images: Tensor) -> Residual:
    """∇_z Σ(D(z) − x)² with error D(z) − x: the baseline's residual. It stores the decoder's whole graph."""

    def residual(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            z = z.clone().requires_grad_()  # a clone, since the start may have been made in inference mode
            error = decode(z) - images[rows]
            loss = error.square().sum()
            (gradient,) = torch.autograd.grad(loss, z)
        return gradient, error.detach()

    return residual


def invert_decoder_by_gradient(
    decode: Map, images: Tensor, start: Tensor, method: Method | None = None, *, max_steps: int = 50
) -> Solution:
    """The gradient baseline of arXiv 2409.18442 from `start` (the encoder's latents): Adam at 0.1, scheduled, unless told otherwise."""
    method = Adam(lr=0.1, horizon=max_steps) if method is None else method
    return solve(gradient_residual(decode, images.to(start.device)), start, method, max_steps=max_steps)
