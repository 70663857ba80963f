"""A model whose every map is the identity, up to scale, with keys for it and pictures of noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ringmark.data.images import Sample, from_array
from ringmark.inversion.condition import Condition
from ringmark.inversion.recover import Recoverer
from ringmark.inversion.schedule import Schedule
from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.base import make_key


class Identity:
    """Pixels are latents are noise, up to scale."""

    name, latent_shape, image_size, recovery = "identity", (3, 32, 32), (32, 32), None
    channels, factor = 3, 1
    kind = {"family": "identity", "channels": 3, "factor": 1}
    identity = {"name": "identity", "fingerprint": "0", **kind}
    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images * 4

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / 4

    def condition(self, prompts: list[str], *, guidance: float = 1.0) -> Condition:
        return Condition({"prompt_embeds": torch.zeros(len(prompts), 1, 1)})

    @property
    def nothing(self) -> Condition:
        return self.condition([""])

    def predict(self, latents: torch.Tensor, level: int, schedule: Schedule, cond: Condition) -> tuple:
        return latents / schedule.at(level)[0], torch.zeros_like(latents)

    def schedule(self, steps: int) -> Schedule:
        return Schedule.from_alpha_bar(torch.linspace(1, 0.01, steps + 1).double()[1:], torch.arange(steps))


MODEL = Identity()


def key(seed: int, pattern: str = "ring", radii: tuple[int, int] = (2, 8), **changes: Any) -> Key:
    """A key in channels 0 and 2; `changes` are those of the model's identity."""
    return make_key(
        "tree-ring",
        (3, 32, 32),
        model=MODEL.identity | changes,
        rng=np.random.default_rng(seed),
        pattern=pattern,
        channels=(0, 2),
        radii=radii,
    )


def samples(noise: torch.Tensor) -> list[Sample]:
    """8-bit pictures of noise, within ± 4 deviations."""
    return [Sample(str(i), from_array(np.clip(x.numpy() / 4, -1, 1))) for i, x in enumerate(noise)]


def verifier(
    keys=(), *, method: str = "guarded", max_steps: int | None = None, steps: int = 2, model=MODEL, **options: Any
) -> Verifier:
    """A verifier of these keys on the model, of few steps."""
    return Verifier(Recoverer.named(model, method, max_steps, steps), list(keys), **options)
