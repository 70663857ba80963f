"""Results files: one JSON record per line, append-only, so that an interrupted run can be resumed at any point.

The first line is a header with the settings of the run; results of different settings never share a file.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ringmark.data.files import PathLike, open_regular
from ringmark.data.settings import differences, typed
from ringmark.errors import StoreError

if TYPE_CHECKING:
    from types import TracebackType

    from filelock import BaseFileLock

__all__ = ["Results", "read_records"]

LOG = logging.getLogger(__name__)

VERSION = 1
MAX_NESTING = 50
CODES = ("results.missing", "results.folder", "results.denied", "results.unreadable", "results.special")
"""Codes of `read_records` for files that cannot be opened."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Header:
    """The first line: the version of the format and the settings that the results depend on."""

    ringmark: int
    settings: dict[str, Any]


class Results:
    """The results file at `path`, created or resumed; records are dicts with a "sample_id".

    An incomplete last line, left by a crash, is removed. `done` holds the ids whose last record has no error, so failed
    items are tried again. `fields` names the required fields of a record without an error. A hidden lock file next to
    the results excludes other runs until `close()` or the end of the `with` block.

    Raises StoreError if the file holds results of other settings (results.settings), is not a results file
    (results.foreign; it is not changed), has a damaged line before the last (results.damaged) or a record without one
    of the fields (results.incomplete), is in use by another run (results.locked), or cannot be opened.
    """

    done: set[str]

    def __init__(self, path: PathLike, settings: Record, *, fields: Collection[str] = ()) -> None:
        self.path = Path(path)
        header = _encode({"ringmark": VERSION, "settings": settings})
        self._file = _open(self.path)
        try:
            self._lock = _lock(self.path)
        except BaseException:
            self._file.close()
            raise
        try:
            self.done = self._resume(header, fields)
        except BaseException:
            self.close()
            raise

    def _resume(self, header: bytes, fields: Collection[str]) -> set[str]:
        """Check the file before anything is written, remove an incomplete last line, and return the done ids."""
        self._file.seek(0)
        content = self._file.readall()
        if header.startswith(content) and content != header:  # new, or truncated while the header was written
            self._file.truncate(0)
            self._write(header)
            return set()
        parsed = _parse(self.path, content, fields)
        if changed := differences(parsed.settings, json.loads(header)["settings"]):
            fact = f"holds results of other settings ({'; '.join(changed)})"
            raise StoreError("results.settings", fact, subject=self.path)
        if parsed.end < len(content):
            LOG.info("%s: incomplete last line removed", self.path)
        self._file.truncate(parsed.end)
        return {sample_id for sample_id, record in parsed.records.items() if _succeeded(record)}

    def append(self, record: Record) -> None:
        """Append a record as one line in one write; NaN and infinities become null, arrays become lists.

        Raises StoreError (results.id) unless "sample_id" is a string, TypeError for values that JSON cannot represent,
        and OSError if the line cannot be written completely; the file is then unchanged.
        """
        if not isinstance(record.get("sample_id"), str):
            fact = f"the sample_id of a record must be a string, not {record.get('sample_id')!r}"
            raise StoreError("results.id", fact, subject=self.path)
        self._write(_encode(record))
        (self.done.add if _succeeded(record) else self.done.discard)(record["sample_id"])

    def _write(self, line: bytes) -> None:
        try:
            written = self._file.write(line)
        except OSError as error:
            error.filename = str(self.path)
            raise
        if written != len(line):  # full disk: a partial line would spoil the next one
            self._file.truncate(os.fstat(self._file.fileno()).st_size - (written or 0))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def close(self) -> None:
        """Close the file and release its lock; harmless when repeated."""
        self._file.close()
        if self._lock:
            self._lock.release()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_records(path: PathLike, *, fields: Collection[str] = ()) -> tuple[Record, list[Record]]:
    """The settings and records of a results file, in order of first appearance; the last record of a sample_id wins.

    An incomplete last line is skipped: the run crashed there, or is writing it. `fields` names the required fields of a
    record without an error. Raises StoreError as `Results` does, or if the file cannot be read.
    """
    with open_regular(path, StoreError, "results") as file:
        try:
            content = file.read()
        except OSError as error:
            fact = f"cannot be read: {error.strerror}"
            raise StoreError("results.unreadable", fact, subject=path) from error
    parsed = _parse(Path(path), content, fields)
    return parsed.settings, list(parsed.records.values())


class _Parsed(NamedTuple):
    settings: Record
    records: dict[str, Record]  # the last record of each sample_id, in order of first appearance
    end: int  # bytes up to the end of the last whole line


def _open(path: Path) -> FileIO:
    """The file, unbuffered, for reading and appending."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe could block forever
            raise OSError(errno.EINVAL, "not a regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+b", buffering=0)
    except OSError as error:
        code = "results.no-space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "results.unwritable"
        raise StoreError(code, f"cannot be opened for writing: {error.strerror}", subject=path) from error


def _lock(path: Path) -> BaseFileLock | None:
    from filelock import FileLock, Timeout

    target = Path(os.path.realpath(path))  # the same lock for all names of the file
    lock = FileLock(target.with_name(f".{target.name}.lock"), timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise StoreError("results.locked", "is being written by another run", subject=path) from error
    except (OSError, NotImplementedError):  # some network file systems have no locks; continue anyway
        LOG.warning("%s: cannot be locked here; do not write to it from two runs at once", path)
        return None
    return lock


def _parse(path: Path, content: bytes, fields: Collection[str]) -> _Parsed:
    """Read all complete lines; raises StoreError at the first invalid one."""
    end = content.rfind(b"\n") + 1
    first, *lines = content[:end].split(b"\n")[:-1] or [b""]
    settings, records = _settings(path, first), {}
    for number, line in enumerate(lines, 2):
        record = _decode(line)
        if not isinstance(record, dict) or not isinstance(record.get("sample_id"), str):
            raise StoreError("results.damaged", f"line {number} is not a record", subject=path, line=number)
        missing = [name for name in fields if name not in record] if _succeeded(record) else []
        if missing:
            fact = f"the record in line {number} has no {missing[0]}"
            raise StoreError("results.incomplete", fact, subject=path, line=number)
        records[record["sample_id"]] = record
    return _Parsed(settings, records, end)


def _settings(path: Path, line: bytes) -> Record:
    try:
        header = typed(Header, _decode(line))
    except ValueError as error:
        fact = "is not a ringmark results file"
        raise StoreError("results.foreign", fact, subject=path) from error
    if header.ringmark != VERSION:
        fact = f"has format {header.ringmark}, but this version of ringmark reads format {VERSION}"
        raise StoreError("results.version", fact, subject=path)
    return header.settings


def _succeeded(record: Record) -> bool:
    return record.get("error") is None


def _encode(value: Record) -> bytes:
    # Escaped to ASCII: file names that are not UTF-8 contain lone surrogates, which UTF-8 cannot encode.
    return json.dumps(_plain(value), allow_nan=False).encode() + b"\n"


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


def _plain(value: Any) -> Any:
    """The value in types that JSON supports: NaN becomes None, arrays lists and paths text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
