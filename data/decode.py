"""Decode image files completely or refuse them.

`decode` runs in this process for files that are certainly cheap (`is_cheap`), otherwise in a process with limits
(data/decoder_process.py). Only this module and `images`, which builds on it, use Pillow.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageFile, ImageOps, UnidentifiedImageError

from ringmark.data.containers import MAX_PROFILE, Damaged, Jpeg, Png, TooMany, kind_of, png_size, webp_size
from ringmark.errors import ImageError, one_line

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsTransform

__all__ = ["FORMATS", "MAX_PIXELS", "MAX_SIDE", "Decoded", "decode", "is_cheap", "upright"]

MAX_PIXELS = 64_000_000
MAX_SIDE = 65_535  # rows need memory in addition to their pixels
MAX_SCANS = 200  # of a progressive JPEG; encoders write about ten
MAX_PARTS = 200_000  # chunks or segments of a file
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

CHEAP_BYTES = 16 << 20
CHEAP_PIXELS = 16_000_000
CHEAP_PARTS = 20_000
CHEAP_WORK = 200_000_000  # pixels times scans
MAX_READS = 100_000  # of a file, when looking for a second frame

PHOTOMETRIC, YCBCR = 262, 6  # the TIFF tag of the colour space
ORIENTATION = 274
BAND_BYTES = 8 << 20
WARNINGS = threading.RLock()  # warning filters are global to the process


class Decoded(NamedTuple):
    """A picture in 8-bit RGB, and notes on conversions."""

    image: Image.Image
    notes: tuple[str, ...]


def is_cheap(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes can be decoded in this process in bounded time and memory."""
    return kind_of(head) in ("PNG", "JPEG", "WEBP") and size <= CHEAP_BYTES and not ImageFile.LOAD_TRUNCATED_IMAGES


def decode(path: str | os.PathLike[str], file: BinaryIO, *, limited: bool = False) -> Decoded | None:
    """The picture in an open file, or None if decoding may be expensive and this process is not `limited`.

    Raises ImageError: image.unknown-format, image.too-large (checked before any pixel is decoded), image.no-pixels,
    image.too-costly, image.misread, or image.damaged with the reason.
    """
    head = file.read(16)
    file.seek(0)
    kind = kind_of(head)
    if kind not in _formats():
        raise ImageError("image.unknown-format", "is not an image in a known format", subject=path)
    try:
        reader = _Reader(path, kind, limited)
        return reader.read(file)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path) from error
    except MemoryError as error:
        raise ImageError("image.too-costly", "needs too much memory", subject=path) from error
    except Exception as error:  # decoders raise all kinds of errors for damaged data
        raise ImageError("image.damaged", f"is damaged or cut off ({_reason(error)})", subject=path) from error


def upright(image: Image.Image, name: str) -> Decoded:
    """A Pillow image as `decode` returns it: its first frame, upright, in 8-bit sRGB over white.

    Raises ImageError, with `name` as the subject, if it cannot be loaded or is too large.
    """
    reader = _Reader(name, image.format or "", limited=True)
    try:
        reader._check_size(*image.size)
        reader._raw = str(getattr(image, "tile", ""))
        image.load()
        return reader._finish(image)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError("image.damaged", f"is damaged or cut off ({_reason(error)})", subject=name) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its message only has an object's address
        return "its header cannot be read"
    return one_line(error).strip() or type(error).__name__


def _too_large(path: str | os.PathLike[str]) -> ImageError:
    fact = f"has more than {MAX_PIXELS / 1e6:g} million pixels, or more than {MAX_SIDE} per side"
    return ImageError("image.too-large", fact, subject=path)


@cache
def _formats() -> tuple[str, ...]:
    """The FORMATS that this Pillow supports. Formats that run programs (EPS) or fetch files are not among them."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


class _Reader:
    """Decodes one file of a known kind; collects notes on the way."""

    def __init__(self, path: str | os.PathLike[str], kind: str, limited: bool) -> None:
        self.path, self.kind, self.limited = path, kind, limited
        self.warned: list[str] = []
        self.profile: bytes | None = None
        self.several = False
        self._raw, self._turned = "", False
        self._max_parts = MAX_PARTS if limited else CHEAP_PARTS

    def read(self, file: BinaryIO) -> Decoded | None:
        read = {"PNG": self._png, "JPEG": self._jpeg, "WEBP": self._webp}.get(self.kind, self._other)
        try:
            image = read(file)
        except TooMany as error:
            if self.limited:
                raise ImageError("image.too-costly", f"has {error}", subject=self.path) from error
            return None
        if image is None:
            return None
        if isinstance(file, _CountedReads):
            file.left = MAX_READS
        return self._finish(image)

    def _check_size(self, width: int, height: int) -> None:
        if not 0 < width * height:
            raise ImageError("image.no-pixels", "has no pixels", subject=self.path)
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise _too_large(self.path)

    def _is_expensive(self, pixels: int, work: int = 0) -> bool:
        return not self.limited and (pixels > CHEAP_PIXELS or work > CHEAP_WORK)

    def _png(self, file: BinaryIO) -> Image.Image | None:
        content = file.read()
        size = png_size(content)
        self._check_size(*size)
        png = Png.parse(content, self._max_parts)
        if self._is_expensive(size[0] * size[1]):
            return None
        self.several, self.profile = png.frames > 1, png.profile
        image = self._load(io.BytesIO(png.pixels))
        last = image.crop((0, image.height - 1, image.width, image.height)).tobytes()
        if not last.strip(b"\0") or "interlace" in image.info:
            png.check_whole()  # Pillow leaves missing rows at 0
        return image

    def _jpeg(self, file: BinaryIO) -> Image.Image | None:
        content = file.read()
        jpeg = Jpeg.parse(content, self._max_parts)
        self._check_size(jpeg.width, jpeg.height)
        pixels = jpeg.width * jpeg.height
        if len(jpeg.scans) > MAX_SCANS:
            raise ImageError(
                "image.too-costly", f"has {len(jpeg.scans)} scans, more than {MAX_SCANS}", subject=self.path
            )
        if self._is_expensive(pixels, pixels * len(jpeg.scans)):
            return None
        if not jpeg.checkable:
            return self._load(io.BytesIO(content))
        return self._load_twice(content, jpeg.padded(content), large=pixels > CHEAP_PIXELS)

    def _load_twice(self, content: bytes, padded: bytes, *, large: bool) -> Image.Image:
        """A JPEG, refused unless padding after its data leaves it unchanged (see `Jpeg.padded`)."""
        padded_image: Image.Image | None = self._load(io.BytesIO(padded))
        assert padded_image
        digest = _digest(padded_image) if large else b""
        padded_image = None if large else padded_image  # two large images would take too much memory
        self.warned = []
        image = self._load(io.BytesIO(content))
        if not (_is_same(image, padded_image) if padded_image else _digest(image) == digest):
            raise Damaged("its data ends before its last pixel")
        return image

    def _webp(self, file: BinaryIO) -> Image.Image | None:
        content = file.read()
        width, height = webp_size(content)
        self._check_size(width, height)
        return None if self._is_expensive(width * height) else self._load(io.BytesIO(content))

    def _other(self, file: BinaryIO) -> Image.Image | None:
        return self._load(file) if self.limited else None

    def _load(self, file: BinaryIO) -> Image.Image:
        """The first frame with its pixels; nothing else in the file is read before they are loaded."""
        with self._as_notes():
            image = Image.open(file, formats=(self.kind,))
        self._check_size(*image.size)
        self._raw = str(image.tile)
        self._turned = False
        if self.kind == "TIFF":  # Pillow rotates these while loading
            tags = getattr(image, "tag_v2", {})
            self._turned = tags.get(ORIENTATION, 1) in range(2, 9)
            if "'raw'" in self._raw and "'RGBX'" in self._raw and tags.get(PHOTOMETRIC) == YCBCR:
                # Pillow before 13 reads its three bytes per pixel as four.
                raise ImageError(
                    "image.misread", "is an uncompressed YCbCr TIFF, which this Pillow misreads", subject=self.path
                )
        image.load()
        return image

    def _finish(self, image: Image.Image) -> Decoded:
        """Convert the pixels of the file to upright 8-bit RGB."""
        profile = self.profile if self.profile is not None else image.info.get("icc_profile")
        source = image
        image, reduced = _eight_bit(image, self._raw)
        image, converted = (image, None) if profile is None else _to_srgb(image, profile)
        image, flattened = _over_white(image)
        turned = self._turn(source, image)
        self.several = self.several or self._has_more(source)
        image.info = {}  # otherwise orientation or profile could be applied again after saving
        first = "first frame of several" if self.several else None
        notes = (first, reduced, converted, flattened, turned, *dict.fromkeys(self.warned))
        return Decoded(image, tuple(filter(None, notes)))

    def _turn(self, source: Image.Image, image: Image.Image) -> str | None:
        """Rotate `image` in place by the EXIF orientation of its file; invalid EXIF is ignored."""
        size, before = image.size, image.im
        with self._as_notes():
            try:
                image.info = {
                    name: source.info[name] for name in ("exif", "xmp", "XML:com.adobe.xmp") if name in source.info
                }
                if self.kind != "TIFF":
                    ImageOps.exif_transpose(image, in_place=True)
            except Exception:
                if image.im is before:
                    image._size = size
        return "rotated by its EXIF orientation" if self._turned or image.im is not before else None

    def _has_more(self, image: Image.Image) -> bool:
        """Whether there is a second frame, if that can be determined quickly."""
        try:
            return bool(getattr(image, "is_animated", False))
        except Exception:
            return False

    @contextmanager
    def _as_notes(self) -> Iterator[None]:
        """Context that turns Pillow's warnings into notes; other warnings are passed on."""
        with WARNINGS:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                yield
            for warning in caught:
                if f"{os.sep}PIL{os.sep}" in warning.filename:
                    self.warned.append(f"metadata: {one_line(str(warning.message).strip())}")
                else:
                    warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


class _CountedReads(io.BufferedReader):
    """A file with a limited number of reads, once `left` is set."""

    left: int | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise OSError("too many blocks")
        return super().read(size)


def counted(file: BinaryIO) -> BinaryIO:
    """The same file with counted reads, so that looking for a second frame ends."""
    return _CountedReads(io.FileIO(file.fileno(), closefd=False))


# -- pixels -----------------------------------------------------------------------------------------------------------


def bands(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of whole rows that cover the image, each small enough to process with little memory."""
    rows = max(1, BAND_BYTES // (8 * image.width))
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(image.height, top + rows)


def _is_same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and ImageChops.difference(a, b).getbbox(alpha_only=False) is None


def _digest(image: Image.Image) -> bytes:
    digest = hashlib.blake2b()
    for box in bands(image):
        digest.update(image.crop(box).tobytes())
    return digest.digest()


def _eight_bit(image: Image.Image, raw: str) -> tuple[Image.Image, str | None]:
    """The image with 8-bit channels, and a note if they were deeper; `raw` is the layout in the file."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image, "16 bits reduced to 8" if ";16" in raw else None
    black, white, bits = _range(image, raw)
    grey, alpha = Image.new("L", image.size), None
    if "transparency" in image.info:
        alpha = Image.new("L", image.size)
    for box in bands(image):
        values = np.asarray(image.crop(box)).astype(np.float64)
        grey.paste(Image.fromarray(np.rint((values - black) * (255 / (white - black))).astype(np.uint8)), box)
        if alpha:
            alpha.paste(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)), box)
    if alpha:
        grey.putalpha(alpha)
    note = f"{bits} bits reduced to 8"
    return grey, note if bits < 32 else f"{note}, {black:g} to {white:g} taken as black to white"


def _range(image: Image.Image, raw: str) -> tuple[float, float, int]:
    """Black, white and bits: the smallest common range that holds all values, otherwise their minimum and maximum."""
    if image.mode.startswith("I;16"):
        return (0, 4095, 12) if ";12" in raw else (0, 65535, 16)
    extremes = [(float(v.min()), float(v.max())) for box in bands(image) for v in [np.asarray(image.crop(box))]]
    low, high = min(pair[0] for pair in extremes), max(pair[1] for pair in extremes)
    if not all(np.isfinite(pair).all() for pair in extremes) or not np.isfinite(high - low):
        raise ValueError("values that are not finite")
    whites = (1, 255, 65535) if image.mode == "F" else (65535,)
    white = next((w for w in whites if low >= 0 and high <= w), None)
    return (0, white, 32) if white else (low, max(high, low + 1), 32)


def _over_white(image: Image.Image) -> tuple[Image.Image, str | None]:
    """A new image in RGB over white, and a note if parts were transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB"), None
    flat, transparent = Image.new("RGB", image.size), False
    for box in bands(image):
        part = image.crop(box).convert("RGBA")
        transparent = transparent or part.getchannel("A").getextrema()[0] != 255
        white = Image.new("RGBA", part.size, "white")
        flat.paste(Image.alpha_composite(white, part).convert("RGB"), box)
    return flat, "alpha over white" if transparent else None


def _to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, str | None]:
    """The image in sRGB (perceptual intent), and a note; an sRGB profile changes nothing."""
    from PIL import ImageCms

    try:
        if len(profile) > MAX_PROFILE:
            raise ValueError("too large")
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        image = _for_profile(image)
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        intent = ImageCms.Intent.PERCEPTUAL
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, mode, intent)
        if _changes_nothing(transform, image.mode):
            return image, None
        converted = _applied(image, transform)
        converted.info = image.info
        name = one_line(ImageCms.getProfileDescription(source).strip())[:60]
        return converted, f"colours converted to sRGB from {name or 'its profile'}"
    except (ImportError, OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return image, "colour profile ignored: it is damaged or does not match the image"


def _for_profile(image: Image.Image) -> Image.Image:
    """The image in a mode that colour management supports."""
    if image.mode in ("L", "RGB", "RGBA", "CMYK") and ("transparency" not in image.info):
        return image
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _applied(image: Image.Image, transform: ImageCmsTransform) -> Image.Image:
    from PIL import ImageCms

    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # only None when working in place
    return converted


def _changes_nothing(transform: ImageCmsTransform, mode: str) -> bool:
    """Whether no colour of a grid changes by more than a level or two, which is rounding."""
    if mode == "CMYK":
        return False
    levels = np.linspace(0, 255, 9 if mode != "L" else 256).round().astype(np.uint8)
    grid = levels[None] if mode == "L" else np.stack(np.meshgrid(*[levels] * 3), -1).reshape(1, -1, 3)
    probe = Image.fromarray(grid).convert(mode)
    moved = np.asarray(_applied(probe, transform).convert("RGB")).astype(int)
    return bool(np.abs(moved - np.asarray(probe.convert("RGB"))).max() <= 2)
