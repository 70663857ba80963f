"""Decoder inversion: the latent that a decoder turned into an image.

With encoder E, decoder D and image x, T(z) = E(D(z)) − E(x) is zero at the latent we want, and z₀ = E(x) is close to it
(arXiv 2409.18442). No gradient is computed, so only the iterates are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from ringmark.inversion.methods import Adam, Anderson, ForwardStep, InertialKM, Operator
from ringmark.inversion.solve import Method, Residual, Solution, Status, norms, solve

__all__ = [
    "INVERTERS",
    "Inverter",
    "decoder_residual",
    "gradient_residual",
    "in_slices",
    "invert_decoder",
    "invert_decoder_by_gradient",
    "quantisation_level",
    "remaining_share",
    "rounding_share",
]

Map = Callable[[Tensor], Tensor]

GREY_LEVEL = 2 / 255  # one step of an 8-bit image whose range is [-1, 1]


WITHIN, SLOWER = 2, 2.0  # see scripts/experiments/altered.py
COARSE = 0.5  # an exact E would give 1/8
AT_ONCE = 2  # images per call of the maps

Tolerance = float | Tensor | Literal["auto"] | None


@torch.inference_mode()
def invert_decoder(
    encode: Map,
    decode: Map,
    images: Tensor,
    method: Method = Anderson(),
    *,
    max_steps: int = 8,
    tol: Tolerance = "auto",
    pixels: tuple[float, float] = (-1.0, 1.0),
    at_once: int = AT_ONCE,
    guarded: bool = False,
    encoded: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Solution:
    """Latents z with E(D(z)) = E(x) for images x (B, 3, H, W); `max_steps=0` is the encoder alone.

    `encoded` is E(x) (B, C, h, w) if it is known already; for a video, that of its frames (B·F, C, h, w).

    Works for any two maps. D is clipped to the range of `pixels`, as x was when it became a picture: where x is white,
    D(z) may exceed white. Each image keeps the iterate with the smallest pixel residual ‖D(z) − x‖, which each
    evaluation computes anyway; a step costs one E and one D. `tol="auto"` stops an image once ‖T‖ has fallen to the
    level that rounding x to 8 bits causes (the discrepancy principle): further steps would fit the rounding noise.

    With `guarded`, an image keeps E(x) if ‖T‖ decreases too slowly in the first two steps: if the remaining share is
    more than twice that of the picture D(E(x)), which is the image of a latent, or if ‖T‖ does not decrease at all. No
    latent decodes to a picture that was altered afterwards. The alteration lies mostly in directions that E∘D shrinks,
    in which ‖T‖ decreases slowly and inversion would amplify the alteration.

    With the method `Operator`, each picture is inverted beside its own rendering D(E(x)), whose latents are known; a
    step costs two evaluations, `tol` is not used, and the value is the last iterate.

    The maps are called on at most `at_once` images, which bounds their memory for any B. A video (B, 3, F, H, W) is
    inverted frame by frame if the maps take single frames: the value is (B, C, F, h, w), and residuals, steps and
    status are those of the B·F frames.
    """
    inversion = _Inversion(
        encode=in_slices(encode, at_once),
        decode=in_slices(decode, at_once),
        method=method,
        max_steps=max_steps,
        pixels=pixels,
        guarded=guarded,
        progress=progress,
    )
    if images.ndim != 5:
        return inversion(images, tol, encoded)
    solution = inversion(images.transpose(1, 2).flatten(0, 1), tol, encoded)
    return replace(solution, value=torch.unflatten(solution.value, 0, (len(images), -1)).transpose(1, 2))


@dataclass(frozen=True)
class _Inversion:
    """Decoder inversion of images (B, 3, H, W) by two maps that take batches of any size; fields as in the function."""

    encode: Map
    decode: Map
    method: Method
    max_steps: int
    pixels: tuple[float, float]
    guarded: bool
    progress: Callable[[int, int], None] | None

    def __call__(self, images: Tensor, tol: Tolerance, encoded: Tensor | None = None) -> Solution:
        target = self.encode(images) if encoded is None else encoded
        images = images.to(target.device)
        if isinstance(self.method, Operator) and self.max_steps:
            solution = self.beside_rendering(images, target, self.method)
        else:
            solution = self.alone(images, target, tol)
        if self.max_steps and self.guarded:
            solution = self.guard(solution, target)
        if self.max_steps and target.dtype.itemsize < 4:
            solution = _mark_rounded(solution, rounding_share(self.encode, images, target).cpu() > COARSE)
        return solution

    def alone(self, images: Tensor, target: Tensor, tol: Tolerance) -> Solution:
        """The solution by a method whose iterates are the picture's latents."""
        if isinstance(tol, str):
            tol = quantisation_level(self.encode, images, target) if self.max_steps else None
        residual = decoder_residual(self.encode, self.decode, images, target, self.pixels)
        return solve(residual, target, self.method, max_steps=self.max_steps, tol=tol, progress=self.progress)

    def beside_rendering(self, images: Tensor, target: Tensor, method: Operator) -> Solution:
        """The solution by a method whose iterates (B, 2, C, h, w) are the latents of pictures and of their renderings.

        At the start, D(E(x)) and its latents are known for the picture's T and are the rendering itself.
        """
        rendered = self.decode(target).clamp(*self.pixels)
        start = self.encode(rendered)
        again = self.encode(self.decode(start).clamp(*self.pixels))
        latents = torch.stack([target, start], 1)
        first = (torch.stack([start, again], 1) - latents.float(), (rendered - images).float())
        residual = decoder_residual(
            self.encode,
            self.decode,
            torch.stack([images, rendered], 1).flatten(0, 1),
            latents.flatten(0, 1),
            self.pixels,
        )

        def of_pairs(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            t, error = residual(z.flatten(0, 1), torch.stack([2 * rows, 2 * rows + 1], 1).flatten())
            return t.unflatten(0, (-1, 2)), error[::2]

        solution = solve(
            of_pairs, latents, method, max_steps=self.max_steps, progress=self.progress, first=first, judged=False
        )
        return replace(solution, value=solution.value[:, 0], steps=2 * solution.steps)

    def guard(self, solution: Solution, target: Tensor) -> Solution:
        """The solution, with the encoder's latents for images whose ‖T‖ decreased too slowly."""
        rendered = self.decode(target).clamp(*self.pixels)
        reference = replace(self, max_steps=min(WITHIN, self.max_steps), guarded=False, progress=None)(rendered, None)
        left = remaining_share(solution)
        slow = (left > SLOWER * remaining_share(reference)) | (left >= 1)
        return _keep_start(solution, target.float(), slow)


def remaining_share(solution: Solution) -> Tensor:
    """The share (B,) of the initial ‖T‖ that remains after at most WITHIN steps."""
    first = torch.nan_to_num(solution.residuals[: WITHIN + 1], nan=torch.inf)
    return first.amin(0) / solution.residuals[0]


def _keep_start(solution: Solution, start: Tensor, kept: Tensor) -> Solution:
    """The solution, with the start as its value where `kept` (B,)."""
    value = torch.where(kept.to(start.device).view(-1, *[1] * (start.ndim - 1)), start, solution.value)
    status = [Status.START_KEPT if k else s for k, s in zip(kept, solution.status, strict=True)]
    return replace(solution, value=value, status=status, chosen=torch.where(kept, 0, solution.chosen))


def _mark_rounded(solution: Solution, coarse: Tensor) -> Solution:
    """The solution, with the status ROUNDED where rounding was `coarse` (B,) and the start was not kept."""
    rounded = [bool(c) and s is not Status.START_KEPT for c, s in zip(coarse, solution.status, strict=True)]
    status = [Status.ROUNDED if r else s for r, s in zip(rounded, solution.status, strict=True)]
    return replace(solution, status=status)


def decoder_residual(
    encode: Map, decode: Map, images: Tensor, target: Tensor, pixels: tuple[float, float] = (-1.0, 1.0)
) -> Residual:
    """T(z) = E(D(z)) − E(x) with error D(z) − x and D clipped to the range of `pixels`; E(x) is `target`."""

    def residual(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        decoded = decode(z.to(target.dtype)).clamp(*pixels)
        return encode(decoded).float() - target[rows].float(), (decoded - images[rows]).float()

    return residual


def in_slices(map_: Map, size: int) -> Map:
    """The same map, called on at most `size` samples at a time."""

    def sliced(x: Tensor) -> Tensor:
        return torch.cat([map_(part) for part in torch.split(x, size)])

    return sliced


def quantisation_level(encode: Map, images: Tensor, target: Tensor, draws: int = 3) -> Tensor:
    """σ_q (B,): median over `draws` of ‖E(x + u) − E(x)‖, with u uniform over ± half a grey level; E(x) is `target`.

    All images share the same u, so an image's level does not depend on its batch.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.stack([_spread(encode, images, target, generator, 1.0) for _ in range(draws)]).median(0).values


def rounding_share(encode: Map, images: Tensor, target: Tensor) -> Tensor:
    """The share (B,) of σ_q that remains if u is an eighth as large: 1/8 for an exact E, about 1 if rounding dominates.

    In 16 bits, E(x + u) also differs from E(x) by the rounding of every layer, independent of u. Above one half,
    rounding hides everything below the noise of an 8-bit image, and 32-bit maps are more accurate.
    """
    small, whole = (_spread(encode, images, target, torch.Generator().manual_seed(0), size) for size in (1 / 8, 1.0))
    return small / whole


def _spread(encode: Map, images: Tensor, target: Tensor, generator: torch.Generator, size: float) -> Tensor:
    """‖E(x + u) − E(x)‖ (B,) with u uniform over ± `size` half grey levels."""
    u = (torch.rand(images[:1].shape, generator=generator) - 0.5) * GREY_LEVEL * size
    return norms((encode(images + u.to(images)) - target).float())


def gradient_residual(decode: Map, images: Tensor) -> Residual:
    """∇_z Σ(D(z) − x)² with error D(z) − x, the residual of the baseline. It stores the whole graph of the decoder."""

    def residual(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            z = z.clone().requires_grad_()  # a clone, since the start may come from inference mode
            error = decode(z).float() - images[rows]
            loss = error.square().sum()
            gradient = torch.autograd.grad(loss, z)[0]
        return gradient, error.detach()

    return residual


def invert_decoder_by_gradient(
    decode: Map, images: Tensor, start: Tensor, method: Method | None = None, *, max_steps: int = 50
) -> Solution:
    """The gradient baseline of arXiv 2409.18442 from `start`, the encoder's latents; by default scheduled Adam at 0.1.

    `models.pipeline.lean` reduces memory: the decoder runs in 16 bits by autocast, with activation checkpointing.
    """
    method = Adam(lr=0.1, horizon=max_steps) if method is None else method
    return solve(gradient_residual(decode, images.to(start.device)), start, method, max_steps=max_steps)


class Autoencoder(Protocol):
    """What an inverter needs from a model."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def lean(self) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Inverter:
    """A way to invert a model's decoder: (model, images (B, 3, H, W)) → Solution, from E(x) if that is known.

    `method`, `max_steps` and `guarded` are as in `invert_decoder`. If `early` is False, all steps are taken. With
    `gradient`, the method descends the squared pixel error instead, which is the baseline; with `lean`, that runs in
    bfloat16 with activation checkpointing.
    """

    method: Method = field(default_factory=Anderson)
    max_steps: int = 8
    early: bool = True
    gradient: bool = False
    lean: bool = False
    guarded: bool = False

    def __call__(self, model: Autoencoder, images: Tensor, encoded: Tensor | None = None) -> Solution:
        if not self.gradient:
            return invert_decoder(
                model.encode,
                model.decode,
                images,
                self.method,
                max_steps=self.max_steps,
                tol="auto" if self.early else None,
                guarded=self.guarded,
                encoded=encoded,
            )
        with torch.inference_mode():
            start = model.encode(images) if encoded is None else encoded
        with model.lean() if self.lean else nullcontext():
            return invert_decoder_by_gradient(model.decode, images, start, self.method, max_steps=self.max_steps)

    @classmethod
    def named(cls, name: str, max_steps: int | None = None) -> Inverter:
        """One of INVERTERS, with `max_steps` if given, which Adam's schedule then spans. Raises KeyError."""
        inverter = INVERTERS[name]
        if max_steps is None or name == "encoder":
            return inverter
        method = inverter.method
        if isinstance(method, Adam) and method.horizon:
            method = replace(method, horizon=max(1, max_steps))
        return replace(inverter, method=method, max_steps=max_steps)


INVERTERS = {
    "encoder": Inverter(max_steps=0),
    "forward": Inverter(ForwardStep(), 12),
    "km": Inverter(InertialKM(), 20),
    "adam": Inverter(Adam(horizon=50), 50, early=False),
    "anderson": Inverter(),
    "guarded": Inverter(max_steps=2, early=False, guarded=True),
    "operator": Inverter(Operator(), 3, early=False),
    "gradient": Inverter(Adam(lr=0.1, horizon=50), 50, early=False, gradient=True),
    "gradient-lean": Inverter(Adam(lr=0.1, horizon=50), 50, early=False, gradient=True, lean=True),
}
"""Inverters by name: the encoder alone, fixed-point methods, and the gradient baseline. Adam and the gradient take all
steps of their schedule, as in arXiv 2409.18442. Anderson is the most accurate on unaltered pictures of `pocket`;
guarded, which takes two of its steps, is robust for pictures that may have been altered; operator is for autoencoders
of which E∘D loses a part of the latents."""
