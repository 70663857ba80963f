"""What differs between families of latent diffusion models, one record each.

Everything else is left to the pipeline itself: see `walk`. Sizes, channels and normalisation of latents are read from
the model's configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ringmark.errors import ModelError

__all__ = ["FAMILIES", "MAX_SIDE", "Family", "family_of", "kind_of", "network_of", "noise_shape"]


MEGAPIXEL = (
    *((1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216)),
    *((1344, 768), (768, 1344), (1536, 640), (640, 1536)),
)
"""Sizes (H, W) of images of about a megapixel."""


LEAST_MULTIPLE = 8  # the sides that pipelines of diffusers accept, whatever the autoencoder
MAX_SIDE = 2048  # of latents; an image of 16384 pixels per side at a factor of 8


def as_is(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w), which the pipeline does not pack."""
    return latents


def unpacked(latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Latents (B, C, h, w) of a pipeline that does not pack them."""
    return latents


def moments(vae: Any) -> tuple[Any, Any]:
    """(scale, shift) of latents, z = (v − shift) · scale for v of the autoencoder: numbers, or tensors (C, 1, 1).

    From the autoencoder's configuration: scaling_factor and shift_factor, or the mean and deviation of each channel.
    Raises ValueError for numbers that cannot be used.
    """
    config = vae.config
    scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor", 0.0) or 0.0
    for name, value in (("scaling_factor", scale), ("shift_factor", shift)):
        if not isinstance(value, (int, float)) or not math.isfinite(value) or (name == "scaling_factor" and not value):
            raise ValueError(f"the {name} of its autoencoder is {str(value)[:40]!r}; it must be a finite number")
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None or deviation is None:
        return scale, shift
    columns = [torch.tensor(values).view(-1, 1, 1) for values in (mean, deviation)]
    return scale / columns[1], columns[0]


def normalise(vae: Any, v: Tensor) -> Tensor:
    """The autoencoder's latents as the network takes them."""
    scale, shift = (x.to(v) if isinstance(x, Tensor) else x for x in moments(vae))
    return (v - shift) * scale


def denormalise(vae: Any, z: Tensor) -> Tensor:
    """The inverse of `normalise`."""
    scale, shift = (x.to(z) if isinstance(x, Tensor) else x for x in moments(vae))
    return z / scale + shift


def no_objection(pipe: Any) -> str:
    """No objection."""
    return ""


Encode = Callable[[Any, list[str]], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """A family of latent diffusion models in diffusers.

    `pipelines`: class names of its text-to-image pipelines. `encode(pipe, prompts)` returns the pipeline's arguments
    for prompts, one row each. `negative(pipe, prompts)` returns the same for negative prompts, whose arguments have the
    prefix negative_; it is None if guidance needs none. `guidance` is the argument for the scale of guidance,
    `unguided` the value that turns it off; `options` are further arguments. `patch`: the sides of latents are multiples
    of it.

    `pack(latents)` converts latents (B, C, h, w) to the form in the pipeline's loop, `unpack(latents, (h, w))` back;
    `given(latents)` is the form of the pipeline's argument `latents`, if it differs. `normalise` and `denormalise`
    convert between latents of the autoencoder and of the network. `video`: the autoencoder expects a frame axis.
    `sizes`: usual sizes (H, W) in pixels of models whose native size is among them; the first is the native size if
    neither network nor pipeline names one. `objection(pipe)` is the reason why a pipeline of this family cannot be
    used, or "".
    """

    name: str
    pipelines: tuple[str, ...]
    encode: Encode
    negative: Encode | None
    guidance: str = "guidance_scale"
    unguided: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    patch: int = 1
    pack: Callable[[Tensor], Tensor] = as_is
    unpack: Callable[[Tensor, tuple[int, int]], Tensor] = unpacked
    given: Callable[[Tensor], Tensor] | None = None
    normalise: Callable[[Any, Tensor], Tensor] = normalise
    denormalise: Callable[[Any, Tensor], Tensor] = denormalise
    video: bool = False
    sizes: tuple[tuple[int, int], ...] = ()
    objection: Callable[[Any], str] = no_objection


def network_of(pipe: Any) -> Any:
    """The network of a pipeline: its UNet or its transformer."""
    return getattr(pipe, "unet", None) or pipe.transformer


# -- Stable Diffusion ------------------------------------------------------------------------------------------------


def encode_sd(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """The text encoder's last state."""
    embeds, _ = pipe.encode_prompt(
        prompts, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeds}


def objection_sd(pipe: Any) -> str:
    """Networks of SDXL and of inpainting models take more inputs."""
    config = pipe.unet.config
    more = [config.get(k) for k in ("addition_embed_type", "class_embed_type", "num_class_embeds")]
    if any(more) or config.in_channels != pipe.vae.config.latent_channels:
        return "its network needs more inputs than a prompt and latents, as those of SDXL and inpainting models do"
    return ""


STABLE_DIFFUSION = Family(
    name="stable-diffusion",
    pipelines=("StableDiffusionPipeline", "StableDiffusionControlNetPipeline"),
    encode=encode_sd,
    negative=encode_sd,
    sizes=((512, 512), (768, 512), (512, 768), (768, 768)),
    objection=objection_sd,
)

RECTIFIED_FLOW = Family(
    name="rectified-flow",
    pipelines=("RectifiedFlowPipeline",),
    encode=encode_sd,
    negative=encode_sd,
    sizes=((512, 512),),
    objection=objection_sd,
)

# -- Stable Diffusion XL ---------------------------------------------------------------------------------------------


def encode_sdxl(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """Hidden states of both text encoders, and the pooled state of the second."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def negative_sdxl(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """Zeros without a prompt, if the network was trained with them."""
    rows = encode_sdxl(pipe, prompts)
    zeros = not any(prompts) and pipe.config.get("force_zeros_for_empty_prompt", True)
    return {name: torch.zeros_like(values) if zeros else values for name, values in rows.items()}


SDXL = Family(
    name="sdxl",
    pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLControlNetPipeline"),
    encode=encode_sdxl,
    negative=negative_sdxl,
    sizes=(*MEGAPIXEL, (512, 512)),
)


# -- Latents in tokens of 2×2 ----------------------------------------------------------------------------------------


def pack_map(latents: Tensor) -> Tensor:
    """(B, C, h, w) → (B, 4C, h/2, w/2): the 2×2 latents of each patch, channel by channel."""
    return pixel_unshuffle(latents, 2)


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) → tokens (B, hw/4, 4C), one a patch."""
    return pack_map(latents).flatten(2).transpose(1, 2)


def unpack(latents: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `pack` for latents of this size (h, w)."""
    patches = latents.transpose(1, 2).reshape(len(latents), -1, size[0] // 2, size[1] // 2)
    return pixel_shuffle(patches, 2)


# -- Stable Diffusion 3 ----------------------------------------------------------------------------------------------


def encode_sd3(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """Hidden states of the three text encoders, and the pooled states of the first two."""
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


SD3 = Family(
    name="sd3",
    pipelines=("StableDiffusion3Pipeline", "StableDiffusion3ControlNetPipeline"),
    encode=encode_sd3,
    negative=encode_sd3,
    patch=2,
    sizes=MEGAPIXEL,
)

# -- FLUX ------------------------------------------------------------------------------------------------------------


def encode_flux_1(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """T5's hidden states, and CLIP's pooled state."""
    embeds, pooled, _ = pipe.encode_prompt(prompts, None)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


FLUX_1 = Family(
    name="flux.1",
    pipelines=("FluxPipeline", "FluxControlNetPipeline"),
    encode=encode_flux_1,
    negative=None,
    patch=2,
    pack=pack,
    unpack=unpack,
    sizes=MEGAPIXEL,
)


def encode_flux_2(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """Hidden states of some layers of the language model."""
    embeds, _ = pipe.encode_prompt(prompts)
    return {"prompt_embeds": embeds}


def statistics(vae: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the 2×2 patches of latents, each (4C, 1, 1)."""
    variance = vae.bn.running_var + vae.config.batch_norm_eps
    return vae.bn.running_mean.to(z).view(-1, 1, 1), variance.sqrt().to(z).view(-1, 1, 1)


def normalise_flux_2(vae: Any, v: Tensor) -> Tensor:
    """Patches of 2×2 latents less their mean, over their deviation."""
    mean, deviation = statistics(vae, v)
    return pixel_shuffle((pixel_unshuffle(v, 2) - mean) / deviation, 2)


def denormalise_flux_2(vae: Any, z: Tensor) -> Tensor:
    """The inverse of `normalise_flux_2`."""
    mean, deviation = statistics(vae, z)
    return pixel_shuffle(pixel_unshuffle(z, 2) * deviation + mean, 2)


FLUX_2 = Family(
    name="flux.2",
    pipelines=("Flux2Pipeline",),
    encode=encode_flux_2,
    negative=None,
    patch=2,
    pack=pack,
    unpack=unpack,
    given=pack_map,
    normalise=normalise_flux_2,
    denormalise=denormalise_flux_2,
    sizes=MEGAPIXEL,
)

FLUX_2_KLEIN = replace(FLUX_2, pipelines=("Flux2KleinPipeline",), negative=encode_flux_2)

# -- Z-Image ---------------------------------------------------------------------------------------------------------


def encode_z_image(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """A list of tensors (L, W), one a prompt. The pipeline changes the list of prompts that it is given."""
    embeds, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds}


def in_float32(latents: Tensor) -> Tensor:
    """Latents in the only dtype that the pipeline accepts."""
    return latents.float()


Z_IMAGE = Family(
    name="z-image",
    pipelines=("ZImagePipeline", "ZImageControlNetPipeline"),
    encode=encode_z_image,
    negative=encode_z_image,
    unguided=0.0,
    patch=2,
    given=in_float32,
    sizes=MEGAPIXEL,
)

# -- Qwen-Image ------------------------------------------------------------------------------------------------------


def encode_qwen_image(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """The language model's hidden states and their mask, which the pipeline leaves out if it is all ones."""
    embeds, mask = pipe.encode_prompt(prompts)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
    return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}


QWEN_IMAGE = Family(
    name="qwen-image",
    pipelines=("QwenImagePipeline", "QwenImageControlNetPipeline"),
    encode=encode_qwen_image,
    negative=encode_qwen_image,
    guidance="true_cfg_scale",
    patch=2,
    pack=pack,
    unpack=unpack,
    video=True,
    sizes=MEGAPIXEL,
)

# -- Sana and PixArt-Σ -----------------------------------------------------------------------------------------------


def encode_sana(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """After the instruction that the pipeline puts before every prompt unless told otherwise."""
    from diffusers import SanaPipeline

    instruction = signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    embeds, mask, *_ = pipe.encode_prompt(prompts, False, complex_human_instruction=instruction)
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def negative_sana(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """Without the instruction."""
    embeds, mask, *_ = pipe.encode_prompt(prompts, False)
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def encode_pixart(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """T5's hidden states of the cleaned prompt, and their mask."""
    embeds, mask, *_ = pipe.encode_prompt(prompts, False, clean_caption=True)
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


SANA = Family(
    name="sana",
    pipelines=("SanaPipeline", "SanaControlNetPipeline"),
    encode=encode_sana,
    negative=negative_sana,
    options={"use_resolution_binning": False, "negative_prompt": None},
    sizes=MEGAPIXEL,
)

PIXART_SIGMA = Family(
    name="pixart-sigma",
    pipelines=("PixArtSigmaPipeline",),
    encode=encode_pixart,
    negative=encode_pixart,
    options={"use_resolution_binning": False, "negative_prompt": None},
    patch=2,
    sizes=MEGAPIXEL,
)

FAMILIES: tuple[Family, ...] = (
    *(STABLE_DIFFUSION, RECTIFIED_FLOW, SDXL, SD3, FLUX_1, FLUX_2, FLUX_2_KLEIN),
    *(Z_IMAGE, QWEN_IMAGE, SANA, PIXART_SIGMA),
)


def family_of(pipe: Any) -> Family:
    """The family of a pipeline or of a pipeline class. Raises ModelError if it belongs to none."""
    names = [kind.__name__ for kind in (pipe if isinstance(pipe, type) else type(pipe)).__mro__]
    for name in names:
        for family in FAMILIES:
            if name in family.pipelines:
                return family
    known = ", ".join(family.pipelines[0] for family in FAMILIES)
    fact = (
        f"belongs to no supported family, so its prompts and the packing of its latents are unknown "
        f"(supported pipelines: {known})"
    )
    raise ModelError("model.family", fact, subject=names[0])


def kind_of(pipe: Any) -> dict[str, Any]:
    """The kind of latents of a pipeline: its family, their channels, and pixels per latent and side (factor)."""
    config = pipe.vae.config
    channels = config.get("latent_channels") or config.get("z_dim")
    return {"family": family_of(pipe).name, "channels": channels, "factor": int(pipe.vae_scale_factor)}


def noise_shape(
    size: tuple[int, int], *, family: str, channels: int, factor: int, subject: object
) -> tuple[int, int, int]:
    """(C, h, w) of the noise of pictures (H, W) for the kind of latents with these fields (see `kind_of`).

    Raises ModelError about `subject` for a size that such models cannot draw.
    """
    patch = max((one.patch for one in FAMILIES if one.name == family), default=1)
    multiple = math.lcm(factor * patch, LEAST_MULTIPLE)
    height, width = size
    if not all(side > 0 and side % multiple == 0 for side in size):
        fact = f"needs images with sides that are multiples of {multiple} pixels, not {width}x{height}"
        raise ModelError("model.size", fact, subject=subject, multiple=multiple)
    if max(size) > (longest := MAX_SIDE * factor):
        fact = f"needs images with sides of at most {longest} pixels, not {width}x{height}"
        raise ModelError("model.too-large", fact, subject=subject, longest=longest)
    return channels, height // factor, width // factor
