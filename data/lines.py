"""A journal of records as JSON lines, append-only, so that a crash costs at most the last line.

The first line is a header with the settings of the run, every further line a record.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

from ringmark.data.settings import differences, typed
from ringmark.errors import StoreError

__all__ = ["VERSION", "Header", "Lines", "Note", "Record", "check_settings", "entries", "iterate", "plain", "succeeded"]

LOG = logging.getLogger(__name__)

VERSION = 1
MAX_NESTING = 50
SIMPLE = (str, bool, int)
BLOCK = 1 << 13  # bytes that are read to find the end of a line

Record = dict[str, Any]
Note = Callable[[int, Record], object]
"""Takes the position and the content of each record of a journal."""


@dataclass(frozen=True)
class Header:
    """The version of the format and the settings that the results depend on."""

    ringmark: int
    settings: dict[str, Any]


class Lines:
    """The journal at `path`, opened for appending. Raises StoreError if it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open(path)
        self._lock = threading.Lock()  # reading and writing both move the file's one position

    def start(self, settings: Record, fields: Collection[str], note: Note) -> None:
        """Check the file before anything is written, note its records, and remove an incomplete last line."""
        header = _encode({"ringmark": VERSION, "settings": settings})
        self._file.seek(0)
        with open(self._file.fileno(), "rb", closefd=False) as file:
            first = file.readline()
            if first != header and header.startswith(first):  # new, or truncated while the header was written
                self._file.truncate(0)
                self._write(header)
                return
            check_settings(self.path, settings_in(self.path, first), settings)
            end = len(first)
            for entry in entries(self.path, file, fields):
                note(entry.begin, entry.record)
                end = entry.end
        if end < self._size:
            LOG.info("%s: incomplete last line removed", self.path)
            self._file.truncate(end)

    def write(self, records: Iterable[Record]) -> list[int]:
        """Append plain records in one write; their positions. Raises OSError if that fails; the file is unchanged."""
        begin, lines = self._size, list(map(_encode, records))
        self._write(b"".join(lines))
        return list(accumulate(map(len, lines[:-1]), initial=begin)) if lines else []

    def read(self, position: int) -> Record:
        """The record at a position. Raises StoreError if another program has changed the file."""
        content = b""
        with self._lock:
            self._file.seek(position)
            while b"\n" not in content and (block := self._file.read(BLOCK)):
                content += block
        record = _decode(content[: content.find(b"\n") + 1])
        if not _is_record(record):
            raise StoreError("results.changed", "was changed by another program", subject=self.path)
        return record

    def _write(self, lines: bytes) -> None:
        try:
            with self._lock:
                written = self._file.write(lines)
        except OSError as error:
            error.filename = str(self.path)
            raise
        if written != len(lines):  # full disk: a partial line would spoil the next one
            self._file.truncate(self._size - (written or 0))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    @property
    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        self._file.close()


class Entry(NamedTuple):
    """A record, and where its line begins and ends in the file."""

    begin: int
    end: int
    record: Record


def entries(path: Path, file: BinaryIO, fields: Collection[str] = ()) -> Iterator[Entry]:
    """The records after the header, one by one, up to an incomplete last line.

    `fields` are required of a record without an error. Raises StoreError at the first invalid line.
    """
    end = file.tell()
    for number, line in enumerate(file, 2):
        begin, end = end, end + len(line)
        if not line.endswith(b"\n"):
            return
        record = _decode(line)
        if not _is_record(record):
            raise StoreError("results.damaged", f"line {number} is not a record", subject=path, line=number)
        missing = [name for name in fields if name not in record] if succeeded(record) else []
        if missing:
            fact = f"the record in line {number} has no {missing[0]}"
            raise StoreError("results.incomplete", fact, subject=path, line=number)
        yield Entry(begin, end, record)


def iterate(path: Path, file: BinaryIO) -> Iterator[Record]:
    """The records in an open file, as `entries` gives them. Raises StoreError."""
    file.seek(0)
    settings_in(path, file.readline())
    for entry in entries(path, file):
        yield entry.record


def settings_in(path: Path, line: bytes) -> Record:
    """The settings in the header, a whole line. Raises StoreError (results.foreign, results.version)."""
    try:
        header = typed(Header, _decode(line) if line.endswith(b"\n") else None)
    except ValueError as error:
        fact = "is not a ringmark results file"
        raise StoreError("results.foreign", fact, subject=path) from error
    if header.ringmark != VERSION:
        fact = f"has format {header.ringmark}, but this version of ringmark reads format {VERSION}"
        raise StoreError("results.version", fact, subject=path)
    return header.settings


def check_settings(path: Path, found: Record, wanted: Record) -> None:
    """Raises StoreError (results.settings), naming each difference."""
    if changed := differences(found, wanted):
        fact = f"holds results of other settings ({'; '.join(changed)})"
        raise StoreError("results.settings", fact, subject=path)


def succeeded(record: Record) -> bool:
    """Whether a record has no error."""
    return record.get("error") is None


def plain(value: Any) -> Any:
    """The value in types that JSON supports: NaN becomes None, arrays lists and paths text."""
    if value is None or type(value) in SIMPLE:
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open(path: Path) -> FileIO:
    """The file, unbuffered, for reading and appending."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe could block forever
            raise OSError(errno.EINVAL, "not a regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+b", buffering=0)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> StoreError:
    """The error for results that cannot be opened for writing."""
    code = "results.no-space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "results.unwritable"
    return StoreError(code, f"cannot be opened for writing: {error.strerror}", subject=path)


def _is_record(value: Any) -> TypeGuard[Record]:
    return isinstance(value, dict) and isinstance(value.get("sample_id"), str)


def _encode(value: Record) -> bytes:
    """A line of JSON."""
    # Escaped to ASCII: file names that are not UTF-8 contain lone surrogates, which UTF-8 cannot encode.
    return json.dumps(value, allow_nan=False).encode() + b"\n"


def _decode(line: bytes) -> Any:
    """The JSON value, or None if invalid; valid lines are never null or nested deeper than MAX_NESTING."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    brackets = line.count(b"{") + line.count(b"[")  # a cheap upper bound
    return value if brackets <= MAX_NESTING or _nesting(value) <= MAX_NESTING else None


def _nesting(value: Any) -> int:
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, (dict, list))]:
        depth += 1
        level = [item for v in level for item in (v.values() if isinstance(v, dict) else v)]
    return depth
