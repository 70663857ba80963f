"""Where images come from: files of any sane raster format, read safely into 8-bit RGB.

Whatever reading does to a picture beyond decoding it is said in its notes; whatever is wrong with a file is said in
one line by an ImageError. Nothing here changes Pillow's global state.
"""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from functools import cache
from typing import BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ringmark.data.files import write_atomic
from ringmark.errors import ImageError

__all__ = [
    "Sample",
    "fit",
    "from_array",
    "read_image",
    "read_sample",
    "save_png",
    "to_array",
]

TINY = 8  # an eighth of the side
MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
ORIENTATION = 0x0112  # the EXIF tag
PHOTOMETRIC, YCBCR = 262, 6  # the TIFF tag of the colour space
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Sample:
    """One image to look at: 8-bit RGB, with what is known of it.

    `id` is its path as given, `label` whether it is marked (None: not known), `notes` what reading did to the picture.
    """

    id: str
    image: Image.Image
    label: bool | None = None
    prompt: str = ""
    notes: tuple[str, ...] = ()


def read_sample(
    path: str | os.PathLike,
    size: tuple[int, int],
    *,
    id: str | None = None,
    label: bool | None = None,
    prompt: str = "",
) -> Sample:
    """The image at `path`, fitted to `size` (H, W), as a Sample; `id` is the path unless given.

    Raises ImageError, also for a picture of less than 1/TINY of that size, from which nothing comes back.
    """
    image, notes = read_image(path)
    if TINY * min(image.size) < min(size):
        raise ImageError(
            path,
            f"has {image.width} x {image.height} pixels, of which nothing can be said; at least {-(-min(size) // TINY)} a side are needed",
        )
    image, note = fit(image, size)
    return Sample(str(path) if id is None else id, image, label, prompt, (*notes, note) if note else notes)


def read_image(path: str | os.PathLike) -> tuple[Image.Image, tuple[str, ...]]:
    """The picture at `path` in 8-bit RGB, and notes on what was done to it.

    Alpha is laid over white, deeper pixels are scaled to 8 bit, of an animation the first frame is taken, and the EXIF
    orientation is applied. Raises ImageError if the file is missing, not a regular file, empty, not an image in one of
    FORMATS, damaged, or of no or more than MAX_PIXELS pixels; the size is checked before any pixel is decoded.
    """
    with _open(path) as file:
        try:
            return _decode(path, file)
        except ImageError:
            raise
        except UnidentifiedImageError as error:
            raise ImageError(
                path, f"is not an image in a known format; convert it to one of {', '.join(_formats())}"
            ) from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageError(path, _too_large()) from error
        except Exception as error:  # given damaged bytes, decoders raise errors of every kind
            raise ImageError(path, f"is damaged or cut off ({error}); get the file again") from error


def fit(image: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, str | None]:
    """The image at `size` (H, W) and a note on how: resized (Lanczos, aspect kept) to cover it, then centre-cropped.

    An image that has that size already is returned as it is, with None. Only the part that stays is ever resized, so
    a picture of 1x4000 needs no more memory than another. Raises ValueError if a side is less than 1.
    """
    (height, width), (w, h) = size, image.size
    if min(width, height, w, h) < 1:
        raise ValueError(f"cannot fit {w}x{h} to {width}x{height}: sides must be at least 1")
    if (w, h) == (width, height):
        return image, None
    scale = max(width / w, height / h)
    cropped = f"centre-cropped to {width}x{height}"
    if scale == 1:  # whole pixels: a crop must not blur
        left, top = (w - width) // 2, (h - height) // 2
        return image.crop((left, top, left + width, top + height)), f"{w}x{h} {cropped}"
    left, top = max(0.0, (w - width / scale) / 2), max(0.0, (h - height / scale) / 2)
    fitted = image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, w - left, h - top))
    covering = (max(width, round(w * scale)), max(height, round(h * scale)))
    note = f"resized {w}x{h} -> {covering[0]}x{covering[1]}"
    return fitted, note if covering == (width, height) else f"{note} and {cropped}"


def to_array(image: Image.Image) -> np.ndarray:
    """Pixels as float32 (3, H, W) in [-1, 1]."""
    return np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1


def from_array(array: np.ndarray) -> Image.Image:
    """The 8-bit RGB image of (3, H, W) values in [-1, 1], rounded; what lies outside is clipped.

    The inverse of `to_array`. Raises ValueError for another shape or for NaN.
    """
    array = np.asarray(array, np.float64)
    if array.ndim != 3 or array.shape[0] != 3:
        raise ValueError(f"an image needs the shape (3, H, W), not {array.shape}")
    if np.isnan(array).any():
        raise ValueError("an image cannot hold NaN")
    return Image.fromarray(np.rint((np.clip(array, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0).copy())


def save_png(image: Image.Image, path: str | os.PathLike, **text: object) -> None:
    """Writes a PNG whole or not at all, parent folders created; `text` goes to its text chunks, read back as `.text`.

    Raises ValueError for a text name that PNG cannot hold (79 Latin-1 characters at most), OSError when the image's
    mode has no PNG form or the file cannot be written.
    """
    chunks = PngImagePlugin.PngInfo()
    for name, value in text.items():
        if len(name) > 79 or not name.encode("latin-1", "ignore").decode("latin-1") == name:
            raise ValueError(f"a PNG text name has at most 79 Latin-1 characters, not {name!r}")
        chunks.add_text(name, str(value))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    write_atomic(path, buffer.getvalue())


def _open(path: str | os.PathLike) -> BinaryIO:
    """A regular, non-empty file, opened; to open a pipe without O_NONBLOCK would wait for a writer for ever."""
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    except FileNotFoundError as error:
        raise ImageError(path, "there is no such file; check the name") from error
    except IsADirectoryError as error:
        raise ImageError(path, "is a folder; name a file in it") from error
    except PermissionError as error:
        raise ImageError(path, "may not be read; change its permissions") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise ImageError(
            path, f"cannot be opened ({getattr(error, 'strerror', None) or error}); check the name"
        ) from error
    found = os.fstat(file.fileno())
    if stat.S_ISREG(found.st_mode) and found.st_size:
        return file
    file.close()
    raise ImageError(
        path, "is empty; get the file again" if stat.S_ISREG(found.st_mode) else "is not a regular file; copy it to one"
    )


@cache
def _formats() -> tuple[str, ...]:
    """FORMATS as far as this Pillow has them. What runs other programs (EPS) or fetches is not among them."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _too_large() -> str:
    return f"has more than the {MAX_PIXELS / 1e6:g} million pixels that are read; make it smaller first"


def _decode(path: str | os.PathLike, file: BinaryIO) -> tuple[Image.Image, tuple[str, ...]]:
    image = Image.open(file, formats=_formats())
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise ImageError(path, _too_large() if image.width * image.height else "has no pixels; get the file again")
    frames, raw, orientation = getattr(image, "n_frames", 1), str(image.tile), _orientation(image)
    if "'raw'" in raw and "'RGBX'" in raw and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == YCBCR:
        # Pillow before 13 takes its three bytes a pixel for four.
        raise ImageError(path, "is an uncompressed YCbCr TIFF, which this Pillow misreads; convert it to RGB")
    first = f"first of {frames} frames" if frames > 1 else None
    image.load()
    turn = TURNS.get(_orientation(image))  # again: Pillow turns TIFF itself while it loads
    image, reduced = _eight_bit(image, raw)
    image, laid = _over_white(image)
    image = image if turn is None else image.transpose(turn)
    image.info = {}  # else an orientation or a profile could be applied a second time by whoever saves it
    turned = "turned by its EXIF orientation" if orientation in TURNS else None
    return image, tuple(filter(None, (first, reduced, laid, turned)))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1


def _eight_bit(image: Image.Image, raw: str) -> tuple[Image.Image, str | None]:
    """The image with 8-bit channels, then a note if they were deeper; `raw` describes how it lay in the file."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image, "16 bit reduced to 8" if ";16" in raw else None
    values = np.asarray(image).astype(np.float64)
    black, white, bits = _range(values, image.mode, raw)
    grey = Image.fromarray(np.rint((values - black) * (255 / (white - black))).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    note = f"{bits} bit reduced to 8"
    return grey, note if bits < 32 else f"{note}, {black:g} to {white:g} taken as black to white"


def _range(values: np.ndarray, mode: str, raw: str) -> tuple[float, float, int]:
    """Black, white and bits: the customary range that holds all values, else from the least to the greatest."""
    if mode.startswith("I;16"):
        return (0, 4095, 12) if ";12" in raw else (0, 65535, 16)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise ValueError("values that are not finite")
    whites = (1, 255, 65535) if mode == "F" else (65535,)
    white = next((w for w in whites if low >= 0 and high <= w), None)
    return (0, white, 32) if white else (low, max(high, low + 1), 32)


def _over_white(image: Image.Image) -> tuple[Image.Image, str | None]:
    """The image in RGB, then a note if some of it was transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB"), None
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    rgb = Image.alpha_composite(white, image).convert("RGB")
    return rgb, "alpha over white" if image.getchannel("A").getextrema()[0] < 255 else None
