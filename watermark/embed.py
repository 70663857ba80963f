"""Marked and unmarked images drawn by a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ringmark.inversion.diffusion import sample
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.schemes.base import Scheme

__all__ = ["Drawn", "generate", "initial_noise"]


@dataclass(frozen=True)
class Drawn:
    """One image as drawn: pixels (3, H, W) in [-1, 1] and, for those who measure, its true latent and noise."""

    image: Tensor
    latent: Tensor
    noise: Tensor
    prompt: str
    seed: int


def initial_noise(seeds: list[int], latent_shape: tuple[int, int, int]) -> Tensor:
    """Unit normal noise (B, C, h, w), each sample from its own seed, whatever batch it is in."""
    return torch.stack([torch.randn(latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.inference_mode()
def generate(
    model: LatentModel,
    prompts: list[str],
    seeds: list[int],
    *,
    scheme: Scheme | None = None,
    steps: int = 25,
    guidance: float = 3.0,
    batch: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Drawn]:
    """Draw an image for each prompt and seed, marked if a scheme is given; `progress(n)` after n more images.

    Neither a prompt nor a seed is enough to forge a mark: the key's values are in the scheme alone.
    """
    schedule = model.schedule(steps)
    for i in range(0, len(prompts), batch):
        texts, some = prompts[i : i + batch], seeds[i : i + batch]
        noise = initial_noise(some, model.latent_shape)
        noise = (scheme.embed(noise) if scheme else noise).to(model.device)
        latents = sample(model, noise, model.embed(texts), schedule, guidance=guidance)
        images = model.decode(latents).float().cpu().clamp(-1, 1)
        for drawn in zip(images, latents.float().cpu(), noise.float().cpu(), texts, some, strict=True):
            yield Drawn(*drawn)
        if progress:
            progress(len(some))
