"""From pictures to the noise they were drawn from: decoder inversion, then sampler inversion."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ringmark.errors import RingmarkError
from ringmark.inversion.condition import Condition
from ringmark.inversion.decoder import AT_ONCE, INVERTERS, Autoencoder, Inverter, in_slices
from ringmark.inversion.diffusion import Denoiser, invert
from ringmark.inversion.noise_recovery import NoiseRecovery
from ringmark.inversion.schedule import Schedule
from ringmark.inversion.solve import Solution

__all__ = ["STEPS", "Identified", "Model", "Recovered", "Recoverer", "RecoverySettings", "check_method"]

STEPS = 10
"""Steps of the sampler inversion by default; twenty-five find no more marks (docs/measurements/evaluation.md)."""


class Identified(Protocol):
    """A model by name, identity and kind of latents."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def kind(self) -> dict[str, Any]: ...

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...


class Model(Identified, Autoencoder, Denoiser, Protocol):
    """What recovery needs from a latent diffusion model."""

    @property
    def recovery(self) -> NoiseRecovery | None: ...

    @property
    def image_size(self) -> tuple[int, int]: ...

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]: ...

    @property
    def factor(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def nothing(self) -> Condition: ...

    def noise_shape(self, size: tuple[int, int]) -> tuple[int, int, int]: ...

    def schedule(self, steps: int, size: tuple[int, int] | None = None) -> Schedule: ...


@dataclass(frozen=True)
class RecoverySettings:
    """Everything that recovered noise depends on besides the picture.

    `model` is the model's identity, `image_size` (H, W) that of the pictures, `dtype` the network's. `method`,
    `max_steps`, `early`, `gradient` and `lean` describe the decoder inversion as in `Inverter`. `steps` is the number
    of steps of the sampler inversion, `timesteps` its first and last timestep, as in "1-961", or "" without steps.
    """

    model: dict[str, Any]
    image_size: tuple[int, int]
    dtype: str
    method: str
    max_steps: int
    early: bool
    gradient: bool
    lean: bool
    steps: int
    timesteps: str

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON."""
        return asdict(self) | {"image_size": list(self.image_size)}

    def of_latents(self) -> dict[str, Any]:
        """The settings that the latents depend on."""
        return {name: value for name, value in self.as_dict().items() if name not in ("steps", "timesteps")}

    def of_noise(self) -> dict[str, Any]:
        """The settings that the noise depends on, given the latents."""
        values = self.as_dict()
        return {name: values[name] for name in ("steps", "timesteps", "model", "dtype")}


@dataclass(frozen=True)
class Recovered:
    """A batch of pictures with their recovered noise.

    `images` (B, 3, H, W) in [-1, 1]; `solution` of the decoder inversion, with the latents as its value; `noise`
    (B, C, h, w) float32 on the CPU, not finite if the inversion overflowed; `seconds` of computing time per image.
    """

    images: Tensor
    solution: Solution
    noise: Tensor
    seconds: float


class Recoverer:
    """Recovers latents and initial noise of pictures, with the empty prompt and without guidance.

    `inverter` inverts the decoder; `steps` is the number of steps of the naive sampler inversion. Without steps, the
    latents stand for the noise: they are what the noise became, and still correlate with it. Raises ModelError if the
    model's schedule does not work with this number.
    """

    def __init__(self, model: Model, inverter: Inverter = INVERTERS["operator"], steps: int = STEPS) -> None:
        self.model, self.inverter, self.steps = model, inverter, steps
        self._schedules = {model.image_size: model.schedule(steps)} if steps else {}
        self._nothing = model.nothing

    @classmethod
    def named(cls, model: Model, method: str, max_steps: int | None = None, steps: int = STEPS) -> Recoverer:
        """A recoverer with one of INVERTERS by name. Raises RingmarkError for an unknown name."""
        check_method(method)
        return cls(model, Inverter.named(method, max_steps), steps)

    @property
    def settings(self) -> RecoverySettings:
        """The settings that the recovered noise depends on, for pictures of the model's native size."""
        return self.settings_at(self.model.image_size)

    def settings_at(self, size: tuple[int, int]) -> RecoverySettings:
        """The settings for pictures (H, W)."""
        timesteps = self.schedule(size).timesteps.tolist() if self.steps else []
        return RecoverySettings(
            model=self.model.identity,
            image_size=size,
            dtype=str(self.model.dtype),
            method=repr(self.inverter.method),
            max_steps=self.inverter.max_steps,
            early=self.inverter.early,
            gradient=self.inverter.gradient,
            lean=self.inverter.lean,
            steps=self.steps,
            timesteps=f"{timesteps[0]:g}-{timesteps[-1]:g}" if timesteps else "",
        )

    def schedule(self, size: tuple[int, int]) -> Schedule:
        """The levels of the sampler for pictures (H, W)."""
        if size not in self._schedules:
            self._schedules[size] = self.model.schedule(self.steps, size)
        return self._schedules[size]

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] → the encoder's latents E(x), where every inversion starts."""
        return in_slices(self.model.encode, AT_ONCE)(images.to(self.model.device))

    def latents(self, images: Tensor, encoded: Tensor | None = None) -> Solution:
        """Images (B, 3, H, W) in [-1, 1] → the latents they were decoded from, with the solver's log.

        `encoded` is E(x) if it is known already.
        """
        return self.inverter(self.model, images.to(self.model.device), encoded)

    @torch.inference_mode()
    def noise(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) of any size → the initial noise they were drawn from, float32 on the CPU."""
        if not self.steps:
            return latents.float().cpu()
        height, width = (side * self.model.factor for side in latents.shape[-2:])
        cond = self._nothing.expand(len(latents))
        return invert(self.model, latents.to(self.model.device), cond, self.schedule((height, width))).float().cpu()

    def __call__(self, images: Tensor, encoded: Tensor | None = None) -> Recovered:
        """Images (B, 3, H, W) in [-1, 1] → latents and noise, from E(x) if it is known already."""
        started = time.perf_counter()
        solution = self.latents(images, encoded)
        noise = self.noise(solution.value)
        seconds = (time.perf_counter() - started) / max(1, len(images))
        return Recovered(images=images, solution=solution, noise=noise, seconds=seconds)


def check_method(name: str) -> None:
    """Raises RingmarkError unless this is one of INVERTERS."""
    if name not in INVERTERS:
        fact = f"unknown decoder inversion; known ones are {', '.join(INVERTERS)}"
        raise RingmarkError("recovery.method-unknown", fact, subject=repr(name))
