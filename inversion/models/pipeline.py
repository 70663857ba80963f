"""A diffusers pipeline as maps between images, latents and noise.

This module hides the differences between latent diffusion models: what the network predicts, how latents are scaled and
which noise schedule was trained. Nothing outside `inversion.models` uses diffusers or transformers.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ringmark.errors import ModelError, RingmarkError, counted
from ringmark.inversion.condition import Condition
from ringmark.inversion.models.devices import dtype_of, place, placement, remembering, weights
from ringmark.inversion.models.families import MAX_SIDE, Family, family_of, kind_of, network_of, noise_shape
from ringmark.inversion.models.loading import check_tokenizer, load_pipeline, quiet, resolve, text_pairs
from ringmark.inversion.models.noise import unhooked
from ringmark.inversion.models.samplers import make_sampler
from ringmark.inversion.models.walk import OneCall, Watched, flow_schedule, set_levels, with_scheduler
from ringmark.inversion.noise_recovery import NoiseRecovery
from ringmark.inversion.schedule import Schedule

__all__ = ["PREDICTIONS", "LatentModel", "empty_prompt", "lean"]

LOG = logging.getLogger(__name__)

SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")

Size = tuple[int, int]
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

    Wraps a loaded diffusers pipeline without changing it: `pipe` is a shallow copy with the same modules. `empty` holds
    the pipeline's arguments for the empty prompt; with these, the pipeline needs no text encoder to invert images.

    `image_size` (H, W) and `latent_shape` (C, h, w) are native; `sizes` are the native size and then the usual sizes of
    the family. Latents have `channels` channels, and `factor` image pixels per latent pixel and side. `kind` (family,
    channels, factor) is what keys are bound to; `identity`, recorded in keys and results, adds name and fingerprint.
    `recovery` is how well the model's noise is recovered, if measured. Raises ModelError for an unsupported model.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        name: str,
        recovery: NoiseRecovery | None = None,
        empty: Mapping[str, Any] | None = None,
    ) -> None:
        self.family: Family = family_of(pipe)
        self.name, self.recovery, self._empty = name, recovery, empty
        if objection := self.family.objection(pipe):
            raise ModelError("model.conditioning", objection, subject=name)
        _check_tokenizers(pipe, name)
        self._call = OneCall(pipe.scheduler.config)
        pipe = remembering(unhooked(pipe))
        self.pipe, self._asked = with_scheduler(pipe, pipe.scheduler), with_scheduler(pipe, self._call)
        self.vae, self.network = pipe.vae, network_of(pipe)
        self.prediction = self._prediction()
        height, width = self._native_size()
        self.kind: dict[str, Any] = kind_of(pipe)
        _, self.channels, self.factor = self.kind.values()
        self._check_normalisation()
        self.latent_shape: tuple[int, int, int] = (self.channels, height, width)
        self.image_size: Size = (height * self.factor, width * self.factor)
        usual = self.family.sizes if self.image_size in self.family.sizes else ()
        self.sizes: tuple[Size, ...] = tuple(dict.fromkeys([self.image_size, *usual]))
        self.identity: dict[str, Any] = {"name": name, "fingerprint": self._fingerprint(), **self.kind}

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        loras: Iterable[str | Path] = (),
        device: str = "auto",
        dtype: torch.dtype | None = None,
        text: bool = True,
        empty: Mapping[str, Any] | None = None,
        offload: str | None = None,
    ) -> LatentModel:
        """Load a pipeline as `load_pipeline` does, from safetensors only.

        `device` "auto" is CUDA if available; `dtype` None is float16 on CUDA and float32 on a CPU. Without `text`, only
        the empty prompt can be used, and its `empty_prompt` must be passed as `empty`. `offload` keeps weights in main
        memory until they are needed: whole networks ("model"), or layer by layer ("sequential"). Raises ModelError.
        """
        target, dtype = placement(device, dtype)
        if offload and target.type == "cpu":
            fact = "offloading needs a GPU: on a CPU, the model is in main memory anyway"
            raise ModelError("model.offload", fact, subject=source)
        where = resolve(source)
        path = Path(where)
        name = path.resolve().name if path.is_dir() else path.stem if path.is_file() else where
        with quiet():
            # Wrapped as it is stored and then converted, so that the fingerprint does not depend on the dtype.
            pipe = load_pipeline(where, loras=loras, text=text, dtype=dtype, stored=True)
            model = cls(pipe, name=name, recovery=NoiseRecovery.load(path), empty=empty)
            place(model.pipe, target, dtype, offload)
            # Channels last makes convolutions on large maps faster, but not the network's, on small maps.
            if not model.family.video:
                model.vae.to(memory_format=torch.channels_last)
        return model

    def _prediction(self) -> str:
        """What the network predicts, by diffusers' name. Raises ModelError for what is not supported."""
        scheduler = self.pipe.scheduler
        flows = "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas")
        prediction: str = "flow_prediction" if flows else scheduler.config.get("prediction_type", "epsilon")
        if flows or (prediction in ON_ALPHA_BAR and hasattr(scheduler, "alphas_cumprod")):
            return prediction
        fact = (
            f"its {type(scheduler).__name__} predicts {prediction!r}; "
            f"only {', '.join(ON_ALPHA_BAR)} with a schedule of ᾱ, and rectified flow, are supported"
        )
        raise ModelError("model.prediction", fact, subject=self.name)

    def _native_size(self) -> Size:
        """(h, w) of latents, from the network's config, the pipeline's default or the first of the family's sizes."""
        usual = self.family.sizes[0][0] // int(self.pipe.vae_scale_factor)
        size = self.network.config.get("sample_size", getattr(self.pipe, "default_sample_size", usual))
        sides = size if isinstance(size, (list, tuple)) else [size, size]
        if len(sides) != 2 or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
            fact = (
                f"the sample_size of its network, the sides of its latents, is {str(size)[:40]!r}; "
                f"it must be one or two whole numbers from 1 to {MAX_SIDE}"
            )
            raise ModelError("model.sample-size", fact, subject=self.name)
        return sides[0], sides[1]

    def _check_normalisation(self) -> None:
        """Raises ModelError for an autoencoder whose latents cannot be scaled as it says."""
        try:
            self.family.normalise(self.vae, torch.zeros(1, self.channels, 2, 2))
        except ValueError as error:
            raise ModelError("model.scaling", str(error), subject=self.name) from error

    @torch.inference_mode()
    def _fingerprint(self) -> str:
        """16 hex digits of a hash over a few values of every tensor, which takes milliseconds, and over the settings.

        The same weights with another prediction type, schedule or scaling of latents are a different model. The text
        encoder, which verification does without, is not part of it.
        """
        schedule = [self.pipe.scheduler.config.get(name) or None for name in SCHEDULE]  # unset and False are the same
        scaling = [self.vae.config.get(n) for n in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")]
        digest = hashlib.sha256(repr([self.prediction, *scaling, *schedule]).encode())
        for module in (self.vae, self.network):
            for key, p in sorted(module.state_dict().items()):
                flat = p.detach().flatten()
                values = flat[:: max(1, flat.numel() // 8)][:8].float().cpu().contiguous()
                digest.update(key.encode() + values.numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        device: torch.device = self.pipe._execution_device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network."""
        return dtype_of(self.network)

    def noise_shape(self, size: Size) -> tuple[int, int, int]:
        """(C, h, w) of the noise of a picture (H, W). Raises ModelError for a size that the model cannot draw."""
        return noise_shape(size, subject=self.name, **self.kind)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → (B, C, h, w): the posterior mean, scaled as the network expects it."""
        return self._autoencode(self._encode, images)

    def _encode(self, pixels: Tensor) -> Tensor:
        out = self.vae.encode(pixels.unsqueeze(2) if self.family.video else pixels)
        z: Tensor = out.latent_dist.mode() if hasattr(out, "latent_dist") else out[0]
        return self.family.normalise(self.vae, z.squeeze(2) if self.family.video else z)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) → (B, 3, H, W), about [-1, 1], not clipped."""
        return self._autoencode(self._decode, latents)

    def _decode(self, latents: Tensor) -> Tensor:
        z = self.family.denormalise(self.vae, latents)
        images: Tensor = self.vae.decode(z.unsqueeze(2) if self.family.video else z, return_dict=False)[0]
        return images.squeeze(2) if self.family.video else images

    def _autoencode(self, half: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`half` of the autoencoder on x, in its dtype, or in float32 if float16 is too narrow for it."""
        dtype = dtype_of(self.vae)
        narrow = dtype is torch.float16
        # Pipelines that can widen the autoencoder do so if its config asks for it; all configs of old ask for it.
        if narrow and hasattr(self.pipe, "upcast_vae") and self.vae.config.get("force_upcast"):
            return self._widened()._autoencode(half, x)
        out = half(x.to(self.device, dtype))
        if narrow and x.isfinite().all() and not out.isfinite().all():
            return self._widened()._autoencode(half, x)
        return out

    def _widened(self) -> LatentModel:
        """This model, whose autoencoder is from now on a copy in float32; that of the pipeline stays as it is."""
        LOG.warning("%s: its autoencoder overflows in float16 and runs in float32 from now on", self.name)
        with quiet():
            wide = type(self.vae).from_config(self.vae.config)
            wide.load_state_dict(weights(self.vae))
            self.vae = wide.to(self.device, torch.float32).requires_grad_(False).eval()
        return self

    def lean(self) -> AbstractContextManager[None]:
        """Context in which gradients of `decode` need less memory: see `lean`."""
        return lean(self.vae)

    @torch.inference_mode()
    def condition(self, prompts: list[str], *, guidance: float = 1.0, negative: str = "") -> Condition:
        """Prompts as the network takes them, one row each; long prompts are truncated.

        `guidance` is the scale of classifier-free guidance away from the `negative` prompt; 1 turns it off. Raises
        ModelError for a model that was loaded without text encoders.
        """
        family = self.family
        if not any(part for name, part in self.pipe.components.items() if name.startswith("text_encoder")):
            raise ModelError(
                "model.no-text", "was loaded without the text encoders that prompts need", subject=self.name
            )
        with quiet():
            rows = dict(family.encode(self.pipe, prompts))
        scale = family.unguided if guidance == 1 else guidance
        if family.negative and scale != family.unguided:
            away = Condition(self.empty if negative == "" else family.negative(self.pipe, [negative]))
            rows |= {f"negative_{name}": values for name, values in away.expand(len(prompts)).rows.items()}
        return Condition(rows, {family.guidance: scale, **family.options})

    @cached_property
    @torch.inference_mode()
    def empty(self) -> Mapping[str, Any]:
        """The pipeline's arguments for the empty prompt, of one row."""
        if self._empty is not None:
            return {name: _moved(values, self.device, self.dtype) for name, values in self._empty.items()}
        with quiet():
            return (self.family.negative or self.family.encode)(self.pipe, [""])

    @property
    def nothing(self) -> Condition:
        """The condition of the empty prompt without guidance, of one row."""
        family = self.family
        return Condition(self.empty, {family.guidance: family.unguided, **family.options})

    def predict(self, latents: Tensor, level: int, schedule: Schedule, cond: Condition) -> tuple[Tensor, Tensor]:
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
        device = self.device
        z = latents.to(device, torch.promote_types(latents.dtype, torch.float32))
        out = self._output(latents.to(device, self.dtype), schedule.timestep(level), cond)
        return PREDICTIONS[self.prediction](z, out.to(z.dtype), signal, noise)

    def _output(self, latents: Tensor, timestep: int | float, cond: Condition) -> Tensor:
        """The network's output (B, C, h, w) after guidance, by one call of the pipeline."""
        self._call.at = timestep
        self._asked(num_inference_steps=1, **self._arguments(latents, cond))
        return self.family.unpack(self._call.output, (latents.shape[-2], latents.shape[-1]))

    def _arguments(self, latents: Tensor, cond: Condition) -> dict[str, Any]:
        """The arguments of a call of the pipeline that starts from these latents."""
        height, width = (side * self.factor for side in latents.shape[-2:])
        given = (self.family.given or self.family.pack)(latents)
        size = {"height": height, "width": width, "output_type": "latent"}
        return {"latents": given, **size, **cond.rows, **cond.options}

    def draw(
        self,
        noise: Tensor,
        cond: Condition,
        *,
        steps: int,
        sampler: str | None = None,
        generators: list[torch.Generator] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(noise, latents), each (B, C, h, w) in float32, as `pipe` draws them from unit normal noise of that shape.

        The noise returned is what reached the first step, after any hook of `pipe`. `sampler` is one of `SAMPLERS`, by
        default the model's own; `generators`, one per picture, are for samplers that add noise. Raises ModelError.
        """
        height, width = noise.shape[-2:]
        watched = Watched(self.sampler(sampler, steps, (height * self.factor, width * self.factor)))
        arguments = self._arguments(noise.to(self.device, self.dtype), cond)
        with_scheduler(self.pipe, watched.scheduler)(num_inference_steps=steps, generator=generators, **arguments)
        first, last = (self.family.unpack(z, (height, width)).float() for z in (watched.first, watched.last))
        return first / getattr(watched.scheduler, "init_noise_sigma", 1.0), last

    def sampler(self, name: str | None, steps: int, size: Size | None = None) -> Any:
        """The scheduler named in `SAMPLERS`, or a copy of the pipeline's own, set to `steps` steps for pictures (H, W).

        Raises ModelError if it does not exist or the pipeline cannot use it.
        """
        self._check_steps(steps)
        own, flow = self.pipe.scheduler, self.prediction == "flow_prediction"
        scheduler = make_sampler(name, own, flow=flow) if name else copy.deepcopy(own)
        try:
            set_levels(self._asked, scheduler, steps, **self._blank(size))
        except (AssertionError, TypeError, ValueError) as error:
            if isinstance(error, RingmarkError):
                raise
            reason = str(error) or "they shift time differently"
            fact = f"does not work with {type(scheduler).__name__} in {counted(steps, 'step')} ({reason})"
            raise ModelError("model.sampler", fact, subject=self.name) from error
        return scheduler

    def _blank(self, size: Size | None) -> dict[str, Any]:
        """The arguments of a call of the pipeline without noise and prompt, for a picture (H, W)."""
        latents = torch.zeros(1, *self.noise_shape(size or self.image_size), device=self.device, dtype=self.dtype)
        return self._arguments(latents, self.nothing)

    def _check_steps(self, steps: int) -> int:
        """The largest number of steps. Raises ModelError for a larger one."""
        most: int = self.pipe.scheduler.config.get("num_train_timesteps", 1000)
        if not 1 <= steps <= most:
            fact = f"the number of steps must be from 1 to {most}, not {steps}"
            raise ModelError("model.steps", fact, subject=self.name, most=most)
        return most

    def schedule(self, steps: int, size: Size | None = None) -> Schedule:
        """The levels of a sampler with this many steps, spaced as in the model's scheduler. Raises ModelError.

        The sampler is DDIM on a schedule of ᾱ, and Euler for rectified flow, where the levels may depend on the `size`
        (H, W) of the picture.
        """
        most = self._check_steps(steps)
        try:
            if self.prediction == "flow_prediction":
                return flow_schedule(self._asked, self.pipe.scheduler, steps, **self._blank(size))
            return self._ddim(steps)
        except ValueError as error:
            fact = f"its schedule does not work with {steps} steps ({error})"
            raise ModelError("model.steps", fact, subject=self.name, most=most) from error

    def _ddim(self, steps: int) -> Schedule:
        from diffusers import DDIMScheduler

        ddim = DDIMScheduler.from_config(self.pipe.scheduler.config)
        ddim.set_timesteps(steps)
        return Schedule.from_alpha_bar(ddim.alphas_cumprod, ddim.timesteps, float(ddim.final_alpha_cumprod))


@torch.inference_mode()
def empty_prompt(
    source: str | Path,
    *,
    loras: Iterable[str | Path] = (),
    device: str = "auto",
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """`LatentModel.empty` of this model, on the CPU; loads only its text encoders. Raises ModelError."""
    target, dtype = placement(device, dtype)
    pipe = load_pipeline(source, loras=loras, network=False, dtype=dtype)
    with quiet():
        place(pipe, target, dtype)
        family = family_of(pipe)
        rows = (family.negative or family.encode)(pipe, [""])
    return {name: _moved(values, torch.device("cpu"), dtype) for name, values in rows.items()}


def _moved(values: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Rows of a condition on this device; numbers that are not whole in this dtype."""
    if isinstance(values, list):
        return [_moved(value, device, dtype) for value in values]
    return values.to(device, dtype if values.is_floating_point() else values.dtype)


def _check_tokenizers(pipe: Any, name: str) -> None:
    """Raises ModelError if a tokenizer has tokens for which its text encoder has no embedding."""
    for tokenizer, encoder in text_pairs(pipe.components):
        try:
            check_tokenizer(tokenizer, encoder)
        except ValueError as error:
            raise ModelError("model.damaged", str(error), subject=name) from error


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
