"""Image distortions that a mark should survive: thin wrappers over Pillow, each with one strength.

An attack is a pure function (image in 8-bit RGB, strength, rng) → image of the same size. Deterministic attacks ignore
the generator. Sizes in pixels refer to the attacked image: a blur of 4 px is four times as strong on 128 pixels as on
the 512 of the papers. `chains` defines the text form of attacks, as in "jpeg:25+blur:4".
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from ringmark.data.images import from_array, to_array
from ringmark.errors import AttackError

if TYPE_CHECKING:  # only attacks that need a model load torch
    from torch import Tensor

    from ringmark.inversion.models.pipeline import LatentModel

__all__ = ["ATTACKS", "Attack"]

DIFFUSE_STEPS = 100  # steps of the whole schedule; `diffuse` takes a share of them
SCREENSHOT_QUALITY = 80
SHARPEN_RADIUS = 2  # px
BANNER = "SAMPLE PREVIEW"
MEDIAN_MAX = 15  # px; Pillow's time grows with the square


def rotation(image: Image.Image, degrees: float, rng: np.random.Generator) -> Image.Image:
    """Rotate anticlockwise about the centre, keeping the size; new corners are black."""
    return image.rotate(degrees, Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: float, rng: np.random.Generator) -> Image.Image:
    """Save as JPEG with 4:2:0 chroma subsampling and read back."""
    return _through(image, "JPEG", quality)


def webp(image: Image.Image, quality: float, rng: np.random.Generator) -> Image.Image:
    """Save as lossy WebP and read back."""
    return _through(image, "WEBP", quality)


def crop(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """Crop to this share of the area at a random position, keeping the aspect ratio, and scale back to full size."""
    return _crop(image, share**0.5, share**0.5, rng)


def widthcrop(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """Crop to this share of the width at a random position, keeping the height, and stretch back to full size.

    The tree-ring paper's code crops to 75 % of the area at an aspect ratio of 3:4, which is the same on a square.
    """
    return _crop(image, share, 1, rng)


def resize(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    """Scale down by this factor (Lanczos), then back up (bicubic)."""
    return _there_and_back(image, 1 / factor)


def blur(image: Image.Image, radius: float, rng: np.random.Generator) -> Image.Image:
    """Gaussian blur; the radius in px is the standard deviation."""
    return image.filter(ImageFilter.GaussianBlur(radius))


def median(image: Image.Image, size: float, rng: np.random.Generator) -> Image.Image:
    """Median filter of size × size px on each channel."""
    if size == 1:  # Pillow 12 would divide by zero
        return image.copy()
    return image.filter(ImageFilter.MedianFilter(int(size)))


def noise(image: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    """Add independent Gaussian noise of deviation σ (1 is the range from black to white) and clip."""
    values = np.asarray(image, np.float32) + 255 * sigma * _normal(image, rng)
    return Image.fromarray(np.rint(np.clip(values, 0, 255)).astype(np.uint8))


def wrapnoise(image: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    """Add noise modulo 256, so that white may become black, as the tree-ring paper's code does."""
    added = (255 * sigma * _normal(image, rng)).astype(np.int64).astype(np.uint8)
    return Image.fromarray(np.asarray(image) + added)


def brightness(image: Image.Image, most: float, rng: np.random.Generator) -> Image.Image:
    """Multiply by a factor drawn uniformly from 0 to this number, as in the tree-ring paper."""
    return brighten(image, most * rng.random(), rng)


def brighten(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    """Multiply by this factor."""
    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    """Multiply differences from the picture's mean grey by this factor."""
    return ImageEnhance.Contrast(image).enhance(factor)


def saturation(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    """Multiply differences from each pixel's grey by this factor."""
    return ImageEnhance.Color(image).enhance(factor)


def gamma(image: Image.Image, exponent: float, rng: np.random.Generator) -> Image.Image:
    """Raise values in [0, 1] to this power; above 1 darkens."""
    curve = np.rint(255 * (np.arange(256) / 255) ** exponent).astype(int)
    return image.point(curve.tolist() * 3)


def erase(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """Paint a rectangle of this share of the area black, at a random position and with the picture's aspect ratio."""
    width, height = (round(side * share**0.5) for side in image.size)
    left, top = _place(image.width - width, rng), _place(image.height - height, rng)
    erased = image.copy()
    erased.paste(0, (round(left), round(top), round(left) + width, round(top) + height))
    return erased


def flip(image: Image.Image, strength: None, rng: np.random.Generator) -> Image.Image:
    """Mirror left and right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def sharpen(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Unsharp mask: add this many times what a Gaussian blur of 2 px removes."""
    return image.filter(ImageFilter.UnsharpMask(SHARPEN_RADIUS, round(100 * amount), 0))


def text(image: Image.Image, opacity: float, rng: np.random.Generator) -> Image.Image:
    """Write white text with a black shadow across 90 % of the width, at a random height."""
    white, shadow = _banner(image.size)
    x, y = round(image.width / 20), round(_place(image.height - white.height, rng))
    covered = image.copy()
    for mask, colour in ((shadow, "black"), (white, "white")):
        covered.paste(colour, (x, y), mask.point(lambda a: round(a * opacity)))
    return covered


def screenshot(image: Image.Image, scale: float, rng: np.random.Generator) -> Image.Image:
    """Resize by this scale, save as JPEG of quality 80 and resize back."""
    return _there_and_back(image, scale, lambda shown: _through(shown, "JPEG", SCREENSHOT_QUALITY))


def vae(image: Image.Image, passes: float, rng: np.random.Generator, model: LatentModel) -> Image.Image:
    """Encode and decode with the autoencoder, D(E(x)) rounded to 8 bits, this many times."""
    return _at_size(image, model, lambda x: _regenerate(x, model, int(passes), lambda z: z))


def diffuse(image: Image.Image, share: float, rng: np.random.Generator, model: LatentModel) -> Image.Image:
    """Add noise up to this share of the schedule, then let the sampler remove it, with the empty prompt.

    z = a E(x) + s ε at the level closest to that share, with its signal a and noise s, in DIFFUSE_STEPS steps for the
    whole schedule (arXiv 2306.01953). A share of 0 is one pass of `vae`.
    """

    def regenerated(z: Tensor) -> Tensor:
        return _diffused(z, share, rng, model)

    return _at_size(image, model, lambda x: _regenerate(x, model, 1, regenerated))


def _diffused(z: Tensor, share: float, rng: np.random.Generator, model: LatentModel) -> Tensor:
    """Latents (1, C, h, w) with noise added to a level and removed again."""
    from ringmark.inversion.diffusion import sample, transfer

    whole = model.schedule(DIFFUSE_STEPS)
    first, second, last = (int(whole.timesteps[i]) for i in (0, 1, -1))
    level = share * (last + second - first)  # in timesteps of the whole schedule
    part = int((whole.timesteps - level).abs().argmin()) + 1 if share else 0
    eps = z.new_tensor(rng.standard_normal(tuple(z.shape), np.float32))
    noisy = transfer(z, eps, *whole.at(part)) if part else z
    return sample(model, noisy, model.nothing, whole.until(part))


def _through(image: Image.Image, form: str, quality: float) -> Image.Image:
    buffer = io.BytesIO()
    try:
        image.save(buffer, form, quality=int(quality))
    except (OSError, ValueError) as error:  # limits are 16383 pixels per side for WebP, 65535 for JPEG
        fact = f"{form} cannot hold {image.width}x{image.height} pixels"
        raise AttackError("attack.size", fact) from error
    with Image.open(buffer, formats=[form]) as read:
        return read.convert("RGB")


def _there_and_back(
    image: Image.Image, scale: float, meanwhile: Callable[[Image.Image], Image.Image] = lambda x: x
) -> Image.Image:
    width, height = (max(1, round(side * scale)) for side in image.size)
    return meanwhile(image.resize((width, height), Image.Resampling.LANCZOS)).resize(
        image.size, Image.Resampling.BICUBIC
    )


def _crop(image: Image.Image, across: float, down: float, rng: np.random.Generator) -> Image.Image:
    """Crop to these shares of the sides at a random position and scale back, without rounding to whole pixels."""
    width, height = image.width * across, image.height * down
    left, top = _place(image.width - width, rng), _place(image.height - height, rng)
    # A sum may exceed the side by a rounding error, which Pillow refuses.
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


def _place(room: float, rng: np.random.Generator) -> float:
    """Uniform in [0, room]; always one draw, so that positions at different strengths correspond."""
    return max(0.0, room) * rng.random()


def _normal(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((image.height, image.width, 3), np.float32)


def _banner(size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """Masks of the text and its shadow, 90 % of the picture's width and at most a third of its height."""
    font = ImageFont.load_default()
    left, top, right, bottom = font.getbbox(BANNER)
    words = Image.new("L", (int(right - left) + 3, int(bottom - top) + 3))
    ImageDraw.Draw(words).text((1 - left, 1 - top), BANNER, fill=255, font=font)
    width = max(1, round(size[0] * 0.9))
    height = max(1, min(round(width * words.height / words.width), size[1] // 3))
    words = words.resize((width, height), Image.Resampling.BICUBIC)
    shift = max(1, height // 12)
    return words, ImageChops.offset(words, shift, shift)


def _at_size(image: Image.Image, model: LatentModel, regenerate: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Regenerate at the image's size if the model can draw it, otherwise stretching to a usual size and back."""
    from ringmark.inversion.sizes import candidate_sizes

    size = candidate_sizes((image.height, image.width), model)[0][::-1]
    if image.size == size:
        return regenerate(image)
    return regenerate(image.resize(size, Image.Resampling.LANCZOS)).resize(image.size, Image.Resampling.LANCZOS)


def _regenerate(
    image: Image.Image, model: LatentModel, passes: int, between: Callable[[Tensor], Tensor]
) -> Image.Image:
    """Encode and decode `passes` times, applying `between` to the latent (1, C, h, w)."""
    import torch

    for _ in range(passes):
        with torch.inference_mode():
            z = model.encode(torch.from_numpy(to_array(image))[None]).float()
            decoded = model.decode(between(z))[0].float().cpu().numpy()
        if not np.isfinite(decoded).all():
            raise AttackError("attack.nan", "the model decodes this image to NaN")
        image = from_array(decoded)
    return image


@dataclass(frozen=True)
class Attack:
    """A function and its range of strengths, `low` to `high` in `unit`.

    An attack without a unit has no strength. `kind` is "any", "whole" or "odd". If `needs_model`, the function takes a
    LatentModel after the generator.
    """

    function: Callable[..., Image.Image]
    unit: str = ""
    low: float = 0
    high: float = 0
    default: float | None = None
    kind: str = "any"
    needs_model: bool = False

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (self.function.__doc__ or "").splitlines()[0]

    @property
    def range(self) -> str:
        """The strengths as text: "quality from 1 to 100, whole numbers only"."""
        kind = "" if self.kind == "any" else f", {self.kind} numbers only"
        return f"{self.unit} from {self.low:g} to {self.high:g}{kind}" if self.unit else "no strength"

    def takes(self, strength: float | None) -> bool:
        if strength is None or not self.unit:
            return strength is None and not self.unit
        whole = self.kind == "any" or float(strength).is_integer()
        return self.low <= strength <= self.high and whole and (self.kind != "odd" or strength % 2 == 1)


ATTACKS = {
    "rotation": Attack(function=rotation, unit="degrees", low=-180, high=180, default=75),
    "jpeg": Attack(function=jpeg, unit="quality", low=1, high=100, default=25, kind="whole"),
    "webp": Attack(function=webp, unit="quality", low=0, high=100, default=25, kind="whole"),
    "crop": Attack(function=crop, unit="share of the area", low=0.01, high=1, default=0.75),
    "widthcrop": Attack(function=widthcrop, unit="share of the width", low=0.01, high=1, default=0.75),
    "resize": Attack(function=resize, unit="factor", low=1, high=64, default=2),
    "blur": Attack(function=blur, unit="radius in px", low=0, high=100, default=4),
    "median": Attack(function=median, unit="side in px", low=1, high=MEDIAN_MAX, default=5, kind="odd"),
    "noise": Attack(function=noise, unit="σ of [0, 1]", low=0, high=1, default=0.1),
    "wrapnoise": Attack(function=wrapnoise, unit="σ of [0, 1]", low=0, high=1, default=0.1),
    "brightness": Attack(function=brightness, unit="largest factor", low=0, high=20, default=6),
    "brighten": Attack(function=brighten, unit="factor", low=0, high=20, default=1.5),
    "contrast": Attack(function=contrast, unit="factor", low=0, high=20, default=1.5),
    "saturation": Attack(function=saturation, unit="factor", low=0, high=20, default=1.5),
    "gamma": Attack(function=gamma, unit="exponent", low=0.1, high=10, default=1.5),
    "erase": Attack(function=erase, unit="share of the area", low=0, high=1, default=0.25),
    "flip": Attack(flip),
    "sharpen": Attack(function=sharpen, unit="amount", low=0, high=10, default=1),
    "text": Attack(function=text, unit="opacity", low=0, high=1, default=0.7),
    "screenshot": Attack(function=screenshot, unit="scale", low=0.1, high=2, default=0.75),
    "vae": Attack(function=vae, unit="passes", low=1, high=50, default=1, kind="whole", needs_model=True),
    "diffuse": Attack(function=diffuse, unit="share of the schedule", low=0, high=1, default=0.2, needs_model=True),
}
