"""A table of keys against pictures, written to Parquet as verdicts come."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ringmark.data.files import refuse_existing, replacing
from ringmark.data.parts import check_pyarrow
from ringmark.watermark.detect.verdict import OUTCOMES, Judged

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["KeyTable"]

ROWS = 1 << 16  # of a row group, which memory holds


class KeyTable:
    """A row for each picture and key whose corrected p is below 1; for all other pairs p is 1.

    An unmarked picture has about as many rows as it went through stages, however many keys there are. The file appears
    when the `with` block ends without an error. Raises StoreError without pyarrow (results.no-pyarrow), and if the file
    exists (table.exists) or is a folder (table.folder).
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        check_pyarrow(path)
        refuse_existing(path, room="table")
        import pyarrow as pa

        self._keys = pa.array(keys)
        names = [("sample_id", pa.string()), ("key", pa.dictionary(pa.int32(), pa.string())), ("present", pa.bool_())]
        self._schema = pa.schema([*names, ("log10_p", pa.float64()), ("score", pa.float64())])
        self._path, self._stack = path, ExitStack()
        self._rows: list[tuple[Any, ...]] = []

    def add(self, judged: Sequence[Judged]) -> None:
        """Add the pairs of some pictures."""
        for one in judged:
            verdicts = one.verdicts
            for k in np.flatnonzero(verdicts.log10_p < 0).tolist():
                present = OUTCOMES[verdicts.outcome[k]]
                row = one.sample.id, k, present, float(verdicts.log10_p[k]), float(verdicts.score[k])
                self._rows.append(row)
        if len(self._rows) >= ROWS:
            self._write()

    def _write(self) -> None:
        import pyarrow as pa

        ids, keys, *others = zip(*self._rows, strict=True) if self._rows else ([] for _ in self._schema)
        columns = [ids, pa.DictionaryArray.from_arrays(pa.array(keys, pa.int32()), self._keys), *others]
        self._file.write_table(pa.table(columns, schema=self._schema))
        self._rows = []

    def __enter__(self) -> KeyTable:
        import pyarrow.parquet as pq

        partial = self._stack.enter_context(replacing(self._path))
        self._file = self._stack.enter_context(pq.ParquetWriter(partial, self._schema, compression="zstd"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._stack.callback(self._write)
        self._stack.__exit__(kind, error, at)
