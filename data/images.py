"""Read images of all common raster formats safely into 8-bit RGB.

Notes record every conversion beyond decoding; an ImageError says in one line what is wrong with a file. Nothing here
changes Pillow's global state.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from ringmark.data.containers import PNG_MAGIC, kind_of
from ringmark.data.cuts import boxes
from ringmark.data.decode import FORMATS, Decoded, decode, is_cheap, upright
from ringmark.data.decoder_process import decode_apart
from ringmark.data.files import SOFTWARE, open_regular, write_atomic
from ringmark.data.results import content_id
from ringmark.errors import ImageError

__all__ = [
    "FORMATS",
    "Sample",
    "SizesOf",
    "WithParts",
    "fit",
    "from_array",
    "read_image",
    "read_sample",
    "read_samples",
    "samples_in",
    "samples_of",
    "save_png",
    "thumbnail",
    "to_array",
]

Size = tuple[int, int]
SizesOf = Callable[[Size], Sequence[Size]]

TINY = 8  # images smaller than 1/TINY of the size are refused
PNG_END = b"\x00\x00\x00\x00IEND\xae\x42\x60\x82"  # the whole last chunk
CODES = ("image.missing", "image.folder", "image.denied", "image.unreadable", "image.special")
"""Codes of `read_image` for files that cannot be opened; the other codes are raised here and in `decode`."""


@dataclass(frozen=True)
class Sample:
    """An 8-bit RGB image with its metadata.

    `id` is its path as given, `notes` are the conversions on reading.
    `content` is a digest of the pixels as they were decoded, before they were fitted, and `size` (H, W) their size.
    `parts` are the pictures within it, fitted, if they were asked for (`WithParts`).
    """

    id: str
    image: Image.Image
    notes: tuple[str, ...] = ()
    content: str = ""
    size: Size | None = None
    parts: tuple[Image.Image, ...] = ()


class WithParts(tuple[Size, ...]):
    """Sizes from a `SizesOf` that also asks for the pictures within, as on a contact sheet or in a screenshot."""


def read_sample(path: str | os.PathLike[str], size: Size, *, id: str | None = None) -> Sample:
    """The image at `path`, fitted to `size` (H, W), as a Sample; `id` is the path unless given.

    Raises ImageError, also for a picture smaller than 1/TINY of that size, from which no noise can be recovered.
    """
    (sample,) = read_samples(path, lambda _: (size,), id=id)
    return sample


def read_samples(path: str | os.PathLike[str], sizes_of: SizesOf, *, id: str | None = None) -> list[Sample]:
    """The image at `path`, fitted to each of the sizes that `sizes_of` gives for its own (H, W).

    Raises ImageError, also for a picture smaller than 1/TINY of the smallest of these sizes.
    """
    return _fitted(*read_image(path), sizes_of, str(path) if id is None else id, path)


def samples_in(content: bytes, sizes_of: SizesOf, *, id: str) -> list[Sample]:
    """The image in the bytes of a file, as `read_samples` would return it. Raises ImageError."""
    return _fitted(*_decoded(content, id), sizes_of, id, id)


def _decoded(content: bytes, id: str) -> Decoded:
    """The picture in the bytes of a file; the separate process gets those that may be expensive as a file."""
    if not content:
        raise ImageError("image.empty", "is empty", subject=id)
    head = content[:16]
    if is_cheap(head, len(content)) or not kind_of(head):
        if decoded := decode(id, io.BytesIO(content)):
            return decoded
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "picture")
        path.write_bytes(content)
        try:
            return decode_apart(path)
        except ImageError as error:
            raise ImageError(error.code, error.fact, subject=id) from None


def samples_of(picture: Image.Image, sizes_of: SizesOf, *, id: str) -> list[Sample]:
    """A Pillow image as `read_samples` would return it if it had been saved. Raises ImageError."""
    return _fitted(*upright(picture, id), sizes_of, id, id)


def _fitted(
    image: Image.Image, notes: tuple[str, ...], sizes_of: SizesOf, id: str, path: str | os.PathLike[str]
) -> list[Sample]:
    sizes = sizes_of((image.height, image.width))
    needed = -(-min(map(min, sizes)) // TINY)
    if min(image.size) < needed:
        raise ImageError("image.tiny", f"has only {image.width} x {image.height} pixels", subject=path, needed=needed)
    if len(sizes) > 1:
        notes = (*notes, f"tried at {' and '.join(f'{width}x{height}' for height, width in sizes)}")
    fits = [fit(image, size) for size in sizes]
    content, size = content_id(np.asarray(image)), (image.height, image.width)
    parts = _parts(image, sizes[0]) if isinstance(sizes, WithParts) else ()
    return [
        Sample(id, fitted, notes=(*notes, note) if note else notes, content=content, size=size, parts=parts)
        for fitted, note in fits
    ]


def _parts(image: Image.Image, size: Size) -> tuple[Image.Image, ...]:
    """The pictures within a picture larger than this size, each fitted to it; of at least half its shorter side."""
    if min(image.width / size[1], image.height / size[0]) <= 1:
        return ()
    return tuple(fit(image.crop(box), size)[0] for box in boxes(image, least=min(size) // 2))


def read_image(path: str | os.PathLike[str]) -> tuple[Image.Image, tuple[str, ...]]:
    """The picture at `path` in 8-bit sRGB, and notes on conversions.

    Transparent parts become white, deeper pixels are scaled to 8 bits, the first frame of an animation is used, colours
    are converted to sRGB if the file has another profile, and the EXIF orientation is applied. The size is checked
    before any pixel is decoded; files that may be expensive to decode are decoded in a separate process.

    Raises ImageError with one of CODES if the file is missing, not a regular file, empty, not an image in one of
    FORMATS, damaged or truncated anywhere in its first frame, has no or too many pixels (MAX_PIXELS, MAX_SIDE), or
    needs more time or memory than any valid picture.
    """
    with open_regular(path, ImageError, "image") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise ImageError("image.empty", "is empty", subject=path)
        head = file.read(16)
        file.seek(0)
        decoded = decode(path, file) if is_cheap(head, size) or not kind_of(head) else None
    return decoded or decode_apart(path)


def thumbnail(path: str | os.PathLike[str], side: int) -> bytes:
    """The picture at `path` as a JPEG of at most `side` pixels per side. Raises ImageError as `read_image` does."""
    image, _ = read_image(path)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def fit(image: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, str | None]:
    """The image at `size` (H, W) and a note on how: resized (Lanczos, aspect kept) to cover it, then centre-cropped.

    An image of that size is returned unchanged, with None. Only the part that is kept is resized, so a picture of
    1x4000 does not need more memory than others. Raises ValueError if a side is less than 1.
    """
    (height, width), (w, h) = size, image.size
    if min(width, height, w, h) < 1:
        raise ValueError(f"cannot fit {w}x{h} to {width}x{height}: sides must be at least 1")
    if (w, h) == (width, height):
        return image, None
    scale = max(width / w, height / h)
    cropped = f"centre-cropped to {width}x{height}"
    if scale == 1:  # whole pixels, so that a crop does not blur
        x, y = (w - width) // 2, (h - height) // 2
        return image.crop((x, y, x + width, y + height)), f"{w}x{h} {cropped}"
    left, top = max(0.0, (w - width / scale) / 2), max(0.0, (h - height / scale) / 2)
    fitted = image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, w - left, h - top))
    covering = (max(width, round(w * scale)), max(height, round(h * scale)))
    note = f"resized {w}x{h} -> {covering[0]}x{covering[1]}"
    return fitted, note if covering == (width, height) else f"{note} and {cropped}"


def to_array(image: Image.Image) -> np.ndarray:
    """Pixels as float32 (3, H, W) in [-1, 1]."""
    return np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1


def from_array(array: np.ndarray) -> Image.Image:
    """The 8-bit RGB image of (3, H, W) values in [-1, 1], rounded and clipped; the inverse of `to_array`.

    Raises ValueError for another shape or for NaN.
    """
    array = np.asarray(array, np.float64)
    if array.ndim != 3 or array.shape[0] != 3:
        raise ValueError(f"an image needs the shape (3, H, W), not {array.shape}")
    if np.isnan(array).any():
        raise ValueError("an image cannot hold NaN")
    return Image.fromarray(np.rint((np.clip(array, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0).copy())


def is_whole_png(path: Path) -> bool:
    """Whether there is a file that begins and ends as a PNG does."""
    try:
        with open(path, "rb") as file:
            begin = file.read(len(PNG_MAGIC))
            file.seek(-len(PNG_END), os.SEEK_END)
            return begin == PNG_MAGIC and file.read() == PNG_END
    except OSError:
        return False


def save_png(image: Image.Image, path: str | os.PathLike[str], *, signed: bool = True, **text: object) -> None:
    """Write a PNG atomically, creating parent folders; `text` is stored in text chunks, which Pillow reads as `.text`.

    If `signed`, another chunk names ringmark as the Software, so that `is_ours` recognises the file. Raises ValueError
    for an invalid text name (PNG allows at most 79 Latin-1 characters), OSError if PNG does not support the image's
    mode or the file cannot be written.
    """
    chunks = PngImagePlugin.PngInfo()
    text = {"Software": SOFTWARE, **text} if signed else text
    for name, value in text.items():
        if len(name) > 79 or not name.encode("latin-1", "ignore").decode("latin-1") == name:
            raise ValueError(f"a PNG text name has at most 79 Latin-1 characters, not {name!r}")
        chunks.add_text(name, str(value))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    write_atomic(path, buffer.getvalue())
