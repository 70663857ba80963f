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
from ringmark.data.locations import (
    MAX_BYTES,
    Location,
    filename,
    has_scheme,
    is_web,
    public,
    too_many_bytes,
)
from ringmark.data.sources import SUFFIXES, Listing, is_picture, list_images, stamp_of
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
    locations = _expanded(source)
    return (item for location in locations for item in _guarded(location, follow_links))


def _guarded(location: Location, follow_links: bool) -> Iterator[Item]:
    try:
        yield from _inside(location, follow_links)
    except ImageError as error:
        yield Item.failed(location.id, error)


def _expanded(source: str) -> Sequence[Location]:
    """The location of a source, or those that its pattern matches. Raises ImageError."""
    if not has_scheme(source):
        paths = [source] if os.path.lexists(source) else sorted(glob.glob(source, recursive=True))
        locations = [Location.at(os.path.abspath(path)).named(path) for path in paths]
    elif glob.has_magic(source) and not is_web(source):  # where ? begins the parameters
        pattern = Location.at(source)
        locations = [pattern.below(path, facts) for path, facts in pattern.glob()]
    else:
        locations = [Location.at(source).checked()]
    if not locations:
        raise ImageError("source.missing", "does not exist", subject=public(source))
    return locations


def _inside(location: Location, follow_links: bool) -> Iterator[Item]:
    """The items in a location, by the kind that its name says it is."""
    name = filename(location.id)
    if location.is_local and os.path.isdir(location.path):
        yield from listed_items(list_images(location.id, follow_links=follow_links))
    elif name.endswith(ARCHIVES):
        yield from _in_archive(location)
    elif name.endswith(TABLES):
        yield from _in_table(location)
    elif name.endswith(LISTS):
        yield from _in_list(location)
    elif name.endswith(SUFFIXES) or location.is_local:
        yield _at(location)
    else:
        for path, facts in location.walk():
            if is_picture(path):
                yield _at(location.below(path, facts))


def _at(location: Location) -> Item:
    if location.is_local:
        path = Path(location.id)
        return Item(id=location.id, read=partial(_read_file, path, location.id), **stamp_of(path))
    is_too_large = (location.stamp.get("size") or 0) > MAX_BYTES
    read = partial(_refuse, too_many_bytes(location.id)) if is_too_large else partial(_fetch, location)
    return Item(id=location.id, read=read, **location.stamp)


def _fetch(location: Location, sizes_of: SizesOf) -> list[Sample]:
    return samples_in(location.read(), sizes_of, id=location.id)


def _in_archive(location: Location) -> Iterator[Item]:
    size = location.facts().get("size")
    with location.opened(seekable=filename(location.id).endswith(".zip")) as file:
        for entry in entries(file, location.id, size):
            id = f"{location.id}/{entry.name}" if entry.name else location.id
            if isinstance(entry.content, ImageError):
                yield Item.failed(id, entry.content)
            else:
                yield Item.holding(id, entry.content, entry.mtime_ns)


def _in_table(location: Location) -> Iterator[Item]:
    with location.opened(seekable=True) as file:
        for row in rows(file, location.id):
            if isinstance(row.value, str):
                yield _named(location, row.value)
            elif isinstance(row.value, ImageError):
                yield Item.failed(row.id, row.value)
            else:
                yield Item.holding(row.id, row.value)


def _in_list(location: Location) -> Iterator[Item]:
    with location.opened() as file:
        for path in listed(file, location.id):
            yield _named(location, path)


def _named(location: Location, path: str) -> Item:
    """The picture at a path in a list: an address, or a path relative to the list; see `Location.may_name`."""
    try:
        if has_scheme(path) and location.may_name(path):
            return _at(Location.at(path))
        if location.is_local:
            return _at(location.named(os.path.join(os.path.dirname(location.id), path)))
        if has_scheme(path) or path.startswith("/") or ".." in path.split("/"):
            raise ImageError("source.outside", "is outside of the folder of its list", subject=public(path))
        folder = location.path.partition("?")[0] if is_web(location.id) else location.path
        return _at(location.below(f"{posixpath.dirname(folder)}/{path}"))
    except ImageError as error:
        return Item.failed(public(path), error)
