"""Where results go: one JSON record a line, append-only, so that a run can be cut off anywhere and taken up again.

The first line of a store is a header with the settings of the run; results of different settings never share a file.
"""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, the rest works
    fcntl = None

from ringmark.data.files import _refuse_special, remedy
from ringmark.errors import StoreError, one_line

__all__ = ["Store", "read_records"]

VERSION = 1


class Store:
    """The results file at `path`, created or taken up again; records are dicts with a "sample_id".

    A last line torn by a crash is cut off. `done` holds the ids whose last record has no error, so that what failed
    is tried again. Use it as a context manager, or call `close()`.

    Raises StoreError if the file holds results of other settings, is not a store (it is then left as it is), is
    damaged before its last line, is in use by another run, or cannot be opened.
    """

    done: set[str]

    def __init__(self, path: str | os.PathLike, settings: dict) -> None:
        self.path = Path(path)
        header = _encode({"ringmark": VERSION, "settings": settings})
        self._file = _open(self.path)
        try:
            _lock(self._file, self.path)
            self.done = self._resume(header)
        except BaseException:
            self._file.close()
            raise

    def _resume(self, header: bytes) -> set[str]:
        """Checks what the file holds before anything is written, cuts a torn end, and says which ids are done."""
        self._file.seek(0)
        content = self._file.readall()
        if header.startswith(content) and content != header:  # new, or cut off while the header was written
            self._file.truncate(0)
            self._write(header)
            return set()
        parsed = _parse(self.path, content)
        _check_settings(self.path, parsed.settings, json.loads(header)["settings"])
        self._file.truncate(parsed.end)
        return {id for id, record in parsed.records.items() if _succeeded(record)}

    def append(self, record: dict) -> None:
        """Adds one record as one line in one write; NaN and infinities become null, arrays become lists.

        Raises StoreError without a "sample_id" that is a string, TypeError for values JSON cannot hold, and OSError
        when the line cannot be written whole; the file is then as it was before.
        """
        if not isinstance(record.get("sample_id"), str):
            raise StoreError(
                f"{one_line(self.path)}: a record needs a sample_id that is a string; got {record.get('sample_id')!r}"
            )
        self._write(_encode(record))
        (self.done.add if _succeeded(record) else self.done.discard)(record["sample_id"])

    def _write(self, line: bytes) -> None:
        try:
            written = self._file.write(line)
        except OSError as error:
            error.filename = str(self.path)
            raise
        if written != len(line):  # a full disk: half a line would spoil the next one
            self._file.truncate(os.fstat(self._file.fileno()).st_size - (written or 0))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def close(self) -> None:
        """Closes the file and lets go of its lock; harmless when repeated."""
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_records(path: str | os.PathLike) -> tuple[dict, list[dict]]:
    """The settings and the records of a store, in order of first appearance; the last record of a sample_id wins.

    A last line without its end is left out: the run crashed there, or is writing it now. Raises StoreError if the
    file cannot be read, is not a store or is damaged before its last line.
    """
    path = Path(path)
    try:
        _refuse_special(path)
        content = path.read_bytes()
    except OSError as error:
        raise StoreError(
            f"{one_line(path)}: cannot be read ({error.strerror}); check the name of the results file"
        ) from error
    parsed = _parse(path, content)
    return parsed.settings, list(parsed.records.values())


class _Parsed(NamedTuple):
    settings: dict
    records: dict[str, dict]  # the last record of each sample_id, in order of first appearance
    end: int  # bytes up to the end of the last whole line


def _open(path: Path):
    """The file, unbuffered, for reading and appending."""
    try:
        _refuse_special(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+b", buffering=0)
    except OSError as error:
        raise StoreError(
            f"{one_line(path)}: cannot be opened for writing ({error.strerror}); {remedy(error, 'choose another -o')}"
        ) from error


def _lock(file, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreError(
            f"{one_line(path)}: another run is writing to it; wait until it ends or choose another -o"
        ) from error
    except OSError:  # some network file systems have no locks; to go on is better than to refuse them
        pass


def _parse(path: Path, content: bytes) -> _Parsed:
    """Reads all whole lines; raises StoreError at the first that is not what it should be."""
    end = content.rfind(b"\n") + 1
    first, *lines = content[:end].split(b"\n")[:-1] or [b""]
    settings, records = _header(path, first), {}
    for number, line in enumerate(lines, 2):
        record = _decode(line)
        if not isinstance(record, dict) or not isinstance(record.get("sample_id"), str):
            raise StoreError(
                f"{one_line(path)}: line {number} is not a record; take that line out or choose another -o"
            )
        records[record["sample_id"]] = record
    return _Parsed(settings, records, end)


def _header(path: Path, line: bytes) -> dict:
    header = _decode(line)
    if not isinstance(header, dict) or "ringmark" not in header or not isinstance(header.get("settings"), dict):
        raise StoreError(f"{one_line(path)}: is not a file of ringmark results and is left as it is; name another file")
    if header["ringmark"] != VERSION:
        raise StoreError(
            f"{one_line(path)}: has format {header['ringmark']!r}, this ringmark knows {VERSION}; choose another -o"
        )
    return header["settings"]


def _check_settings(path: Path, old: dict, new: dict) -> None:
    missing = object()
    names = [name for name in {**old, **new} if old.get(name, missing) != new.get(name, missing)]
    if names:
        said = "; ".join(f"{name} was {_brief(old, name)}, is {_brief(new, name)}" for name in names)
        raise StoreError(f"{one_line(path)}: holds results of other settings ({one_line(said)}); choose another -o")


def _brief(settings: dict, name: str) -> str:
    text = json.dumps(settings[name]) if name in settings else "not set"
    return text if len(text) <= 60 else text[:57] + "..."


def _succeeded(record: dict) -> bool:
    return record.get("error") is None


def _encode(value: dict) -> bytes:
    # Escaped to ASCII: file names that are not UTF-8 reach us as lone surrogates, which UTF-8 cannot write.
    return json.dumps(_plain(value), allow_nan=False).encode() + b"\n"


def _decode(line: bytes) -> Any:
    """The JSON value, or None where there is none: no line of ours is null."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _plain(value: Any) -> Any:
    """The same value in what JSON can hold: bare NaN is no JSON, and arrays and paths have no form of their own."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
