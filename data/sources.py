"""Find pictures in folders, recursively."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ringmark.errors import ImageError, counted

__all__ = ["SUFFIXES", "Listing", "check_folder", "find_images", "is_picture", "list_images", "stamp_of"]

LOG = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".avifs"),
)


def is_picture(name: str) -> bool:
    """Whether a name or path says that this is a picture: by its suffix, and it is not hidden."""
    return name.lower().endswith(SUFFIXES) and not name.rpartition("/")[2].startswith(".")


def stamp_of(path: Path) -> dict[str, int | None]:
    """Size and modification time of a file, which change when the file does."""
    try:
        facts = path.stat()
    except OSError:
        return {"size": None, "mtime_ns": None}
    return {"size": facts.st_size, "mtime_ns": facts.st_mtime_ns}


def check_folder(folder: PathLike) -> None:
    """Raise ImageError (image.no-folder, image.not-folder) unless there is such a folder."""
    if Path(folder).is_dir():
        return
    if Path(folder).exists():
        raise ImageError("image.not-folder", "is a file, not a folder", subject=folder)
    raise ImageError("image.no-folder", "no such folder", subject=folder)


class Listing(NamedTuple):
    """The contents of a folder.

    `images` are sorted. `unlisted` holds an error for each folder that cannot be listed, `outside` one for each link
    that leads out of the folder and was not followed. `skipped` counts the other files by lower-case suffix.
    """

    images: list[Path]
    unlisted: list[ImageError]
    outside: list[ImageError]
    skipped: dict[str, int]


def find_images(folder: PathLike) -> list[Path]:
    """The images that `list_images` finds. Raises ImageError as it does, and if any folder cannot be listed."""
    listing = list_images(folder)
    if listing.unlisted:
        raise listing.unlisted[0]
    return listing.images


def list_images(folder: PathLike, *, follow_links: bool = False) -> Listing:
    """The images below `folder`: files with one of SUFFIXES, in upper or lower case, that are not hidden.

    Links within the folder are followed, each folder only once; links that lead out of the folder are only followed
    with `follow_links`. Raises ImageError if there is no such folder (see `check_folder`), or if no image is found
    (image.none, or image.unlisted if a folder cannot be listed).
    """
    check_folder(folder)
    walk = _Walk(Path(folder), follow_links)
    images = sorted(path for path in walk.files if is_picture(path.name))
    skipped = Counter(path.suffix.lower() for path in walk.files if not is_picture(path.name))
    for error in (*walk.unlisted, *walk.outside):
        LOG.warning("%s", error)
    if skipped:
        LOG.info("%s: skipped by suffix: %s", folder, dict(skipped))
    if not images:
        raise walk.unlisted[0] if walk.unlisted else _nothing(folder, skipped, len(walk.outside))
    return Listing(images=images, unlisted=walk.unlisted, outside=walk.outside, skipped=dict(skipped))


def _nothing(folder: PathLike, skipped: Counter[str], links: int) -> ImageError:
    fact = "holds no images"
    if skipped:
        fact += (
            f", but {skipped.total()} other files ({', '.join(suffix or 'no suffix' for suffix in sorted(skipped))})"
        )
    if links:
        fact += f"; {counted(links, 'link')} out of it not followed"
    return ImageError("image.none", fact, subject=folder, suffixes=", ".join("*" + suffix for suffix in SUFFIXES))


class _Walk:
    """A walk over all files below a folder that are not hidden."""

    def __init__(self, root: Path, follow_links: bool) -> None:
        self._root, self._follow_links = os.path.realpath(root), follow_links
        self._seen: set[str] = set()
        self.files: list[Path] = []
        self.unlisted: list[ImageError] = []
        self.outside: list[ImageError] = []
        for here, folders, names in os.walk(root, onerror=self._note, followlinks=True):
            real = os.path.realpath(here)
            if real in self._seen:
                folders.clear()
                continue
            self._seen.add(real)
            folders[:] = sorted(name for name in folders if self._is_wanted(Path(here, name)))
            self.files += [Path(here, name) for name in names if self._is_wanted(Path(here, name))]

    def _note(self, error: OSError) -> None:
        self.unlisted.append(
            ImageError("image.unlisted", f"cannot be listed: {error.strerror}", subject=error.filename)
        )

    def _is_wanted(self, path: Path) -> bool:
        if path.name.startswith("."):
            return False
        if self._follow_links or not path.is_symlink() or self._is_inside(os.path.realpath(path)):
            return True
        self.outside.append(ImageError("image.link", f"is a link that leads out of {self._root}", subject=path))
        return False

    def _is_inside(self, real: str) -> bool:
        return real == self._root or real.startswith(os.path.join(self._root, ""))
