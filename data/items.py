"""The pictures of any source, one by one: folders, buckets, web addresses, archives, tables, lists and patterns.

A source is walked lazily, and nothing is read before it is asked for, except what lies in an archive or a table.
"""

from __future__ import annotations

import glob
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from ringmark.data.archives import ARCHIVES, entries
from ringmark.data.images import Sample, SizesOf, read_samples, samples_in
from ringmark.data.places import MAX_BYTES, Place, has_scheme, is_web, public, stamp_in, too_many_bytes
from ringmark.data.sources import SUFFIXES, Listing, list_images, stamp_of
from ringmark.data.tables import LISTS, TABLES, listed, rows
from ringmark.errors import ImageError

__all__ = ["Item", "items_of", "listed_items"]


@dataclass(frozen=True)
class Item:
    """A picture of a source: its id, its size in bytes and modification time if they are known, and how to read it.

    `read` fits the picture to sizes, as `read_samples` does, or raises ImageError, also for what took the place of a
    picture: a folder that cannot be listed, an archive that is cut off.
    """

    id: str
    read: Callable[[SizesOf], list[Sample]]
    size: int | None = None
    mtime_ns: int | None = None

    @classmethod
    def failed(cls, id: str, error: ImageError) -> Item:
        """An item that cannot be read."""
        return cls(id=id, read=partial(_refuse, error))

    @classmethod
    def holding(cls, id: str, content: bytes, mtime_ns: int | None = None) -> Item:
        """An item of which the bytes are here."""
        return cls(id=id, read=partial(samples_in, content, id=id), size=len(content), mtime_ns=mtime_ns)

    @property
    def stamp(self) -> dict[str, int | None]:
        """Size and modification time, which change when the picture does."""
        return {"size": self.size, "mtime_ns": self.mtime_ns}


def _refuse(error: ImageError, _: SizesOf) -> NoReturn:
    raise error


def listed_items(listing: Listing, folder: Path | None = None) -> Iterator[Item]:
    """The items of a listed folder; ids are relative to `folder` if it is given."""
    for error in listing.unlisted:
        yield Item.failed(str(error.path.relative_to(folder) if folder else error.path), error)
    for path in listing.images:
        id = str(path.relative_to(folder) if folder else path)
        yield Item(id=id, read=partial(_read_file, path, id), **stamp_of(path))


def _read_file(path: Path, id: str, sizes_of: SizesOf) -> list[Sample]:
    return read_samples(path, sizes_of, id=id)


def items_of(source: str, *, follow_links: bool = False) -> Iterator[Item]:
    """The items of a source; ids are whole paths, or addresses without what they keep secret.

    A source is a folder, a bucket or a prefix in it, an archive, a table, a list of paths, a picture, or a pattern that
    matches such; a name's suffix says which. What cannot be read is an item that fails. Raises ImageError at once if
    the source cannot be reached.
    """
    places = _expanded(source)
    return (item for place in places for item in _guarded(place, follow_links))


def _guarded(place: Place, follow_links: bool) -> Iterator[Item]:
    try:
        yield from _inside(place, follow_links)
    except ImageError as error:
        yield Item.failed(place.id, error)


def _expanded(source: str) -> Sequence[Place]:
    """The place of a source, or those that its pattern matches. Raises ImageError."""
    if not has_scheme(source):
        paths = [source] if os.path.lexists(source) else sorted(glob.glob(source, recursive=True))
        places = [Place.at(os.path.abspath(path)).named(path) for path in paths]
    elif glob.has_magic(source) and not is_web(source):  # where ? begins the parameters
        pattern = Place.at(source)
        places = [pattern.below(path) for path in pattern.glob()]
    else:
        places = [Place.at(source)]
        places[0].check()
    if not places:
        raise ImageError("source.missing", "does not exist", subject=public(source))
    return places


def _inside(place: Place, follow_links: bool) -> Iterator[Item]:
    """The items in a place, by the kind that its name says it is."""
    name = place.id.partition("?")[0].lower() if is_web(place.id) else place.id.lower()
    if place.is_local and os.path.isdir(place.path):
        yield from listed_items(list_images(place.id, follow_links=follow_links))
    elif name.endswith(ARCHIVES):
        yield from _in_archive(place)
    elif name.endswith(TABLES):
        yield from _in_table(place)
    elif name.endswith(LISTS):
        yield from _in_list(place)
    elif name.endswith(SUFFIXES) or place.is_local:
        yield _at(place)
    else:
        for path, facts in place.walk():
            if path.lower().endswith(SUFFIXES) and not posixpath.basename(path).startswith("."):
                yield _at(place.below(path), **stamp_in(facts))


def _at(place: Place, size: int | None = None, mtime_ns: int | None = None) -> Item:
    if place.is_local:
        path = Path(place.id)
        return Item(id=place.id, read=partial(_read_file, path, place.id), **stamp_of(path))
    read = partial(_refuse, too_many_bytes(place.id)) if (size or 0) > MAX_BYTES else partial(_fetch, place)
    return Item(id=place.id, read=read, size=size, mtime_ns=mtime_ns)


def _fetch(place: Place, sizes_of: SizesOf) -> list[Sample]:
    return samples_in(place.read(), sizes_of, id=place.id)


def _in_archive(place: Place) -> Iterator[Item]:
    size = place.facts().get("size")
    with place.opened(seekable=place.id.lower().endswith(".zip")) as file:
        for entry in entries(file, place.id, size):
            id = f"{place.id}/{entry.name}" if entry.name else place.id
            if isinstance(entry.content, ImageError):
                yield Item.failed(id, entry.content)
            else:
                yield Item.holding(id, entry.content, entry.mtime_ns)


def _in_table(place: Place) -> Iterator[Item]:
    with place.opened(seekable=True) as file:
        for row in rows(file, place.id):
            id = f"{place.id}#{row.number}"
            if row.path is not None:
                yield _named(place, row.path)
            elif row.content is not None:
                yield Item.holding(id, row.content)
            else:
                yield Item.failed(id, ImageError("image.empty", "has no bytes", subject=id))


def _in_list(place: Place) -> Iterator[Item]:
    with place.opened() as file:
        for path in listed(file, place.id):
            yield _named(place, path)


def _named(place: Place, path: str) -> Item:
    """The picture at a path in a list: an address, or a path relative to the list; only a list here may name any."""
    try:
        if has_scheme(path):
            return _at(Place.at(path))
        if place.is_local:
            here = os.path.join(os.path.dirname(place.id), path)
            return _at(place.named(here))
        if path.startswith("/") or ".." in path.split("/"):
            raise ImageError("source.outside", "is outside of the folder of its list", subject=path)
        folder = place.path.partition("?")[0] if is_web(place.id) else place.path
        return _at(place.below(f"{posixpath.dirname(folder)}/{path}"))
    except ImageError as error:
        return Item.failed(public(path), error)
