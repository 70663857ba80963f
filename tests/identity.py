"""A model whose every map is the identity, up to scale, with keys for it and pictures of noise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ringmark.data.images import Sample, from_array
from ringmark.errors import ModelError
from ringmark.inversion.condition import Condition
from ringmark.inversion.diffusion import sample
from ringmark.inversion.recover import Recoverer
from ringmark.inversion.schedule import Schedule
from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.embed import Drawn, initial_noise
from ringmark.watermark.keys.key import SECRET_BYTES, Key
from ringmark.watermark.schemes.base import make_key, scheme_of


class Identity:
    """Pixels are latents are noise, up to scale."""

    name, latent_shape, image_size, recovery = "identity", (3, 32, 32), (32, 32), None
    channels, factor, sizes = 3, 1, ((32, 32),)
    kind = {"family": "identity", "channels": 3, "factor": 1}
    identity = {"name": "identity", "fingerprint": "0", **kind}
    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images * 4

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / 4

    def condition(self, prompts: list[str], *, guidance: float = 1.0, negative: str = "") -> Condition:
        return Condition({"prompt_embeds": torch.zeros(len(prompts), 1, 1)})

    @property
    def nothing(self) -> Condition:
        return self.condition([""])

    def predict(self, latents: torch.Tensor, level: int, schedule: Schedule, cond: Condition) -> tuple:
        return latents / schedule.at(level)[0], torch.zeros_like(latents)

    def noise_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        if any(side % 8 for side in size):
            raise ModelError("model.size", "sides must be multiples of 8", subject=self.name, multiple=8)
        return (3, *size)

    def sampler(self, name: str | None, steps: int, size: tuple[int, int] | None = None) -> None:
        """It has no pipeline, so `generate` draws in its place."""

    def schedule(self, steps: int, size: tuple[int, int] | None = None) -> Schedule:
        return Schedule.from_alpha_bar(torch.linspace(1, 0.01, steps + 1).double()[1:], torch.arange(steps))


MODEL = Identity()


def secret(seed: int) -> bytes:
    """A secret that is none."""
    return seed.to_bytes(SECRET_BYTES, "big")


def of_shape(shape: tuple[int, int, int], **model: Any) -> dict[str, Any]:
    """What a key says of a model with latents of this shape that are its pixels, as arguments of `make_key`."""
    return {"kind": {"family": "none", "channels": shape[0], "factor": 1}, "reference": shape[1:], "model": model}


def key(seed: int, pattern: str = "ring", radii: tuple[int, int] = (2, 8), **changes: Any) -> Key:
    """A key in channels 0 and 2; `changes` are those of the model's identity."""
    return make_key(
        "tree-ring",
        kind=MODEL.kind,
        reference=MODEL.image_size,
        model=MODEL.identity | changes,
        secret=secret(seed),
        pattern=pattern,
        channels=(0, 2),
        radii=radii,
    )


def generate(
    model: Identity,
    prompts: list[str],
    seeds: list[int],
    *,
    key: Key | None,
    steps: int,
    size: tuple[int, int],
    **_: Any,
) -> Iterator:
    """`ringmark.watermark.embed.generate` for a model without a pipeline."""
    noise = initial_noise(seeds, model.noise_shape(size))
    noise = scheme_of(key).embed(noise) if key else noise
    images = model.decode(sample(model, noise, model.condition(prompts), model.schedule(steps))).clamp(-1, 1)
    yield from map(Drawn, images, noise, prompts, seeds)


def samples(noise: torch.Tensor) -> list[Sample]:
    """8-bit pictures of noise, within ± 4 deviations."""
    return [Sample(str(i), from_array(np.clip(x.numpy() / 4, -1, 1))) for i, x in enumerate(noise)]


def pictures(noise: torch.Tensor) -> list[list[Sample]]:
    """The same, each to be tried at its one size."""
    return [[sample] for sample in samples(noise)]


def old_key(described: Key, spectrum: torch.Tensor) -> Key:
    """A key as of an older file, with the description of another and this spectrum (c, h, w)."""
    metadata = {name: value for name, value in described.metadata.items() if name not in ("kind", "reference")}
    latent_shape = [described.latent_shape[0], *spectrum.shape[1:]]
    return Key(metadata | {"latent_shape": latent_shape}, values=torch.view_as_real(spectrum).float().numpy())


def verifier(
    keys=(), *, method: str = "operator", max_steps: int | None = None, steps: int = 2, model=MODEL, **options: Any
) -> Verifier:
    """A verifier of these keys on the model, of few steps."""
    return Verifier(Recoverer.named(model, method, max_steps, steps), list(keys), **options)
