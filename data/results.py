"""Results: a journal of records, append-only, so that an interrupted run can be resumed at any point.

A journal is a file of JSON lines (`lines`) or a folder of Parquet parts (`parts`), as its path says. It holds the
settings of the run; results of different settings never share a journal. Tensors that belong to records are kept next
to it (`tensor_files`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ringmark.data.files import PathLike
from ringmark.data.lines import Lines, Record, plain, succeeded
from ringmark.data.locks import lock, lock_file
from ringmark.data.parts import Parts, are_parts
from ringmark.data.positions import Positions
from ringmark.data.tensor_files import Block, Rows, TensorFiles, TensorRow, Tensors
from ringmark.errors import StoreError

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from filelock import BaseFileLock

__all__ = ["Results", "ResultsFolder", "content_id"]

ID_DIGITS = 32  # hexadecimal; equal ids of different contents are out of the question


class Results:
    """The results at `path`, created or resumed; records are dicts with a "sample_id".

    They are Parquet parts if `path` is a folder or ends in .parquet, otherwise JSON lines. An incomplete last line,
    left by a crash, is removed. `records` are the last records of all ids, read from the file when they are asked for;
    memory holds about 20 bytes for each id (`positions`). `done` are the ids whose last record has no error, so failed
    items are tried again. `fields` names the required fields of a record without an error. A hidden lock file next to
    the results excludes other runs until `close()` or the end of the `with` block; several threads may read.

    Raises StoreError if these are results of other settings (results.settings), no results (results.foreign; nothing is
    changed), damaged before the last line (results.damaged, results.part), if a record lacks one of the fields
    (results.incomplete), or if the results are in use by another run (results.locked) or cannot be opened.
    """

    def __init__(self, path: PathLike, settings: Record, *, fields: Collection[str] = ()) -> None:
        self.path = Path(path)
        self._tensors = TensorFiles(self.path)
        self._journal: Lines | Parts = Parts(self.path) if are_parts(self.path) else Lines(self.path)
        self._lock: BaseFileLock | None = None
        self._index = Positions()  # of each id, twice the position of its last record, and one more if it is done
        self.records: Mapping[str, Record] = _Records(self, self._index)
        self.done: Set[str] = _Done(self, self._index)
        try:
            self._lock = _lock(self.path)
            self._journal.start(json.loads(json.dumps(plain(settings))), fields, self._note)
        except BaseException:
            self.close()
            raise

    def _note(self, position: int, record: Record) -> None:
        self._index[record["sample_id"]] = position << 1 | succeeded(record)

    def newest(self) -> Iterator[tuple[int, Record]]:
        """The last record of each id with its position, in the order in which they were written."""
        for number in self._index.numbers().tolist():
            yield number >> 1, self._journal.read(number >> 1)

    def position(self, sample_id: str) -> int:
        """The position of the last record of an id. Raises KeyError."""
        if (number := self._index.get(sample_id)) is None:
            raise KeyError(sample_id)
        return number >> 1

    def at(self, position: int) -> Record:
        """The record at a position, which need not be the last of its id."""
        return self._journal.read(position)

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
            added.append(plain(record))
        if tensors:
            rows = self._tensors.write(tensors)
            added = [record | {"tensors": row} for record, row in zip(added, rows, strict=True)]
        for position, record in zip(self._journal.write(added), added, strict=True):
            self._note(position, record)

    def tensors(self, ids: Iterable[str]) -> dict[str, dict[str, np.ndarray]]:
        """The tensors of these ids by name; each block of a file is read once.

        Ids that are not done are left out. So are those whose file is missing or damaged: they are no longer `done`.
        Raises StoreError for a file that cannot be read.
        """
        blocks: dict[Block, Rows] = {}
        found: dict[str, dict[str, np.ndarray]] = {}
        for sample_id in ids:
            if sample_id not in self.done:
                continue
            if row := TensorRow.of(self.records[sample_id]):
                if row.block not in blocks:
                    blocks[row.block] = self._tensors.read(row.block)
                if tensors := blocks[row.block].get(row.row):
                    found[sample_id] = tensors
                    continue
            self._index[sample_id] = (self._index.get(sample_id) or 0) & ~1
        return found

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

    def close(self) -> None:
        """Close the results and release their lock; harmless when repeated."""
        try:
            self._journal.close()
        finally:
            if self._lock:
                self._lock.release()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _Records(Mapping[str, Record]):
    """The last record of each id, in the order in which they were written."""

    def __init__(self, results: Results, index: Positions) -> None:
        self._results, self._index = results, index

    def __getitem__(self, sample_id: str) -> Record:
        return self._results.at(self._results.position(sample_id))

    def __iter__(self) -> Iterator[str]:
        return (record["sample_id"] for _, record in self._results.newest())

    def __len__(self) -> int:
        return len(self._index)


class _Done(Set[str]):
    """The ids that are done, in the order in which they were written."""

    def __init__(self, results: Results, index: Positions) -> None:
        self._results, self._index = results, index

    @classmethod
    def _from_iterable(cls, ids: Iterable[str]) -> set[str]:  # type: ignore[override]
        return set(ids)

    def __contains__(self, sample_id: object) -> bool:
        return isinstance(sample_id, str) and bool((self._index.get(sample_id) or 0) & 1)

    def __iter__(self) -> Iterator[str]:
        return (sample_id for sample_id in self._results.records if sample_id in self)

    def __len__(self) -> int:
        return int((self._index.numbers() & 1).sum())


class ResultsFolder:
    """Results files in a folder, one for each kind and its settings, opened on first use and closed together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, Results] = {}

    def of(self, name: str, settings: Record) -> Results:
        """The results of these settings, in a file named by their kind `name` and a digest. Raises as `Results`."""
        path = self.folder / f"{name}-{content_id(json.dumps(plain(settings), sort_keys=True))}.jsonl"
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


def _remove(path: Path) -> None:
    """Remove results, their tensors and their lock."""
    TensorFiles(path).remove()
    for file in (path, lock_file(path)):
        file.unlink(missing_ok=True)


def _lock(path: Path) -> BaseFileLock | None:
    from filelock import Timeout

    try:
        return lock(path, wait=False)
    except Timeout as error:
        raise StoreError("results.locked", "is being written by another run", subject=path) from error
