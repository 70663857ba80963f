"""Draw marked and unmarked images with a model."""

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
    """A drawn image: pixels (3, H, W) in [-1, 1] and, for measurements, its true noise."""

    image: Tensor
    noise: Tensor
    prompt: str
    seed: int


def initial_noise(seeds: list[int], latent_shape: tuple[int, int, int]) -> Tensor:
    """Unit normal noise (B, C, h, w); each sample has its own seed and does not depend on the batch."""
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

    Prompt and seed are not enough to forge a mark: that needs the key's values, which only the scheme holds.
    """
    schedule = model.schedule(steps)
    for i in range(0, len(prompts), batch):
        batch_prompts, batch_seeds = prompts[i : i + batch], seeds[i : i + batch]
        noise = initial_noise(batch_seeds, model.latent_shape)
        noise = (scheme.embed(noise) if scheme else noise).to(model.device)
        latents = sample(model, noise, model.condition(batch_prompts, guidance=guidance), schedule)
        images = model.decode(latents).float().cpu().clamp(-1, 1)
        for drawn in zip(images, noise.float().cpu(), batch_prompts, batch_seeds, strict=True):
            yield Drawn(*drawn)
        if progress:
            progress(len(batch_seeds))
