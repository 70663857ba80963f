"""The one adapter to diffusers and transformers.

Everything that differs between latent diffusion models ends here: what the network predicts, how latents are scaled,
which noise schedule was trained. Nothing else in the project knows.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ringmark.errors import ModelError
from ringmark.inversion.metrics import NoiseRecovery
from ringmark.inversion.schedule import Grid

__all__ = ["LatentModel", "ModelError", "lean", "resolve"]

POCKET = Path(__file__).resolve().parents[2] / "data" / "pocket"
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")


class LatentModel:
    """A latent diffusion model as maps between images, latents and noise.

    `latent_shape` (C, h, w), `image_size` (H, W), `identity` what a key or verdict records of the model, `recovery`
    how well its noise comes back, where that has been measured. Wraps the modules it is given; never copies or changes
    them.
    """

    def __init__(
        self,
        vae: nn.Module,
        unet: nn.Module,
        text_encoder: nn.Module,
        tokenizer,
        scheduler,
        *,
        name: str,
        recovery: NoiseRecovery | None = None,
    ) -> None:
        self.vae, self.unet, self.text_encoder, self.tokenizer, self.scheduler = (
            vae,
            unet,
            text_encoder,
            tokenizer,
            scheduler,
        )
        more = [unet.config.get(k) for k in ("addition_embed_type", "class_embed_type", "num_class_embeds")]
        if any(more) or unet.config.in_channels != vae.config.latent_channels:
            raise ModelError(
                f"{name}: needs more than a prompt and latents (as SDXL and inpainting models do); use a text-to-image model of the Stable Diffusion 1 or 2 kind"
            )
        self.prediction = scheduler.config.get("prediction_type", "epsilon")
        if self.prediction not in PREDICTIONS or not hasattr(scheduler, "alphas_cumprod"):
            raise ModelError(
                f"{name}: its {type(scheduler).__name__} predicts {self.prediction!r}; only {', '.join(PREDICTIONS)} on a schedule of ᾱ are supported"
            )
        self.name, self.recovery = name, recovery
        side = unet.config.sample_size
        if not side:
            raise ModelError(f"{name}: the config of its network gives no sample_size, the side of its latents")
        height, width = (side, side) if isinstance(side, int) else side
        factor = 2 ** (len(vae.config.get("block_out_channels", vae.config.get("decoder_block_out_channels"))) - 1)
        self.latent_shape = (vae.config.latent_channels, height, width)
        self.image_size = (height * factor, width * factor)
        self.scale = vae.config.scaling_factor
        self.shift = vae.config.get("shift_factor") or 0.0
        self.identity = {"name": name, "fingerprint": self._fingerprint(), "latent_shape": list(self.latent_shape)}

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None
    ) -> LatentModel:
        """Load "pocket", a diffusers folder or a hub id; safetensors only, nothing is unpickled.

        `device` "auto" is CUDA where there is one; `dtype` None is float16 there and float32 on a CPU. Raises
        ModelError.
        """
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        dtype = dtype or (torch.float16 if place.type == "cuda" else torch.float32)
        where = resolve(source)
        name = Path(where).resolve().name if Path(where).is_dir() else where
        with _quiet():
            model = cls(**_load_parts(where), name=name, recovery=NoiseRecovery.load(Path(where)))
            for module in (model.vae, model.unet, model.text_encoder):
                module.to(place, dtype).requires_grad_(False).eval()
            # Convolutions on large maps are faster with the channels last, the network's on small ones are not.
            model.vae.to(memory_format=torch.channels_last)
        return model

    @classmethod
    def from_pipeline(cls, pipe, *, name: str) -> LatentModel:
        """Wrap the modules of a loaded diffusers pipeline, where and as they are."""
        return cls(pipe.vae, pipe.unet, pipe.text_encoder, pipe.tokenizer, pipe.scheduler, name=name)

    @torch.inference_mode()
    def _fingerprint(self) -> str:
        """Of the weights, from a few values of every tensor, so that it costs milliseconds, and of what they predict.

        The same weights under another prediction type, schedule or scaling of latents are another model.
        """
        schedule = [self.scheduler.config.get(name) or None for name in SCHEDULE]  # not set or False: the same
        digest = hashlib.sha256(repr([self.prediction, self.scale, self.shift, *schedule]).encode())
        for module in (self.vae, self.unet, self.text_encoder):
            # transformers 4 calls the same tensors text_model.…
            for key, p in sorted((k.removeprefix("text_model."), p) for k, p in module.state_dict().items()):
                flat = p.detach().flatten()
                some = flat[:: max(1, flat.numel() // 8)][:8].float().cpu().contiguous()
                digest.update(key.encode() + some.numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → (B, C, h, w): the posterior mean, scaled as the network expects it."""
        out = self.vae.encode(images.to(self.device, self.vae.dtype))
        z = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
        return (z - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) → (B, 3, H, W), about [-1, 1], not clipped."""
        z = latents.to(self.device, self.vae.dtype) / self.scale + self.shift
        return self.vae.decode(z, return_dict=False)[0]

    def lean(self) -> AbstractContextManager[None]:
        """Within it gradients of `decode` need less: see `lean`."""
        return lean(self.vae)

    @torch.inference_mode()
    def embed(self, prompts: list[str]) -> Tensor:
        """(B, L, W) the text encoder's hidden states; a prompt that is too long is cut."""
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self.device)).last_hidden_state

    def eps(self, latents: Tensor, t: int, cond: Tensor) -> Tensor:
        """ε (B, C, h, w) at timestep t, whatever the network predicts (arXiv 2202.00512 for v)."""
        out = self.unet(latents.to(self.device, self.dtype), t, encoder_hidden_states=cond, return_dict=False)[0].to(
            latents.dtype
        )
        if self.prediction == "epsilon":
            return out
        a = float(self.scheduler.alphas_cumprod[t])
        if self.prediction == "v_prediction":
            return a**0.5 * out + (1 - a) ** 0.5 * latents
        return (latents - a**0.5 * out) / (1 - a) ** 0.5

    def grid(self, steps: int) -> Grid:
        """The levels that DDIM walks in this many steps, spaced as the model's scheduler says."""
        from diffusers import DDIMScheduler

        ddim = DDIMScheduler.from_config(self.scheduler.config)
        if not 1 <= steps <= ddim.config.num_train_timesteps:
            raise ModelError(f"{self.name}: steps must lie in 1 … {ddim.config.num_train_timesteps}, not {steps}")
        ddim.set_timesteps(steps)
        try:
            return Grid.from_schedule(ddim.alphas_cumprod, ddim.timesteps, float(ddim.final_alpha_cumprod))
        except (IndexError, ValueError) as error:
            raise ModelError(
                f"{self.name}: its schedule cannot be walked in {steps} steps ({error}); take fewer"
            ) from error


@contextmanager
def lean(vae: nn.Module) -> Iterator[None]:
    """Within it an autoencoder of diffusers computes in bfloat16 by autocast and stores less for gradients.

    Of each block autograd keeps what goes in and computes the rest again (activation checkpointing), where the class
    allows it. Both are switched back at the end.
    """
    again = getattr(vae, "_supports_gradient_checkpointing", False) and not vae.is_gradient_checkpointing
    if again:
        vae.enable_gradient_checkpointing()
    try:
        with torch.autocast(vae.device.type, torch.bfloat16):
            yield
    finally:
        if again:
            vae.disable_gradient_checkpointing()


def resolve(source: str | Path) -> str:
    """Where "pocket", a folder or a hub id is to be loaded from. Raises ModelError for a folder that is no model."""
    folder = POCKET if str(source) == "pocket" else Path(source).expanduser()
    if (folder / "model_index.json").is_file():
        return str(folder)
    if folder.exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise ModelError(
            f'{source}: not a diffusers model (no model_index.json in it); give "pocket", a folder or a hub id'
        )
    return str(source)


def _load_parts(source: str) -> dict:
    from diffusers import DDIMScheduler, ModelMixin, SchedulerMixin, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    def whole(kind, part: str, **dtype: torch.dtype) -> nn.Module:
        module, info = kind.from_pretrained(
            source, subfolder=part, use_safetensors=True, output_loading_info=True, **dtype
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{part}: {len(missing)} of its tensors are missing, {missing[0]} the first")
        return module

    try:
        vae = _kind(UNet2DConditionModel.load_config(source, subfolder="vae"), ModelMixin)
        schedule = DDIMScheduler.load_config(source, subfolder="scheduler")
        tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer")
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError("tokenizer: it has no vocabulary")
        return {
            "vae": whole(vae, "vae", torch_dtype=torch.float32),
            "unet": whole(UNet2DConditionModel, "unet", torch_dtype=torch.float32),
            "text_encoder": whole(CLIPTextModel, "text_encoder", dtype=torch.float32),
            "tokenizer": tokenizer,
            "scheduler": _kind(schedule, SchedulerMixin).from_config(schedule),
        }
    except Exception as error:  # whatever three libraries raise for a file that is missing, damaged or of another kind
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if not Path(source).is_dir():
            reason = f"no such folder, and no model of this name in the cache or within reach on the hub ({reason})"
        raise ModelError(f"{source}: cannot be loaded as a latent diffusion model: {reason}") from error


def _kind(config: dict, base: type) -> type:
    """The class of diffusers that a config names."""
    import diffusers

    name = config.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ValueError(f"{name!r} is no {base.__name__} of diffusers {diffusers.__version__}")
    return kind


@contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars and remarks of the libraries are for their own users; errors still come as exceptions."""
    import diffusers.utils.logging as ours
    import transformers.utils.logging as theirs

    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in (ours, theirs)]
    for log, _, _ in before:
        log.set_verbosity(log.CRITICAL)
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        for log, verbosity, bars in before:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()
