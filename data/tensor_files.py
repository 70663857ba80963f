"""Tensors that belong to records of results, in a folder next to them: one safetensors file for each batch of records.

A file for each image is slow to write and to copy, and in one file for all a crash or damage would cost more than a
batch.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ringmark.data.files import open_regular, read_tensors, write_atomic
from ringmark.data.lines import VERSION, Record
from ringmark.data.settings import typed
from ringmark.errors import StoreError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Rows", "TensorFiles", "TensorRow", "Tensors"]

LOG = logging.getLogger(__name__)

MAX_BYTES = 8 << 30

Tensors = Mapping[str, "np.ndarray"]
Rows = dict[str, dict[str, "np.ndarray"]]


@dataclass(frozen=True)
class TensorRow:
    """Where the tensors of a record are: the number of their file, its SHA-256, and the record's row in it."""

    file: int
    sha256: str
    row: int

    @classmethod
    def of(cls, record: Record) -> TensorRow | None:
        """The place in a record; None if it has none."""
        try:
            return typed(cls, record.get("tensors"))
        except ValueError:
            return None


class TensorFiles:
    """The tensors of the results at `path`. Only their owner can read the files: noise of marked images reveals the
    key."""

    def __init__(self, path: Path) -> None:
        target = Path(os.path.realpath(path))  # the same folder for all names of the results
        self.folder = target.with_name(f"{target.name}.tensors")

    def write(self, number: int, tensors: Sequence[Tensors]) -> list[Record]:
        """Write the tensors of some records as the file of this number; their places."""
        import numpy as np
        from safetensors.numpy import save  # which writes the bytes as they lie in memory

        rows = enumerate(tensors)
        named = {f"{row}/{name}": np.asarray(x, order="C") for row, some in rows for name, x in some.items()}
        content = save(named, {"ringmark tensors": str(VERSION)})
        write_atomic(self._file(number), content, 0o600)
        digest = hashlib.sha256(content).hexdigest()
        return [asdict(TensorRow(file=number, sha256=digest, row=row)) for row in range(len(tensors))]

    def read(self, number: int, digest: str) -> Rows:
        """The tensors in a file by row; nothing, and a warning, if it is missing or damaged. Raises StoreError."""
        path = self._file(number)
        rows: Rows = {}
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
            LOG.warning("%s", error)
        return rows

    def remove(self) -> None:
        """Remove the files, and the folder unless it holds others."""
        for file in self.folder.glob("*/*.safetensors"):
            file.unlink()
        for place in (*self.folder.glob("*"), self.folder):
            with suppress(OSError):
                place.rmdir()

    def _file(self, number: int) -> Path:
        """A file of tensors; there is a folder for each MiB of results, so that none gets too large to list."""
        return self.folder / f"{number >> 20:04d}" / f"{number:010d}.safetensors"
