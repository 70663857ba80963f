"""Which pictures there are: folders, listed recursively."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from ringmark.errors import ImageError

__all__ = ["SUFFIXES", "Listing", "check_folder", "find_images", "list_images", "stamp_of"]


SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".avifs"),
)


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
