"""Results files: one JSON record per line, append-only, so that an interrupted run can be resumed at any point.

The first line is a header with the settings of the run; results of different settings never share a file. Tensors that
belong to records are kept in a folder next to the file, one safetensors file for the records appended together: a file
for each image is slow to write and to copy, and in one file for all a crash or damage would cost more than a batch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ringmark.data.files import PathLike, open_regular, read_tensors, write_atomic
from ringmark.data.settings import differences, typed
from ringmark.errors import StoreError

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from filelock import BaseFileLock

__all__ = ["Results", "ResultsFolder", "content_id", "read_records"]

LOG = logging.getLogger(__name__)

VERSION = 1
MAX_NESTING = 50
ID_DIGITS = 32  # hexadecimal; equal ids of different contents are out of the question
MAX_BYTES = 8 << 30
CODES = ("results.missing", "results.folder", "results.denied", "results.unreadable", "results.special")
"""Codes of `read_records` for files that cannot be opened."""

Record = dict[str, Any]
Tensors = Mapping[str, "np.ndarray"]


@dataclass(frozen=True)
class Header:
    """The first line: the version of the format and the settings that the results depend on."""

    ringmark: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where the tensors of a record are: the number of their file, its SHA-256, and the record's row in it."""

    file: int
    sha256: str
    row: int


class Results:
    """The results file at `path`, created or resumed; records are dicts with a "sample_id".

    An incomplete last line, left by a crash, is removed. `records` holds the last record of each id, `done` the ids
    whose last record has no error, so failed items are tried again. `fields` names the required fields of a record
    without an error. A hidden lock file next to the results excludes other runs until `close()` or the end of the
    `with` block.

    Raises StoreError if the file holds results of other settings (results.settings), is not a results file
    (results.foreign; it is not changed), has a damaged line before the last (results.damaged) or a record without one
    of the fields (results.incomplete), is in use by another run (results.locked), or cannot be opened.
    """

    done: set[str]
    records: dict[str, Record]

    def __init__(self, path: PathLike, settings: Record, *, fields: Collection[str] = ()) -> None:
        self.path = Path(path)
        header = _encode(_plain({"ringmark": VERSION, "settings": settings}))
        self._file = _open(self.path)
        try:
            self._lock = _lock(self.path)
        except BaseException:
            self._file.close()
            raise
        try:
            self.records = self._resume(header, fields)
        except BaseException:
            self.close()
            raise
        self.done = {sample_id for sample_id, record in self.records.items() if _succeeded(record)}

    def _resume(self, header: bytes, fields: Collection[str]) -> dict[str, Record]:
        """Check the file before anything is written, remove an incomplete last line, and return the records."""
        self._file.seek(0)
        content = self._file.readall()
        if header.startswith(content) and content != header:  # new, or truncated while the header was written
            self._file.truncate(0)
            self._write(header)
            return {}
        parsed = _parse(self.path, content, fields)
        if changed := differences(parsed.settings, json.loads(header)["settings"]):
            fact = f"holds results of other settings ({'; '.join(changed)})"
            raise StoreError("results.settings", fact, subject=self.path)
        if parsed.end < len(content):
            LOG.info("%s: incomplete last line removed", self.path)
            self._file.truncate(parsed.end)
        return parsed.records

    def append(self, record: Record) -> None:
        """Append a record as one line; see `extend`."""
        self.extend([record])

    def extend(self, records: Iterable[Record], tensors: Sequence[Tensors] = ()) -> None:
        """Append records as lines in one write; NaN and infinities become null, arrays become lists.

        `tensors`, if any, has one mapping for each record. They are written first, so no record is without its tensors,
        and only the owner can read them, since the noise of marked images reveals the key.

        Raises StoreError (results.id) unless each "sample_id" is a string, TypeError for values that JSON cannot
        represent, and OSError if the lines cannot be written completely; the file is then unchanged.
        """
        added: list[Record] = []
        for record in records:
            if not isinstance(record.get("sample_id"), str):
                fact = f"the sample_id of a record must be a string, not {record.get('sample_id')!r}"
                raise StoreError("results.id", fact, subject=self.path)
            added.append(_plain(record))
        if tensors:
            places = self._store(tensors)
            added = [record | {"tensors": place} for record, place in zip(added, places, strict=True)]
        self._write(b"".join(map(_encode, added)))
        for record in added:
            self.records[record["sample_id"]] = record
            (self.done.add if _succeeded(record) else self.done.discard)(record["sample_id"])

    def _store(self, tensors: Sequence[Tensors]) -> list[Record]:
        """Write tensors to a file and return their places.

        The file's number is the length of the results: a file whose records were lost in a crash is written again.
        """
        import numpy as np
        from safetensors.numpy import save  # which writes the bytes as they lie in memory

        rows = enumerate(tensors)
        named = {f"{row}/{name}": np.asarray(x, order="C") for row, some in rows for name, x in some.items()}
        content = save(named, {"ringmark tensors": str(VERSION)})
        number, digest = os.fstat(self._file.fileno()).st_size, hashlib.sha256(content).hexdigest()
        write_atomic(_tensor_file(self.path, number), content, 0o600)
        return [asdict(Place(file=number, sha256=digest, row=row)) for row in range(len(tensors))]

    def tensors(self, ids: Iterable[str]) -> dict[str, dict[str, np.ndarray]]:
        """The tensors of these ids by name; each file is read once.

        Ids that are not done are left out. So are those whose file is missing or damaged: they are no longer `done`.
        Raises StoreError for a file that cannot be read.
        """
        wanted = [sample_id for sample_id in ids if sample_id in self.done]
        files: dict[tuple[int, str], dict[str, dict[str, np.ndarray]]] = {}
        found: dict[str, dict[str, np.ndarray]] = {}
        for sample_id in wanted:
            if place := _place(self.records[sample_id]):
                file = place.file, place.sha256
                files[file] = files[file] if file in files else self._load(*file)
                if row := files[file].get(str(place.row)):
                    found[sample_id] = row
        self.done.difference_update(set(wanted) - found.keys())
        return found

    def _load(self, number: int, digest: str) -> dict[str, dict[str, np.ndarray]]:
        """The tensors in a file by row; nothing, and a warning, if it is missing or damaged."""
        path = _tensor_file(self.path, number)
        rows: dict[str, dict[str, np.ndarray]] = {}
        try:
            with open_regular(path) as file:
                if hashlib.sha256(file.read()).hexdigest() != digest:
                    raise StoreError("file.damaged", "is damaged", subject=path)
            for label, values in read_tensors(path, max_bytes=MAX_BYTES).tensors.items():
                row, _, name = label.partition("/")
                rows.setdefault(row, {})[name] = values
        except StoreError as error:
            if error.code not in ("file.missing", "file.damaged"):
                raise
            LOG.warning("%s; its contents are computed again", error)
        return rows

    def complete(
        self, ids: Sequence[str], make: Callable[[list[int]], Sequence[Tensors]]
    ) -> list[dict[str, np.ndarray]]:
        """The tensors of each id, in order.

        `make` gets the positions of those that are not done, the first of equal ones, and returns their tensors, which
        are appended with a record for each.
        """
        found = self.tensors(ids)
        missing: dict[str, int] = {}
        for position, sample_id in enumerate(ids):
            if sample_id not in found:
                missing.setdefault(sample_id, position)
        if missing:
            made = [dict(tensors) for tensors in make(list(missing.values()))]
            self.extend([{"sample_id": sample_id} for sample_id in missing], made)
            found |= zip(missing, made, strict=True)
        return [found[sample_id] for sample_id in ids]

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


class ResultsFolder:
    """Results files in a folder, one for each kind and its settings, opened on first use and closed together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, Results] = {}

    def of(self, name: str, settings: Record) -> Results:
        """The results of these settings, in a file named by their kind `name` and a digest. Raises as `Results`."""
        path = self.folder / f"{name}-{content_id(json.dumps(_plain(settings), sort_keys=True))}.jsonl"
        if path not in self._open:
            self._open[path] = Results(path, settings)
        return self._open[path]

    def close(self) -> None:
        """Close all files; harmless when repeated."""
        for results in self._open.values():
            results.close()
        self._open.clear()

    def remove(self) -> None:
        """Close and remove all results with their tensors, and the folder unless it holds other files."""
        self.close()
        for path in self.folder.glob(f"*-{'[0-9a-f]' * ID_DIGITS}.jsonl"):
            _remove(path)
        with suppress(OSError):
            self.folder.rmdir()

    def __enter__(self) -> ResultsFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def content_id(*parts: object) -> str:
    """A sample_id for what is computed from `parts`: arrays and tensors by their values, all else by its text."""
    import numpy as np

    digest = hashlib.sha256()
    for part in parts:
        if hasattr(part, "__array__"):
            values = np.asarray(part)
            digest.update(f"{values.dtype.str} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).data)
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:ID_DIGITS]


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


def _place(record: Record) -> Place | None:
    """Where the tensors of a record are; None if it has none."""
    try:
        return typed(Place, record.get("tensors"))
    except ValueError:
        return None


def _tensor_folder(path: Path) -> Path:
    target = Path(os.path.realpath(path))  # the same folder for all names of the results
    return target.with_name(f"{target.name}.tensors")


def _tensor_file(path: Path, number: int) -> Path:
    """A file of tensors; there is a folder for each MiB of results, so that none gets too large to list."""
    return _tensor_folder(path) / f"{number >> 20:04d}" / f"{number:010d}.safetensors"


def _remove(path: Path) -> None:
    """Remove results, their tensors and their lock."""
    folder = _tensor_folder(path)
    for file in (*folder.glob("*/*.safetensors"), path, _lock_file(path)):
        file.unlink(missing_ok=True)
    for place in (*folder.glob("*"), folder):
        with suppress(OSError):
            place.rmdir()


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

    lock = FileLock(_lock_file(path), timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise StoreError("results.locked", "is being written by another run", subject=path) from error
    except (OSError, NotImplementedError):  # some network file systems have no locks; continue anyway
        LOG.warning("%s: cannot be locked here; do not write to it from two runs at once", path)
        return None
    return lock


def _lock_file(path: Path) -> Path:
    target = Path(os.path.realpath(path))  # the same lock for all names of the file
    return target.with_name(f".{target.name}.lock")


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
