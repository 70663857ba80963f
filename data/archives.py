"""The pictures in tar and zip archives, one after the other, without unpacking anything to disk.

Names of entries are only names. Sizes are bounded as declared and as they turn out. Of an archive that is cut off,
everything before the end is read.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import BinaryIO, NamedTuple

from ringmark.data.locations import MAX_BYTES, filename, too_many_bytes
from ringmark.data.sources import is_picture
from ringmark.errors import ImageError

__all__ = ["ARCHIVES", "RATIO", "Entry", "bomb", "entries"]

OPENERS = {
    **{".tar": None, ".zip": None, ".tgz": gzip.open, ".tar.gz": gzip.open},
    **{".tar.bz2": bz2.open, ".tar.xz": lzma.open},
}
ARCHIVES = tuple(OPENERS)
ALLOWANCE, RATIO = 1 << 30, 200  # bytes that any archive may expand to, and times its own size
ZEROS = bytes(tarfile.BLOCKSIZE)
LATEST = 2**63 / 1e9  # seconds whose nanoseconds fit 64 bits
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, gzip.BadGzipFile)
"""What the standard library raises for damaged archives, besides OSError by bz2."""


class Entry(NamedTuple):
    """A picture in an archive, or the error that takes its place."""

    name: str
    mtime_ns: int | None
    content: bytes | ImageError


def entries(archive: BinaryIO, id: str, size: int | None) -> Iterator[Entry]:
    """The pictures in an open archive of `size` bytes, chosen by their names' suffixes.

    An archive that is damaged, cut off or expands to more than ALLOWANCE and RATIO times its size ends with an entry
    without a name, for source.damaged or source.bomb.
    """
    limit = ALLOWANCE + RATIO * (size or 0)
    read = _zip if filename(id).endswith(".zip") else _tar
    try:
        yield from read(archive, id, limit)
    except ImageError as error:
        yield Entry("", None, error)
    except (*DAMAGE, OSError) as error:
        if not isinstance(error, DAMAGE) and type(error) is not OSError:
            raise  # of the network, whose texts may quote addresses
        reason = str(error).partition("\n")[0] if isinstance(error, DAMAGE) else ""
        fact = f"is damaged or cut off ({reason or type(error).__name__})"
        yield Entry("", None, ImageError("source.damaged", fact, subject=id))


def _zip(archive: BinaryIO, id: str, limit: int) -> Iterator[Entry]:
    with zipfile.ZipFile(archive) as members:
        pictures = [info for info in members.infolist() if not info.is_dir() and is_picture(info.filename)]
        for info in pictures:
            limit -= info.file_size
            if limit < 0:
                raise bomb(id)
            is_too_large = info.file_size > MAX_BYTES
            content = too_many_bytes(f"{id}/{info.filename}") if is_too_large else _inflated(members, info, id)
            yield Entry(info.filename, _stamp(info), content)


def _stamp(info: zipfile.ZipInfo) -> int | None:
    """The modification time of an entry in nanoseconds, if it has a valid one."""
    try:
        return int(datetime(*info.date_time, tzinfo=timezone.utc).timestamp()) * 10**9
    except ValueError:
        return None


def _inflated(members: zipfile.ZipFile, info: zipfile.ZipInfo, id: str) -> bytes | ImageError:
    """An entry's bytes, of which no more are inflated than are declared; damage costs only this entry."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile inflates others without a bound
        return ImageError("image.compression", "is not compressed with deflate", subject=f"{id}/{info.filename}")
    try:
        with members.open(info) as file:
            return file.read(info.file_size)
    except (*DAMAGE, RuntimeError) as error:  # RuntimeError for encryption
        fact = f"is damaged, encrypted or cut off ({type(error).__name__})"
        return ImageError("image.damaged", fact, subject=f"{id}/{info.filename}")


def _tar(archive: BinaryIO, id: str, limit: int) -> Iterator[Entry]:
    opener = next((opener for suffix, opener in OPENERS.items() if filename(id).endswith(suffix) and opener), None)
    stream = _Forward(opener(archive) if opener else archive, limit, id)  # type: ignore[operator]
    with tarfile.open(fileobj=stream, mode="r:") as members:  # type: ignore[call-overload]
        while member := members.next():
            members.members = []  # otherwise it keeps all of them
            if member.type not in PLAIN or member.issparse() or not is_picture(member.name):
                continue
            is_too_large = member.size > MAX_BYTES
            content = too_many_bytes(f"{id}/{member.name}") if is_too_large else _piece(stream, member)
            stamp = int(member.mtime) * 10**9 if 0 <= member.mtime < LATEST else None
            yield Entry(member.name, stamp, content)
    if stream.last != ZEROS:  # tarfile takes any end for the end
        raise EOFError("no end of the archive")


def _piece(stream: _Forward, member: tarfile.TarInfo) -> bytes:
    stream.seek(member.offset_data)
    content = stream.read(member.size)
    if len(content) < member.size:
        raise EOFError(f"in {member.name}")
    return content


def bomb(id: str) -> ImageError:
    """The error for what expands too far."""
    return ImageError("source.bomb", f"expands to more than {RATIO} times its size", subject=id)


class _Forward:
    """A stream that is read once, forwards, for tarfile; reads of more than MAX_BYTES and endless streams are refused.

    tarfile goes back by one byte at most, which is remembered.
    """

    def __init__(self, stream: BinaryIO, limit: int, id: str) -> None:
        self._stream, self._limit, self._id = stream, limit, id
        self._at, self._back = 0, 0
        self.last = b""

    def tell(self) -> int:
        return self._at - self._back

    def seek(self, position: int) -> int:
        self._back = 0
        if position < self._at:
            self._back = self._at - position
            if self._back > 1:
                raise ValueError("a stream cannot go back")
        while self._at < position:
            if not self._next(min(1 << 20, position - self._at)):
                break
        return position

    def read(self, size: int) -> bytes:
        if size > MAX_BYTES:
            raise bomb(self._id)
        back, self._back = self._back, 0
        pieces, left = [self.last[-1:] * back], size - back
        while left > 0 and (piece := self._next(min(left, 1 << 20))):
            pieces.append(piece)
            left -= len(piece)
        self.last = b"".join(pieces) or self.last
        return b"".join(pieces)

    def _next(self, size: int) -> bytes:
        piece = self._stream.read(size)
        self._at += len(piece)
        if self._at > self._limit:
            raise bomb(self._id)
        self.last = piece or self.last
        return piece
