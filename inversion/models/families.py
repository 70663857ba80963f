"""What differs between families of latent diffusion models, one record each.

Everything else is said by the pipeline itself: see `walk`. The sizes, channels and normalisation of latents are read
from the model's own configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ringmark.errors import ModelError

__all__ = ["FAMILIES", "Family", "family_of", "network_of"]


def as_is(pipe: Any, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w), which the pipeline does not pack."""
    return latents


def unpacked(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
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
    """Nothing stands in the way."""
    return ""


@dataclass(frozen=True)
class Family:
    """A family of latent diffusion models in diffusers.

    `pipelines`: class names of its text-to-image pipelines. `encode(pipe, prompts)` returns the pipeline's arguments
    for prompts, one row each; `empty(pipe)` those of the empty prompt if they differ. If `negative`, guidance needs the
    same arguments again, with the prefix negative_. `guidance` is the argument for the scale of guidance, `unguided`
    the value that turns it off; `options` are further arguments. `patch`: the sides of latents are multiples of it.

    `pack(pipe, latents)` turns latents (B, C, h, w) into those of the pipeline's loop, and `unpack(pipe, latents,
    (h, w))` back; `given` is what the pipeline takes as its argument `latents`, if that is something else. `normalise`
    and `denormalise` translate between latents of the autoencoder and of the network. `video`: the autoencoder expects
    a frame axis. `sizes`: usual (H, W) in pixels of models whose native size is among them. `objection(pipe)` says why
    a pipeline of this family cannot be used, or "".
    """

    name: str
    pipelines: tuple[str, ...]
    encode: Callable[[Any, list[str]], dict[str, Any]]
    empty: Callable[[Any], dict[str, Any]] | None = None
    negative: bool = True
    guidance: str = "guidance_scale"
    unguided: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    patch: int = 1
    pack: Callable[[Any, Tensor], Tensor] = as_is
    unpack: Callable[[Any, Tensor, tuple[int, int]], Tensor] = unpacked
    given: Callable[[Any, Tensor], Tensor] | None = None
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
    embeds, _ = pipe.encode_prompt(
        prompts, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeds}


def objection_sd(pipe: Any) -> str:
    config = pipe.unet.config
    more = [config.get(k) for k in ("addition_embed_type", "class_embed_type", "num_class_embeds")]
    if any(more) or config.in_channels != pipe.vae.config.latent_channels:
        return "its network needs more inputs than a prompt and latents, like those of SDXL and inpainting models"
    return ""


STABLE_DIFFUSION = Family(
    name="stable-diffusion",
    pipelines=("StableDiffusionPipeline", "StableDiffusionControlNetPipeline"),
    encode=encode_sd,
    sizes=((512, 512), (768, 512), (512, 768), (768, 768)),
    objection=objection_sd,
)

RECTIFIED_FLOW = Family(
    name="rectified-flow",
    pipelines=("RectifiedFlowPipeline",),
    encode=encode_sd,
    sizes=((512, 512),),
    objection=objection_sd,
)

# -- Stable Diffusion XL ---------------------------------------------------------------------------------------------


def encode_sdxl(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def empty_sdxl(pipe: Any) -> dict[str, Any]:
    """Zeros if the network was trained with zeros for dropped prompts."""
    rows = encode_sdxl(pipe, [""])
    zeros = pipe.config.get("force_zeros_for_empty_prompt", True)
    return {name: torch.zeros_like(values) if zeros else values for name, values in rows.items()}


SDXL = Family(
    name="sdxl",
    pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLControlNetPipeline"),
    encode=encode_sdxl,
    empty=empty_sdxl,
    sizes=(
        *((1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216)),
        *((1344, 768), (768, 1344), (1536, 640), (640, 1536), (512, 512)),
    ),
)


FAMILIES: tuple[Family, ...] = (STABLE_DIFFUSION, RECTIFIED_FLOW, SDXL)


def family_of(pipe: Any) -> Family:
    """The family of a loaded pipeline. Raises ModelError for a pipeline of another kind."""
    names = [kind.__name__ for kind in type(pipe).__mro__]
    for name in names:
        for family in FAMILIES:
            if name in family.pipelines:
                return family
    known = ", ".join(family.pipelines[0] for family in FAMILIES)
    fact = (
        f"is of no supported family: how it encodes prompts and packs latents is not known. "
        f"Supported pipelines are {known}"
    )
    raise ModelError("model.family", fact, subject=names[0])
