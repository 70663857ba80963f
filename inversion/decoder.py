"""Decoder inversion: the latent that a decoder turned into an image.

With E the encoder, D the decoder and x the image, T(z) = E(D(z)) − E(x) is zero at the latent we look for, and
z₀ = E(x) is near it (arXiv 2409.18442). No gradient is taken, so nothing is stored but the iterates.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from ringmark.inversion.methods import Adam, Anderson, ForwardStep, InertialKM
from ringmark.inversion.solve import Method, Residual, Solution, Status, norms, solve

__all__ = [
    "INVERTERS",
    "Inverter",
    "decoder_residual",
    "fall",
    "gradient_residual",
    "in_slices",
    "invert_decoder",
    "invert_decoder_by_gradient",
    "quantisation_level",
    "rounding_share",
]

Map = Callable[[Tensor], Tensor]

GREY_LEVEL = 2 / 255  # one step of an 8-bit image whose range is [-1, 1]


@torch.inference_mode()
def invert_decoder(
    encode: Map,
    decode: Map,
    images: Tensor,
    method: Method = Anderson(),
    *,
    max_steps: int = 8,
    tol: float | Tensor | Literal["auto"] | None = "auto",
    pixels: tuple[float, float] = (-1.0, 1.0),
    at_once: int = 2,
    guarded: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Solution:
    """Latents z with E(D(z)) = E(x) for images x (B, 3, H, W); `max_steps=0` is the encoder alone.

    Works for any two maps. D is cut to the range of `pixels`, as x was when it became a picture: where x is white, D(z)
    may be whiter. Each image keeps the iterate with the smallest pixel residual ‖D(z) − x‖, which every evaluation
    yields for free; a step costs one E and one D. `tol="auto"` stops an image once ‖T‖ has fallen to what rounding x
    to 8 bits alone causes (the discrepancy principle): iterating past it fits the rounding noise.

    With `guarded` an image keeps E(x) where more than twice as much of ‖T‖ is left after two steps as for the picture
    D(E(x)), which a latent is known to decode to, or where nothing has fallen at all. No latent decodes to a picture that
    was altered afterwards: what was added lies much in directions that E∘D shrinks, where ‖T‖ falls slowly, and undoing
    the shrinking would blow it up.

    The maps are called on `at_once` images at most, which bounds their memory whatever B is. A video (B, 3, F, H, W)
    with maps for single frames is inverted frame by frame: the value is (B, C, F, h, w), and residuals, steps and
    status are those of the B·F frames.
    """
    if images.ndim == 5:
        frames = images.transpose(1, 2).flatten(0, 1)
        found = invert_decoder(
            encode, decode, frames, method, max_steps=max_steps, tol=tol, pixels=pixels, at_once=at_once, guarded=guarded, progress=progress
        )  # fmt: skip
        return replace(found, value=found.value.unflatten(0, (len(images), -1)).transpose(1, 2))
    encode, decode = in_slices(encode, at_once), in_slices(decode, at_once)
    target = encode(images)
    images = images.to(target.device)
    if isinstance(tol, str):
        tol = quantisation_level(encode, images, target) if max_steps else None
    residual = decoder_residual(encode, decode, images, target, pixels)
    found = solve(residual, target, method, max_steps=max_steps, tol=tol, progress=progress)
    if max_steps and guarded:
        drawn = decode(target).clamp(*pixels)
        own = invert_decoder(
            encode, decode, drawn, method, max_steps=min(WITHIN, max_steps), tol=None, pixels=pixels, at_once=at_once
        )
        left = fall(found)
        found = _keep_start(found, target.float(), (left > SLOWER * fall(own)) | (left >= 1))
    if max_steps and target.dtype.itemsize < 4:
        coarse = rounding_share(encode, images, target).cpu() > COARSE
        told = [c and s is not Status.START_KEPT for c, s in zip(coarse, found.status, strict=True)]
        found = replace(found, status=[Status.ROUNDED if t else s for t, s in zip(told, found.status, strict=True)])
    return found


SLOWER, WITHIN = 2.0, 2  # see scripts/study_altered.py


def fall(found: Solution) -> Tensor:
    """(B,): what is left of ‖T‖ after WITHIN steps, as a share of the first."""
    return found.residuals[: WITHIN + 1].nan_to_num(torch.inf).amin(0) / found.residuals[0]


def _keep_start(found: Solution, start: Tensor, kept: Tensor) -> Solution:
    """The same, but with the start's own value where `kept` (B,)."""
    value = torch.where(kept.to(start.device).view(-1, *[1] * (start.ndim - 1)), start, found.value)
    status = [Status.START_KEPT if k else s for k, s in zip(kept, found.status, strict=True)]
    return replace(found, value=value, status=status, chosen=torch.where(kept, 0, found.chosen))


def decoder_residual(
    encode: Map, decode: Map, images: Tensor, target: Tensor, pixels: tuple[float, float] = (-1.0, 1.0)
) -> Residual:
    """T(z) = E(D(z)) − E(x) with error D(z) − x, D cut to the range of `pixels`; E(x) is `target`."""

    def residual(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        decoded = decode(z.to(target.dtype)).clamp(*pixels)
        return encode(decoded).float() - target[rows].float(), (decoded - images[rows]).float()

    return residual


def in_slices(map_: Map, size: int) -> Map:
    """The same map, called on at most `size` samples at once."""
    return lambda x: torch.cat([map_(part) for part in x.split(size)])


def quantisation_level(encode: Map, images: Tensor, target: Tensor, draws: int = 3) -> Tensor:
    """σ_q (B,): median over `draws` of ‖E(x + u) − E(x)‖, u uniform over ± half a grey level; E(x) is `target`.

    The same u serves every image, so that an image's level does not depend on its batch.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.stack([_spread(encode, images, target, generator, 1.0) for _ in range(draws)]).median(0).values


COARSE = 0.5  # 1/8 were E exact


def rounding_share(encode: Map, images: Tensor, target: Tensor) -> Tensor:
    """(B,): how much of σ_q is left when u is an eighth as large: 1/8 for an exact E, about 1 where rounding rules.

    In 16 bit E(x + u) also differs from E(x) by the rounding of every layer, whatever the size of u. Above one half
    what is below the noise of an 8-bit image is lost in it, and 32-bit maps would come nearer.
    """
    at = lambda size: _spread(encode, images, target, torch.Generator().manual_seed(0), size)
    return at(1 / 8) / at(1.0)


def _spread(encode: Map, images: Tensor, target: Tensor, generator: torch.Generator, size: float) -> Tensor:
    """(B,): ‖E(x + u) − E(x)‖, u uniform over ± `size` half grey levels."""
    u = (torch.rand(images[:1].shape, generator=generator) - 0.5) * GREY_LEVEL * size
    return norms((encode(images + u.to(images)) - target).float())


def gradient_residual(decode: Map, images: Tensor) -> Residual:
    """∇_z Σ(D(z) − x)² with error D(z) − x: the baseline's residual. It stores the decoder's whole graph."""

    def residual(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            z = z.clone().requires_grad_()  # a clone, since the start may have been made in inference mode
            error = decode(z).float() - images[rows]
            loss = error.square().sum()
            (gradient,) = torch.autograd.grad(loss, z)
        return gradient, error.detach()

    return residual


def invert_decoder_by_gradient(
    decode: Map, images: Tensor, start: Tensor, method: Method | None = None, *, max_steps: int = 50
) -> Solution:
    """The gradient baseline of arXiv 2409.18442 from `start` (the encoder's latents): Adam at 0.1, scheduled, unless told otherwise.

    For a decoder that computes in 16 bit by autocast and stores less by activation checkpointing see `inversion.model.lean`.
    """
    method = Adam(lr=0.1, horizon=max_steps) if method is None else method
    return solve(gradient_residual(decode, images.to(start.device)), start, method, max_steps=max_steps)


class Autoencoder(Protocol):
    """What an inverter needs of a model."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def lean(self) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Inverter:
    """A way to invert a model's decoder: (model, images (B, 3, H, W)) → Solution.

    `method` and `max_steps` as in `invert_decoder`. With `early` False every step is taken; with `gradient` the method
    descends the pixels' squared error instead, which is the baseline; with `lean` in bfloat16 and with activation
    checkpointing. `guarded` as in `invert_decoder`.
    """

    method: Method = field(default_factory=Anderson)
    max_steps: int = 8
    early: bool = True
    gradient: bool = False
    lean: bool = False
    guarded: bool = False

    def __call__(self, model: Autoencoder, images: Tensor) -> Solution:
        tol = "auto" if self.early else None
        if not self.gradient:
            return invert_decoder(
                model.encode, model.decode, images, self.method, max_steps=self.max_steps, tol=tol, guarded=self.guarded
            )
        with torch.inference_mode():
            start = model.encode(images)
        with model.lean() if self.lean else nullcontext():
            return invert_decoder_by_gradient(model.decode, images, start, self.method, max_steps=self.max_steps)

    @classmethod
    def named(cls, name: str, max_steps: int | None = None) -> Inverter:
        """One of INVERTERS, with other steps if given; Adam's schedule spans them. KeyError for another name."""
        found = INVERTERS[name]
        if max_steps is None or name == "encoder":
            return found
        schedule = isinstance(found.method, Adam) and found.method.horizon
        method = replace(found.method, horizon=max(1, max_steps)) if schedule else found.method
        return replace(found, method=method, max_steps=max_steps)


INVERTERS = {
    "encoder": Inverter(max_steps=0),
    "forward": Inverter(ForwardStep(), 12),
    "km": Inverter(InertialKM(), 20),
    "adam": Inverter(Adam(horizon=50), 50, early=False),
    "anderson": Inverter(),
    "guarded": Inverter(max_steps=2, early=False, guarded=True),
    "gradient": Inverter(Adam(lr=0.1, horizon=50), 50, early=False, gradient=True),
    "gradient-lean": Inverter(Adam(lr=0.1, horizon=50), 50, early=False, gradient=True, lean=True),
}
"""By the names that commands use: the encoder alone, fixed-point methods, and the gradient baseline. Adam and the
gradient run as in arXiv 2409.18442: every step of their schedule. Anderson comes nearest to the latents of a picture
as it was decoded; guarded, which takes two of its steps, finds marks in pictures that may have been altered since."""
