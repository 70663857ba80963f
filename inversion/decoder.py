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
    "rounding_share",
]

Map = Callable[[Tensor], Tensor]

GREY_LEVEL = 2 / 255  # one step of an 8-bit image whose range is [-1, 1]


COARSE = 0.5  # an exact E would give 1/8
AT_ONCE = 2  # images per call of the maps

Tolerance = float | Tensor | Literal["auto"] | None


@torch.inference_mode()
def invert_decoder(
    encode: Map,
    decode: Map,
    images: Tensor,
    method: Method = Operator(),
    *,
    max_steps: int = 2,
    tol: Tolerance = "auto",
    pixels: tuple[float, float] = (-1.0, 1.0),
    at_once: int = AT_ONCE,
    encoded: Tensor | None = None,
) -> Solution:
    """Latents z with E(D(z)) = E(x) for images x (B, 3, H, W); `max_steps=0` is the encoder alone.

    `encoded` is E(x) (B, C, h, w) if it is known already; for a video, that of its frames (B·F, C, h, w).

    Works for any two maps. D is clipped to the range of `pixels`, as x was when it became a picture: where x is white,
    D(z) may exceed white.

    `Operator`, the default, inverts each picture beside its own rendering D(E(x)), whose latents are known. A step
    costs two evaluations of E∘D, the first of which yields the rendering; all `max_steps` steps are taken, `tol` is not
    used, and the value is the last iterate. A picture that changes much more than its rendering was altered after it
    was decoded: no latent decodes to it, and its change is reduced (`Operator.share`).

    With every other method, a step costs one evaluation, and each image keeps the iterate with the smallest pixel
    residual ‖D(z) − x‖, which each evaluation computes anyway. `tol="auto"` stops an image once ‖T‖ has fallen to the
    level that rounding x to 8 bits causes (the discrepancy principle): further steps would fit the rounding noise.

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

    def __call__(self, images: Tensor, tol: Tolerance, encoded: Tensor | None = None) -> Solution:
        target = self.encode(images) if encoded is None else encoded
        images = images.to(target.device)
        if isinstance(self.method, Operator) and self.max_steps:
            solution = self.beside_rendering(images, target, self.method)
        else:
            solution = self.alone(images, target, tol)
        if self.max_steps and target.dtype.itemsize < 4:
            solution = _mark_rounded(solution, rounding_share(self.encode, images, target).cpu() > COARSE)
        return solution

    def alone(self, images: Tensor, target: Tensor, tol: Tolerance) -> Solution:
        """The solution by a method whose iterates are the picture's latents."""
        if isinstance(tol, str):
            tol = quantisation_level(self.encode, images, target) if self.max_steps else None
        residual = decoder_residual(self.encode, self.decode, images, target, self.pixels)
        return solve(residual, target, self.method, max_steps=self.max_steps, tol=tol)

    def beside_rendering(self, images: Tensor, target: Tensor, method: Operator) -> Solution:
        """The solution by a method whose iterates (B, 2, C, h, w) are the latents of pictures and of their renderings.

        The rendering and its latents are also D and E∘D at E(x), so that T is known for the picture at the start.
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

        solution = solve(of_pairs, latents, method, max_steps=self.max_steps, first=first, judged=False)
        share = method.share(latents.float(), solution.value).view(-1, *[1] * (target.ndim - 1))
        return replace(solution, value=target.float().lerp(solution.value[:, 0], share), steps=2 * solution.steps)


def _mark_rounded(solution: Solution, coarse: Tensor) -> Solution:
    """The solution, with the status ROUNDED where rounding was `coarse` (B,)."""
    return replace(solution, status=[Status.ROUNDED if c else s for c, s in zip(coarse, solution.status, strict=True)])


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

    `method` and `max_steps` are as in `invert_decoder`. With `early`, an image stops at the level that rounding to 8
    bits causes. With `gradient`, the method descends the squared pixel error instead, which is the baseline; with
    `lean`, that runs in bfloat16 with activation checkpointing.
    """

    method: Method = field(default_factory=Operator)
    max_steps: int = 2
    early: bool = False
    gradient: bool = False
    lean: bool = False

    def __call__(self, model: Autoencoder, images: Tensor, encoded: Tensor | None = None) -> Solution:
        if not self.gradient:
            return invert_decoder(
                model.encode,
                model.decode,
                images,
                self.method,
                max_steps=self.max_steps,
                tol="auto" if self.early else None,
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
    "encoder": Inverter(Anderson(), 0, early=True),  # without steps; so described in the calibrations that users have
    "operator": Inverter(),
    "anderson": Inverter(Anderson(), 8, early=True),
    "forward": Inverter(ForwardStep(), 12, early=True),
    "km": Inverter(InertialKM(), 20, early=True),
    "adam": Inverter(Adam(horizon=50), 50),
    "gradient": Inverter(Adam(lr=0.1, horizon=50), 50, gradient=True),
    "gradient-lean": Inverter(Adam(lr=0.1, horizon=50), 50, gradient=True, lean=True),
}
"""Inverters by name.

operator is the default. anderson is the most accurate for unaltered pictures of an autoencoder whose E∘D is close to
the identity. The gradient baselines are slow.
"""
