"""Mark what a diffusers pipeline draws; draw marked and unmarked images with a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringmark.errors import KeyFileError, MarkWarning, ModelError
from ringmark.inversion.models.families import kind_of
from ringmark.inversion.models.noise import check_noise_stage, hook, is_hooked, unhook
from ringmark.inversion.models.pipeline import LatentModel, Size
from ringmark.inversion.models.samplers import adds_noise
from ringmark.watermark.keys.key import Key, Kind
from ringmark.watermark.schemes.base import Scheme, scheme_of

__all__ = ["Drawn", "Marking", "generate", "initial_noise", "mark"]

CALLER = 3  # stack levels from `Marking._warn` to the call of the pipeline


class Marking:
    """A handle on a marked pipeline: `remove` stops marking, and so does the end of a `with` block."""

    def __init__(self, pipe: Any, key: Key) -> None:
        name = type(pipe).__name__
        if is_hooked(pipe):
            raise ModelError("model.marked", "is already marked", subject=name)
        check_noise_stage(pipe)
        _check_kind(key, kind_of(pipe), name)
        self.key = key
        self._schemes: dict[tuple[int, int, int], Scheme] = {}
        self._pipe: Any = pipe
        hook(pipe, change=self._embed, before=self._warn)

    @staticmethod
    def _warn(pipe: Any, arguments: Mapping[str, Any]) -> None:
        """Warn if the pipeline's current sampler adds noise in this call."""
        if adds_noise(pipe.scheduler, arguments):
            fact = "adds new noise at every step, so most marks are lost; deterministic samplers keep them"
            warnings.warn(f"{type(pipe.scheduler).__name__} {fact}", MarkWarning, stacklevel=CALLER)

    def _embed(self, noise: Tensor) -> Tensor:
        """Marked noise (B, C, h, w). Raises SchemeError for a size that the key cannot mark."""
        shape = (noise.shape[1], noise.shape[2], noise.shape[3])
        if shape not in self._schemes:
            self._schemes[shape] = scheme_of(self.key, shape)
        return self._schemes[shape].embed(noise.cpu()).to(noise)

    def remove(self) -> None:
        """Stop marking; harmless when repeated."""
        if self._pipe is not None:
            unhook(self._pipe)
            self._pipe = None

    def __enter__(self) -> Marking:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def mark(pipe: Any, key: Key) -> Marking:
    """Mark every image that this diffusers pipeline draws from now on, until `remove()` or the end of a `with` block.

    The pipeline draws its noise as before, for any batch and size, or takes the `latents` that it is given. The key is
    then embedded in that noise, so the same seed gives the same noise except for the mark. Sampler, LoRA, ControlNet
    and IP-Adapter can be changed at any time. A copy of the pipeline is marked too. A call whose sampler adds noise
    (ancestral, LCM, SDE, η > 0) issues a MarkWarning.

    Raises ModelError for a pipeline that is already marked, starts from an image, has no `prepare_latents` method or
    belongs to no supported family, and KeyFileError for a key for another kind of latents.
    """
    return Marking(pipe, key)


def _check_kind(key: Key, kind: Mapping[str, Any], name: str) -> None:
    """Raises KeyFileError for a key for another kind of latents. Old keys name no kind; `_embed` checks their shape."""
    needed = key.metadata.get("kind")
    if needed is not None and needed != kind:
        fact = f"is for latents of {Kind(**needed)}, and {name} has {Kind(**kind)}"
        raise KeyFileError(
            "key.latents", fact, subject=f"key {key.fingerprint[:8]}", model=key.metadata["model"].get("name")
        )


@dataclass(frozen=True)
class Drawn:
    """A drawn image: pixels (3, H, W) in [-1, 1] and, for measurements, its true noise."""

    image: Tensor
    noise: Tensor
    prompt: str
    seed: int


def initial_noise(seeds: list[int], latent_shape: tuple[int, int, int]) -> Tensor:
    """Unit normal noise (B, C, h, w); each sample has its own seed and does not depend on the batch."""
    return _noise([torch.Generator().manual_seed(seed) for seed in seeds], latent_shape)


def _noise(generators: list[torch.Generator], latent_shape: tuple[int, int, int]) -> Tensor:
    return torch.stack([torch.randn(latent_shape, generator=generator) for generator in generators])


@torch.inference_mode()
def generate(
    model: LatentModel,
    prompts: list[str],
    seeds: list[int],
    *,
    key: Key | None = None,
    size: Size | None = None,
    sampler: str | None = None,
    negative: str = "",
    steps: int = 25,
    guidance: float = 3.0,
    batch: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Drawn]:
    """Draw an image for each prompt and seed, marked if a key is given; `progress(n)` after n more images.

    The model's pipeline draws them, by default at the native size and with its own sampler. Each image depends only on
    its own prompt and seed. Prompt and seed are not enough to forge a mark, which takes the key.
    """
    shape = model.noise_shape(size or model.image_size)
    for i in range(0, len(prompts), batch):
        batch_prompts, batch_seeds = prompts[i : i + batch], seeds[i : i + batch]
        generators = [torch.Generator().manual_seed(seed) for seed in batch_seeds]
        cond = model.condition(batch_prompts, guidance=guidance, negative=negative)
        with mark(model.pipe, key) if key else nullcontext():
            noise, latents = model.draw(
                _noise(generators, shape), cond, steps=steps, sampler=sampler, generators=generators
            )
        images = model.decode(latents).float().cpu().clamp(-1, 1)
        for drawn in zip(images, noise.cpu(), batch_prompts, batch_seeds, strict=True):
            yield Drawn(*drawn)
        if progress:
            progress(len(batch_seeds))
