"""A journal of records as Parquet: a folder of parts, which DuckDB, pandas and Spark read as one table.

A part is never changed. The newest records lie beside them as JSON lines, in a file with the number of the part that
they become when it is full or the journal is closed, so a crash costs no more than it does with JSON lines alone.
"""

from __future__ import annotations

import io
import json
import os
import re
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ringmark.data.files import open_regular, write_atomic
from ringmark.data.lines import VERSION, Lines, Note, Record, check_settings, settings_in, unwritable
from ringmark.data.schema import record_of, row_of, table_of
from ringmark.errors import StoreError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["Parts", "are_parts", "check_pyarrow", "opened", "rows_of", "settings_of", "snapshot"]

ROWS = 10_000  # of a part
BLOCK = 100  # rows that are read at a time
HEADER = b"ringmark results"
PART, UNFINISHED = "part-{:06d}.parquet", "_unfinished-{:06d}.jsonl"  # readers of Parquet skip names with _
NUMBERED = re.compile(r"part-([0-9]{6,})\.parquet")


def are_parts(path: Path) -> bool:
    """Whether results at this path are Parquet: a folder, or a name that ends in .parquet."""
    return path.suffix.lower() == ".parquet" or path.is_dir()


class Parts:
    """The journal in a folder, which is created unless it is there.

    Raises StoreError: results.no-pyarrow without pyarrow, results.foreign for a folder of other files.
    """

    def __init__(self, path: Path) -> None:
        check_pyarrow(path)
        self.path = path
        self._tail: Lines | None = None
        self._unsaved: list[Record] = []
        self._lock = threading.Lock()  # between the number of the part and its unsaved records
        self._table, self._block = lru_cache(2)(self._read_table), lru_cache(4)(self._read_block)
        try:
            path.mkdir(parents=True, exist_ok=True)
            names = os.listdir(path)
        except OSError as error:
            raise unwritable(path, error) from error
        if foreign := [name for name in names if not (NUMBERED.fullmatch(name) or name.startswith(("_", ".")))]:
            raise StoreError("results.foreign", f"is not a folder of results: it holds {foreign[0]}", subject=path)

    def start(self, settings: Record, fields: Collection[str], note: Note) -> None:
        """Check all parts before anything is written, and note their records. Raises StoreError.

        `fields` are not checked: every field has a column.
        """
        self._settings = settings
        parts = list_parts(self.path)
        self._number = _next(parts)
        for part in parts:
            with opened(part) as file:
                check_settings(self.path, settings_of(part, file), settings)
                records = (record_of(row) for batch in file.iter_batches(batch_size=BLOCK) for row in rows_of(batch))
                for row, record in enumerate(records):
                    note(_position(number_of(part), row), record)
        self._new_tail()
        for row, record in enumerate(self._unsaved):
            note(_position(self._number, row), record)

    def write(self, records: Iterable[Record]) -> list[int]:
        """Append plain records; their positions.

        Raises OSError if that fails, and TypeError for a field that has no column.
        """
        records = list(records)
        for record in records:
            row_of(record)
        if not self._tail:
            raise ValueError("write to closed results")
        self._tail.write(records)
        number, row = self._number, len(self._unsaved)
        self._unsaved += records
        if len(self._unsaved) >= ROWS:
            self._save()
        return [_position(number, row + i) for i in range(len(records))]

    def read(self, position: int) -> Record:
        """The record at a position."""
        number, row = position >> 32, position & 0xFFFFFFFF
        with self._lock:
            if number == self._number:
                return self._unsaved[row]
        block, row = divmod(row, BLOCK)
        return self._block(number, block)[row]

    def _read_block(self, number: int, block: int) -> list[Record]:
        return list(map(record_of, rows_of(self._table(number).slice(block * BLOCK, BLOCK))))

    def _read_table(self, number: int) -> pa.Table:
        with opened(self.path / PART.format(number)) as file:
            return file.read()

    def close(self) -> None:
        """Write the last part; harmless when repeated."""
        if self._unsaved:
            self._save()
        if self._tail:
            self._tail.close()
            if self._number:  # otherwise only the lines hold the settings
                self._tail.path.unlink()
        self._tail = None

    def _new_tail(self) -> None:
        """Open the lines of the next part, and remove those of parts that are written."""
        tail = Lines(self.path / UNFINISHED.format(self._number))
        try:
            tail.start(self._settings, (), lambda _, record: self._unsaved.append(record))
        except BaseException:
            tail.close()
            raise
        self._tail = tail
        for stale in set(self.path.glob("_unfinished-*.jsonl")) - {tail.path}:
            stale.unlink()

    def _save(self) -> None:
        """Write the newest records as a part and start new lines."""
        import pyarrow.parquet as pq

        header = json.dumps({"ringmark": VERSION, "settings": self._settings}).encode()
        content = io.BytesIO()
        pq.write_table(table_of(self._unsaved, {HEADER: header}), content, compression="zstd")
        write_atomic(self.path / PART.format(self._number), content.getvalue())
        if self._tail:
            self._tail.close()
        with self._lock:
            self._tail, self._unsaved, self._number = None, [], self._number + 1
        self._new_tail()


def _position(number: int, row: int) -> int:
    """The position of a row of a part."""
    return number << 32 | row


def check_pyarrow(path: Path) -> None:
    """Raises StoreError (results.no-pyarrow) unless pyarrow is installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise StoreError("results.no-pyarrow", "Parquet needs pyarrow, which is not installed", subject=path) from error


def list_parts(folder: Path) -> list[Path]:
    """The parts in a folder, the oldest first."""
    return sorted((path for path in folder.iterdir() if NUMBERED.fullmatch(path.name)), key=number_of)


def number_of(part: Path) -> int:
    """The number in the name of a part."""
    return int(NUMBERED.sub(r"\1", part.name))


def snapshot(folder: Path) -> tuple[list[Path], BinaryIO | None]:
    """The parts in a folder, the oldest first, and the open file of the newest records if any are in no part.

    Another run may write meanwhile: a part may appear and its lines vanish between the listing and the opening.
    """
    parts = list_parts(folder)
    while True:
        try:
            return parts, open_regular(folder / UNFINISHED.format(_next(parts)), StoreError, room="results")
        except StoreError as error:
            if error.code != "results.missing":
                raise
        before, parts = parts, list_parts(folder)
        if parts == before:
            return parts, None


def _next(parts: list[Path]) -> int:
    """The number of the part that follows these."""
    return number_of(parts[-1]) + 1 if parts else 0


@contextmanager
def opened(part: Path) -> Iterator[pq.ParquetFile]:
    """A part opened for reading. Raises StoreError (results.part) for damage found meanwhile."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(part) as file:
            yield file
    except StoreError:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError("results.part", f"is damaged or cannot be read ({reason})", subject=part) from error


def settings_of(part: Path, file: pq.ParquetFile) -> Record:
    """The settings in the header of a part. Raises StoreError (results.foreign, results.version)."""
    return settings_in(part, (file.schema_arrow.metadata or {}).get(HEADER, b"") + b"\n")


def rows_of(batch: pa.RecordBatch | pa.Table) -> list[Record]:
    """The rows of a batch or a table, with maps as dicts."""
    rows: list[Record] = batch.to_pylist(maps_as_pydicts="strict")
    return rows
