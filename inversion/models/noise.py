"""The initial noise of a diffusers pipeline, changed between the pipeline's draw and its first step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ringmark.errors import ModelError
from ringmark.inversion.models.families import family_of

__all__ = ["check_noise_stage", "hook", "is_hooked", "unhook", "unhooked"]

PICTURES = ("image", "images", "video", "image_latents", "reference_images", "timestep", "latent_timestep")
"""Parameters of `prepare_latents` in pipelines whose latents do not start as pure noise."""

Before = Callable[[Any, Mapping[str, Any]], None]
Change = Callable[[Tensor], Tensor]


class _Hook(NamedTuple):
    before: Before
    change: Change


class _Hooked:
    """The base, before its own class, of a pipeline with a hook. A copy of the pipeline keeps the hook."""

    plain: ClassVar[type]
    noise_hook: ClassVar[_Hook]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = super().__call__  # type: ignore[misc]  # the pipeline's
        bound = inspect.signature(call).bind(*args, **kwargs)
        bound.apply_defaults()
        self.noise_hook.before(self, bound.arguments | bound.arguments.get("kwargs", {}))
        return call(*args, **kwargs)

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        prepare = super().prepare_latents  # type: ignore[misc]  # the pipeline's
        prepared = prepare(*args, **kwargs)
        given = inspect.signature(prepare).bind(*args, **kwargs).arguments
        size = (given["height"], given["width"])
        if isinstance(prepared, tuple):
            return (_changed(self, prepared[0], size), *prepared[1:])
        return _changed(self, prepared, size)


def _changed(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Latents as the loop of the pipeline takes them, for a picture of this size (H, W), changed by the hook."""
    family = family_of(pipe)
    multiple = int(pipe.vae_scale_factor) * family.patch  # pipelines that pack latents round sides down to it
    height, width = (int(side) // multiple * family.patch for side in size)
    scale = getattr(pipe.scheduler, "init_noise_sigma", 1.0)
    noise = family.unpack(latents, (height, width)).float() / scale
    return family.pack(pipe.noise_hook.change(noise) * scale).to(latents)


def check_noise_stage(pipe: Any) -> None:
    """Raises ModelError unless the pipeline's `prepare_latents` draws pure noise."""
    name = type(pipe).__name__
    if not hasattr(pipe, "prepare_latents"):
        raise ModelError("model.no-noise", "has no prepare_latents method to draw its noise", subject=name)
    if set(inspect.signature(pipe.prepare_latents).parameters) & set(PICTURES):
        fact = "starts from an image: its latents are not pure noise, so changes of the noise are mostly lost"
        raise ModelError("model.from-picture", fact, subject=name)


def is_hooked(pipe: Any) -> bool:
    """Whether a hook changes this pipeline's noise."""
    return isinstance(pipe, _Hooked)


def hook(pipe: Any, *, change: Change, before: Before) -> None:
    """Change the initial noise of every call of this pipeline, whose class becomes a subclass of its present one.

    `before(pipe, arguments)` is called first, with the arguments of the call, including defaults. Then the pipeline
    draws its noise as before, or takes the `latents` that it is given. This noise, unpacked to (B, C, h, w) in float32
    and of unit variance, is replaced by `change(noise)`. Raises ModelError for a pipeline that does not start from pure
    noise or belongs to no supported family.
    """
    check_noise_stage(pipe)
    family_of(pipe)
    plain = type(pipe)
    body = {"plain": plain, "noise_hook": _Hook(before, change)}
    body |= {"__module__": plain.__module__, "__doc__": plain.__doc__}
    pipe.__class__ = type(plain.__name__, (_Hooked, plain), body)


def unhook(pipe: Any) -> None:
    """Undo `hook`."""
    pipe.__class__ = pipe.plain


def unhooked(pipe: Any) -> Any:
    """A shallow copy of a pipeline, of the same modules, without a hook."""
    other = copy.copy(pipe)
    if is_hooked(other):
        unhook(other)
    return other
