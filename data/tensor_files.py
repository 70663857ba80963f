"""Tensors that belong to records of results, in a folder next to them.

A file holds blocks, one for each batch of records. A block is a safetensors file of its own, in which equal shapes are
stacked; it is written before the records that name it, so a crash costs no more than its batch. A new file begins when
one is full, so damage costs no more than a file.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ringmark.data.files import open_regular, tensors_in
from ringmark.data.lines import VERSION, Record
from ringmark.data.settings import typed
from ringmark.errors import StoreError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Block", "Rows", "TensorFiles", "TensorRow", "Tensors"]

LOG = logging.getLogger(__name__)

FULL = 64 << 20  # bytes of a file after which the next one begins
NAME, NUMBERED = "{:06d}.blocks", re.compile(r"([0-9]{6,})\.blocks")

Tensors = Mapping[str, "np.ndarray"]
Rows = dict[int, dict[str, "np.ndarray"]]


class Block(NamedTuple):
    """A block: the number of its file, where it begins, its bytes and their SHA-256."""

    file: int
    at: int
    size: int
    sha256: str


@dataclass(frozen=True)
class TensorRow:
    """Where the tensors of a record are: a block, and the record's row in it."""

    file: int
    at: int
    size: int
    sha256: str
    row: int

    @classmethod
    def of(cls, record: Record) -> TensorRow | None:
        """That of a record; None if it has none."""
        try:
            row = typed(cls, record.get("tensors"))
        except ValueError:
            return None
        return row if min(row.file, row.at, row.size) >= 0 else None

    @property
    def block(self) -> Block:
        """The block."""
        return Block(self.file, self.at, self.size, self.sha256)


class TensorFiles:
    """The tensors of the results at `path`. Only their owner can read the files: noise of marked images reveals the
    key."""

    def __init__(self, path: Path) -> None:
        target = Path(os.path.realpath(path))  # the same folder for all names of the results
        self.folder = target.with_name(f"{target.name}.tensors")
        self._last: int | None = None  # number of the last file, once it is known

    def write(self, tensors: Sequence[Tensors]) -> list[Record]:
        """Append the tensors of some records as one block; a TensorRow for each. Raises OSError."""
        content = _encoded(tensors)
        number, at = self._append(content)
        digest = hashlib.sha256(content).hexdigest()
        rows = (TensorRow(file=number, at=at, size=len(content), sha256=digest, row=i) for i in range(len(tensors)))
        return list(map(asdict, rows))

    def read(self, block: Block) -> Rows:
        """The tensors in a block by row; nothing, and a warning, if it is missing or damaged. Raises StoreError."""
        path = self.folder / NAME.format(block.file)
        try:
            with open_regular(path) as file:
                file.seek(block.at)
                content = file.read(block.size)
            if hashlib.sha256(content).hexdigest() != block.sha256:
                raise StoreError("file.damaged", "is damaged", subject=path)
            return _decoded(content)
        except StoreError as error:
            if error.code not in ("file.missing", "file.damaged"):
                raise
            LOG.warning("%s", error)
            return {}

    def remove(self) -> None:
        """Remove the files, and the folder unless it holds others."""
        self._last = None
        for file in self._files():
            file.unlink()
        with suppress(OSError):
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return [path for path in self.folder.glob("*") if NUMBERED.fullmatch(path.name)]

    def _append(self, content: bytes) -> tuple[int, int]:
        """Write bytes to the end of the last file that is not full; its number, and where they begin."""
        if self._last is None:
            self._last = max((int(file.stem) for file in self._files()), default=0)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / NAME.format(self._last)
        if path.exists() and path.stat().st_size >= FULL:
            self._last += 1
            path = self.folder / NAME.format(self._last)
        with open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            at = file.tell()
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # before the records that name them
            except BaseException:
                file.truncate(at)
                raise
        return self._last, at


def _encoded(tensors: Sequence[Tensors]) -> bytes:
    """A block: tensors named rows/name, such as 0,1,4/x for those of three rows, which are stacked."""
    import numpy as np
    from safetensors.numpy import save  # which writes the bytes as they lie in memory

    groups: dict[tuple[object, ...], dict[int, np.ndarray]] = {}
    for row, of_row in enumerate(tensors):
        for name, x in of_row.items():
            values = np.asarray(x, order="C")
            groups.setdefault((name, values.dtype, values.shape), {})[row] = values
    stacks = {
        f"{','.join(map(str, group))}/{name}": np.stack(list(group.values())) for (name, *_), group in groups.items()
    }
    content: bytes = save(stacks, {"ringmark tensors": str(VERSION)})
    return content


def _decoded(content: bytes) -> Rows:
    """The inverse of `_encoded`."""
    rows: Rows = {}
    for label, stack in tensors_in(io.BytesIO(content), len(content)).tensors.items():
        numbers, _, name = label.partition("/")
        for i, row in enumerate(map(int, numbers.split(","))):
            rows.setdefault(row, {})[name] = stack[i, ...]
    return rows
