"""Read results, whole or as a stream of tables, whether they are JSON lines or Parquet parts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ringmark.data.batches import chunks
from ringmark.data.files import PathLike, open_regular
from ringmark.data.lines import Record, entries, iterate, settings_in
from ringmark.data.parts import are_parts, check_pyarrow, opened, rows_of, settings_of, snapshot
from ringmark.data.schema import FIELDS, record_of, row_of
from ringmark.errors import StoreError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

__all__ = ["newest_records", "read_records", "read_results", "read_settings"]

ROWS = 20_000  # of a table


def read_records(path: PathLike, *, fields: Collection[str] = ()) -> tuple[Record, list[Record]]:
    """The settings and records of results, in order of first appearance; the last record of a sample_id wins.

    An incomplete last line is skipped: the run crashed there, or is writing it. `fields` names the required fields of a
    record without an error. Raises StoreError as `Results` does, or if the results cannot be read.
    """
    if are_parts(Path(path)):
        with Source(Path(path)) as source:
            return source.settings, list({record["sample_id"]: record for record in source.records()}.values())
    with open_regular(path, StoreError, room="results") as file:
        try:
            settings = settings_in(Path(path), file.readline())
            records = {entry.record["sample_id"]: entry.record for entry in entries(Path(path), file, fields)}
        except OSError as error:
            fact = f"cannot be read: {error.strerror}"
            raise StoreError("results.unreadable", fact, subject=path) from error
    return settings, list(records.values())


def read_settings(path: PathLike) -> Record:
    """The settings of results. Raises StoreError."""
    with Source(Path(path)) as source:
        return source.settings


def read_results(path: PathLike, columns: Collection[str] = (), *, rows: int = ROWS) -> Iterator[pd.DataFrame]:
    """Stream the records as tables of at most `rows` rows with these `columns`, by default all FIELDS.

    The last record of a sample_id wins. Fields that a record does not have are null; `stages` and `statistics` are
    dicts of numbers, `keys` is a dict of such dicts. Besides one table, memory holds 8 bytes for each record: ids are
    compared by 64-bit hashes, of which two of 10 million agree with a probability of 3e-6. A run that appends records
    meanwhile does no harm. Raises StoreError, and ValueError for a column that is not a field.
    """
    names = list(columns or FIELDS)
    if unknown := [name for name in names if name not in FIELDS]:
        raise ValueError(f"{unknown[0]!r} is not a field of a record")
    with Source(Path(path)) as source:
        newest, at = _newest(source), 0
        for table in source.tables(names, rows):
            keep = newest[at : at + len(table)]
            at += len(table)
            yield table[: len(keep)][keep].reset_index(drop=True)


def newest_records(path: PathLike) -> Iterator[Record]:
    """Stream the records, of each sample_id the last, as `read_results` does. Raises StoreError."""
    with Source(Path(path)) as source:
        newest = _newest(source)
        yield from compress(source.records(), newest)


def _newest(source: Source) -> NDArray[np.bool_]:
    """Whether each record is the last of its sample_id."""
    import numpy as np

    backwards = np.fromiter(map(hash, source.ids()), np.int64)[::-1]
    newest = np.zeros(len(backwards), bool)
    newest[np.unique(backwards, return_index=True)[1]] = True
    return newest[::-1]


class Source:
    """Results opened for reading: the parts that are there now, and the open file of JSON lines, if there is one.

    It can be read several times. Raises StoreError as `Results` does.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.parts = path, list[Path]()
        self._file: BinaryIO | None
        if are_parts(path):
            check_pyarrow(path)
            if not path.is_dir():
                code = "results.special" if path.exists() else "results.missing"
                fact = "is not a folder of Parquet parts" if path.exists() else "no such folder of results"
                raise StoreError(code, fact, subject=path)
            self.parts, self._file = snapshot(path)
        else:
            self._file = open_regular(path, StoreError, room="results")
        self.settings = self._settings()

    def _settings(self) -> Record:
        if self.parts:
            with opened(self.parts[0]) as part:
                return settings_of(self.parts[0], part)
        if self._file:
            return settings_in(Path(self._file.name), self._file.readline())
        raise StoreError("results.foreign", "holds no results", subject=self.path)

    def records(self) -> Iterator[Record]:
        """All records, the oldest first."""
        for part in self.parts:
            with opened(part) as file:
                for batch in file.iter_batches():
                    yield from map(record_of, rows_of(batch))
        yield from self._lines()

    def ids(self) -> Iterator[str]:
        """The sample_id of every record, the oldest first; as they are stored, so they differ as records do."""
        for part in self.parts:
            with opened(part) as file:
                for batch in file.iter_batches(columns=["sample_id"]):
                    yield from batch.column(0).to_pylist()
        yield from (row_of(record, strict=False)["sample_id"] for record in self._lines())

    def tables(self, names: Sequence[str], rows: int) -> Iterator[pd.DataFrame]:
        """All records as tables with these columns, the oldest first."""
        import pandas as pd

        for part in self.parts:
            with opened(part) as file:
                settings_of(part, file)
                held = [name for name in names if name in file.schema_arrow.names]
                for batch in file.iter_batches(batch_size=rows, columns=held):
                    table: pd.DataFrame = batch.to_pandas(maps_as_pydicts="strict")
                    yield table.reindex(columns=names)
        for group in chunks(self._lines(), rows):
            found = (row_of(record, strict=False) for record in group)
            yield pd.DataFrame([[row[name] for name in names] for row in found], columns=names)

    def _lines(self) -> Iterator[Record]:
        """The records in no part."""
        if self._file:
            yield from iterate(Path(self._file.name), self._file)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file:
            self._file.close()
