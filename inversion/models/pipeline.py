"""A diffusers pipeline as maps between images, latents and noise.

This module hides the differences between latent diffusion models: what the network predicts, how latents are scaled and
which noise schedule was trained. Nothing outside `inversion.models` uses diffusers or transformers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ringmark.errors import ModelError
from ringmark.inversion.models.loading import check_tokenizer, load_parts, quiet, resolve
from ringmark.inversion.noise_recovery import NoiseRecovery
from ringmark.inversion.schedule import Schedule

__all__ = ["PREDICTIONS", "LatentModel", "lean"]

MAX_SIDE = 2048  # of latents; an image of 16384 pixels per side at a factor of 8
SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")

Pair = tuple[Tensor, Tensor]


def from_epsilon(z: Tensor, out: Tensor, signal: float, noise: float) -> Pair:
    """x̂₀ = (z − s ε)/a: undefined without signal."""
    return (z - noise * out) / signal, out


def from_sample(z: Tensor, out: Tensor, signal: float, noise: float) -> Pair:
    """ε̂ = (z − a x₀)/s."""
    return out, (z - signal * out) / noise


def from_v(z: Tensor, out: Tensor, signal: float, noise: float) -> Pair:
    """v = a ε − s x₀ with a² + s² = 1: x̂₀ = a z − s v, ε̂ = s z + a v (arXiv 2202.00512)."""
    return signal * z - noise * out, noise * z + signal * out


def from_velocity(z: Tensor, out: Tensor, signal: float, noise: float) -> Pair:
    """v = ε − x₀ with a + s = 1: x̂₀ = z − s v, ε̂ = z + a v (arXiv 2209.03003)."""
    return z - noise * out, z + signal * out


PREDICTIONS: dict[str, Callable[[Tensor, Tensor, float, float], Pair]] = {
    "epsilon": from_epsilon,
    "v_prediction": from_v,
    "sample": from_sample,
    "flow_prediction": from_velocity,
}
"""Maps (latents, network output, signal, noise) to (x̂₀, ε̂), by diffusers' name of the prediction type."""

ON_ALPHA_BAR = ("epsilon", "v_prediction", "sample")


class LatentModel:
    """A latent diffusion model as maps between images, latents and noise.

    `latent_shape` (C, h, w); `image_size` (H, W); `identity`: name, fingerprint and latent shape, as recorded in keys
    and results; `recovery`: how well its noise is recovered, if that has been measured. The given modules are wrapped,
    neither copied nor changed. Raises ModelError for an unsupported kind of model.
    """

    def __init__(
        self,
        vae: Any,
        unet: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        *,
        name: str,
        recovery: NoiseRecovery | None = None,
    ) -> None:
        self.vae, self.unet, self.text_encoder = vae, unet, text_encoder
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.name, self.recovery = name, recovery
        self.prediction: str = scheduler.config.get("prediction_type", "epsilon")
        self._check_network()
        self._check_scheduler()
        height, width = self._latent_size()
        factor = 2 ** (len(vae.config.get("block_out_channels", vae.config.get("decoder_block_out_channels"))) - 1)
        self.latent_shape: tuple[int, int, int] = (vae.config.latent_channels, height, width)
        self.image_size = (height * factor, width * factor)
        self.scale, self.shift = self._number("scaling_factor"), self._number("shift_factor", 0.0)
        self.identity: dict[str, Any] = {
            "name": name,
            "fingerprint": self._fingerprint(),
            "latent_shape": list(self.latent_shape),
        }

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None
    ) -> LatentModel:
        """Load "pocket", a diffusers folder or a hub id; safetensors only, nothing is unpickled.

        `device` "auto" is CUDA if available; `dtype` None is float16 on CUDA and float32 on a CPU. Raises ModelError.
        """
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        dtype = dtype or (torch.float16 if place.type == "cuda" else torch.float32)
        where = resolve(source)
        name = Path(where).resolve().name if Path(where).is_dir() else where
        with quiet():
            model = cls(**load_parts(where), name=name, recovery=NoiseRecovery.load(Path(where)))
            for module in (model.vae, model.unet, model.text_encoder):
                module.to(place, dtype).requires_grad_(False).eval()
            # Channels last makes convolutions on large maps faster, but not the network's, on small maps.
            model.vae.to(memory_format=torch.channels_last)
        return model

    @classmethod
    def from_pipeline(cls, pipe: Any, *, name: str) -> LatentModel:
        """Wrap the modules of a loaded diffusers pipeline, keeping their device and dtype."""
        try:
            check_tokenizer(pipe.tokenizer, pipe.text_encoder)
        except ValueError as error:
            raise ModelError("model.damaged", str(error), subject=name) from error
        return cls(
            vae=pipe.vae,
            unet=pipe.unet,
            text_encoder=pipe.text_encoder,
            tokenizer=pipe.tokenizer,
            scheduler=pipe.scheduler,
            name=name,
        )

    def _check_network(self) -> None:
        config = self.unet.config
        more = [config.get(k) for k in ("addition_embed_type", "class_embed_type", "num_class_embeds")]
        if any(more) or config.in_channels != self.vae.config.latent_channels:
            fact = "its network needs more inputs than a prompt and latents, like those of SDXL and inpainting models"
            raise ModelError("model.conditioning", fact, subject=self.name)

    def _check_scheduler(self) -> None:
        if self.prediction not in ON_ALPHA_BAR or not hasattr(self.scheduler, "alphas_cumprod"):
            fact = (
                f"its {type(self.scheduler).__name__} predicts {self.prediction!r}; "
                f"only {', '.join(ON_ALPHA_BAR)} on a schedule of ᾱ are supported"
            )
            raise ModelError("model.prediction", fact, subject=self.name)

    def _latent_size(self) -> tuple[int, int]:
        """(h, w) from the network's config."""
        size = self.unet.config.sample_size
        sides = size if isinstance(size, (list, tuple)) else [size, size]
        if len(sides) != 2 or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
            fact = (
                f"the sample_size of its network, the sides of its latents, is {str(size)[:40]!r}; "
                f"it must be one or two whole numbers from 1 to {MAX_SIDE}"
            )
            raise ModelError("model.sample-size", fact, subject=self.name)
        return sides[0], sides[1]

    def _number(self, field: str, default: float | None = None) -> float:
        """A number in the autoencoder's config by which latents are scaled or shifted."""
        value = self.vae.config.get(field) or default
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            fact = f"the {field} of its autoencoder is {str(value)[:40]!r}; it must be a finite number"
            raise ModelError("model.scaling", fact, subject=self.name)
        return value

    @torch.inference_mode()
    def _fingerprint(self) -> str:
        """16 hex digits of a hash over a few values of every tensor, which takes milliseconds, and over the settings.

        The same weights with another prediction type, schedule or scaling of latents are a different model.
        """
        schedule = [self.scheduler.config.get(name) or None for name in SCHEDULE]  # unset and False are the same
        digest = hashlib.sha256(repr([self.prediction, self.scale, self.shift, *schedule]).encode())
        for module in (self.vae, self.unet, self.text_encoder):
            # transformers 4 calls the same tensors text_model.…
            for key, p in sorted((k.removeprefix("text_model."), p) for k, p in module.state_dict().items()):
                flat = p.detach().flatten()
                values = flat[:: max(1, flat.numel() // 8)][:8].float().cpu().contiguous()
                digest.update(key.encode() + values.numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        device: torch.device = self.unet.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.unet.dtype
        return dtype

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → (B, C, h, w): the posterior mean, scaled as the network expects it."""
        out = self.vae.encode(images.to(self.device, self.vae.dtype))
        z: Tensor = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
        return (z - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) → (B, 3, H, W), about [-1, 1], not clipped."""
        z = latents.to(self.device, self.vae.dtype) / self.scale + self.shift
        images: Tensor = self.vae.decode(z, return_dict=False)[0]
        return images

    def lean(self) -> AbstractContextManager[None]:
        """Context in which gradients of `decode` need less memory: see `lean`."""
        return lean(self.vae)

    @torch.inference_mode()
    def embed(self, prompts: list[str]) -> Tensor:
        """The text encoder's hidden states (B, L, W); long prompts are truncated."""
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        states: Tensor = self.text_encoder(ids.to(self.device)).last_hidden_state
        return states

    def predict(self, latents: Tensor, level: int, schedule: Schedule, cond: Tensor) -> tuple[Tensor, Tensor]:
        """(x̂₀, ε̂), each (B, C, h, w), of latents at `level` = 1 … N, for any type of prediction.

        latents = a x̂₀ + s ε̂ with the level's signal and noise. Computed in float32, or in the latents' dtype if
        that is wider. Raises ModelError at a level without signal if the network predicts ε.
        """
        signal, noise = schedule.at(level)
        if signal == 0 and self.prediction == "epsilon":
            fact = (
                f"predicts ε, which does not determine x₀ at timestep {schedule.timestep(level)}, where the signal is 0"
            )
            raise ModelError("model.no-signal", fact, subject=self.name)
        z = latents.to(self.device, torch.promote_types(latents.dtype, torch.float32))
        t = schedule.timestep(level)
        out = self.unet(latents.to(self.device, self.dtype), t, encoder_hidden_states=cond, return_dict=False)[0]
        return PREDICTIONS[self.prediction](z, out.to(z.dtype), signal, noise)

    def schedule(self, steps: int) -> Schedule:
        """The levels of a sampler with this many steps, spaced as in the model's scheduler. Raises ModelError."""
        from diffusers import DDIMScheduler

        ddim = DDIMScheduler.from_config(self.scheduler.config)
        most = ddim.config.num_train_timesteps
        if not 1 <= steps <= most:
            fact = f"the number of steps must be from 1 to {most}, not {steps}"
            raise ModelError("model.steps", fact, subject=self.name, most=most)
        ddim.set_timesteps(steps)
        try:
            return Schedule.from_alpha_bar(ddim.alphas_cumprod, ddim.timesteps, float(ddim.final_alpha_cumprod))
        except ValueError as error:
            fact = f"its schedule does not work with {steps} steps ({error})"
            raise ModelError("model.steps", fact, subject=self.name, most=most) from error


@contextmanager
def lean(vae: Any) -> Iterator[None]:
    """Context in which an autoencoder of diffusers runs in bfloat16 by autocast and stores less for gradients.

    If the class supports it, autograd only keeps the inputs of each block and recomputes the rest (activation
    checkpointing). Both settings are restored at the end.
    """
    checkpointed = getattr(vae, "_supports_gradient_checkpointing", False) and not vae.is_gradient_checkpointing
    if checkpointed:
        vae.enable_gradient_checkpointing()
    try:
        with torch.autocast(vae.device.type, torch.bfloat16):
            yield
    finally:
        if checkpointed:
            vae.disable_gradient_checkpointing()
