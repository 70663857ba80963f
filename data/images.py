"""Where images come from: files of any sane raster format, read safely into 8-bit RGB.

Whatever reading does to a picture beyond decoding it is said in its notes; whatever is wrong with a file is said in
one line by an ImageError. Nothing here changes Pillow's global state.
"""

from __future__ import annotations

import csv
import io
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from data.store import one_line, write_atomic

__all__ = [
    "ImageError",
    "Listing",
    "Sample",
    "check_folder",
    "find_images",
    "fit",
    "from_array",
    "list_images",
    "read_image",
    "read_labels",
    "read_sample",
    "save_png",
    "stamp_of",
    "to_array",
]

TINY = 8  # an eighth of the side
MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".avifs"),
)
LABELS = {
    "1": True,
    "true": True,
    "yes": True,
    "marked": True,
    "0": False,
    "false": False,
    "no": False,
    "unmarked": False,
}
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


class ImageError(ValueError):
    """A file that cannot be used: one line that starts with its `path`, says the fact and the remedy."""

    def __init__(self, path: str | os.PathLike, fact: str) -> None:
        super().__init__(one_line(f"{path}: {fact}"))
        self.path = Path(path)


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


def stamp_of(path: Path) -> dict:
    """What changes when a file does."""
    try:
        facts = path.stat()
    except OSError:
        return {"size": None, "mtime_ns": None}
    return {"size": facts.st_size, "mtime_ns": facts.st_mtime_ns}


def check_folder(folder: str | os.PathLike) -> None:
    """Raises ImageError unless there is such a folder."""
    if not Path(folder).is_dir():
        exists = Path(folder).exists()
        raise ImageError(
            folder, "is a file; name the folder it is in" if exists else "there is no such folder; check the name"
        )


def find_images(folder: str | os.PathLike) -> list[Path]:
    """The images that `list_images` finds. Raises ImageError where it does, and if a folder cannot be listed."""
    found = list_images(folder)
    if found.unlisted:
        raise found.unlisted[0]
    return found.images


class Listing(NamedTuple):
    """What is in a folder: images, sorted, an error for each folder that cannot be listed, how many other files."""

    images: list[Path]
    unlisted: list[ImageError]
    skipped: int


def list_images(folder: str | os.PathLike) -> Listing:
    """All files below `folder` with one of SUFFIXES in either case are images; what is hidden is left out altogether.

    Links are followed, each folder once. Raises ImageError if there is no such folder or no image is found.
    """
    check_folder(folder)
    files, unlisted, seen = [], [], set()

    def note(error: OSError) -> None:
        unlisted.append(ImageError(error.filename, f"cannot be listed ({error.strerror}); allow it to be read"))

    for here, folders, names in os.walk(folder, onerror=note, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        if real not in seen:
            files += [Path(here, name) for name in names if not name.startswith(".")]
        seen.add(real)
    images = sorted(file for file in files if file.name.lower().endswith(SUFFIXES))
    if not images:
        none = f"holds no images; what counts are files named {', '.join('*' + s for s in SUFFIXES)}"
        raise unlisted[0] if unlisted else ImageError(folder, none)
    return Listing(images, unlisted, len(files) - len(images))


def read_labels(path: str | os.PathLike) -> dict[str, bool]:
    """Which images are marked, from a CSV with the columns path and label or from a JSON object {path: label}.

    A label is 1, true, yes or marked, or 0, false, no or unmarked, in either case; other columns are ignored, and so
    are repetitions that agree. Raises ImageError, with the line (in JSON: the entry), for anything else.
    """
    with _open(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ImageError(path, f"line {line} is not UTF-8 text; save the labels as UTF-8") from error
    rows = _json_rows(path, text) if text.lstrip().startswith(("{", "[")) else _csv_rows(path, text)
    labels: dict[str, bool] = {}
    for where, name, value in rows:
        label = LABELS.get(str(value).strip().lower())
        if not name or label is None:
            raise ImageError(
                path, f"{where} has the path {name!r} and the label {value!r}; a label is one of {', '.join(LABELS)}"
            )
        if labels.setdefault(name, label) != label:
            raise ImageError(path, f"{where} contradicts an earlier label of {name!r}; keep one of the two")
    if not labels:
        raise ImageError(path, "holds no labels; add a line for each image")
    return labels


def _csv_rows(path: str | os.PathLike, text: str) -> Iterable[tuple[str, str, object]]:
    """Where it stands, path and label of each row."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if header.count("path") != 1 or header.count("label") != 1:
            raise ImageError(path, "line 1 must name the columns path and label, once each; add the header path,label")
        at, label = header.index("path"), header.index("label")
        for row in filter(None, reader):
            if len(row) <= max(at, label):
                raise ImageError(path, f"line {reader.line_num} has too few columns; give a path and a label")
            yield f"line {reader.line_num}", row[at], row[label]
    except csv.Error as error:
        raise ImageError(path, f"line {reader.line_num} is not CSV ({error}); mend that line") from error


def _json_rows(path: str | os.PathLike, text: str) -> Iterable[tuple[str, str, object]]:
    try:
        pairs = json.loads(text, object_pairs_hook=tuple)  # a dict would hide repeated paths
    except json.JSONDecodeError as error:
        raise ImageError(path, f"line {error.lineno} is not JSON ({error.msg}); mend that line") from error
    except (RecursionError, ValueError) as error:
        raise ImageError(path, f"is not a JSON object of labels ({error}); write {{path: label}}") from error
    if not isinstance(pairs, tuple):
        raise ImageError(path, "line 1 does not start a JSON object; write {path: label}")
    return [(f"the entry {name!r}", name, value) for name, value in pairs]


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
