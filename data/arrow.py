"""Arrow streams, whose buffers are decompressed only if they declare a plausible number of bytes.

The declared sizes are looked up in the flatbuffers of the messages, whose structure Arrow has verified by then; see
Message.fbs of the Arrow format.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from ringmark.data.archives import RATIO, bomb
from ringmark.data.locations import MAX_BYTES

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["opened_stream"]

MAGIC, PADDED = b"ARROW1", 8  # of a file, which is a stream behind it
HEADER, VALUES = 2, 1  # fields of a message, and of a dictionary
BUFFERS, COMPRESSION = 2, 3  # fields of a batch
V4_COMPRESSION = b"ARROW:experimental_compression"  # where Arrow 0.17 said that a batch is compressed


def opened_stream(file: BinaryIO, id: str) -> pa.RecordBatchReader:
    """The batches of an open Arrow file or stream.

    Raises ImageError, source.bomb, for one that expands to more than MAX_BYTES and RATIO times its size.
    """
    import pyarrow as pa

    if not file.read(PADDED).startswith(MAGIC):
        file.seek(0)
    return pa.ipc.open_stream(_Checked(pa.ipc.MessageReader.open_stream(file), id))


class _Checked:
    """A file for Arrow of the messages that have been checked."""

    closed = False

    def __init__(self, messages: Iterator[Any], id: str) -> None:
        self._messages, self._id = messages, id
        self._expanded = self._read = 0
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        pass

    def read(self, size: int) -> memoryview:
        """The next bytes, never of two messages, which Arrow asks for one by one."""
        if not self._left:
            self._left = self._next()
        piece, self._left = self._left[:size], self._left[size:]
        return piece

    def _next(self) -> memoryview:
        if not (message := next(self._messages, None)):
            return memoryview(b"")
        self._read += message.body.size
        self._expanded += _expanded(message)
        if self._expanded > MAX_BYTES + RATIO * self._read:
            raise bomb(self._id)
        return memoryview(message.serialize())


def _expanded(message: Any) -> int:
    """The bytes to which the buffers of a message expand, as declared; 0 if they are not compressed."""
    if message.type not in ("record batch", "dictionary"):
        return 0
    data, body = memoryview(message.metadata), memoryview(message.body)
    batch = _below(data, _number(data, 0, 4), HEADER)
    if message.type == "dictionary":
        batch = _below(data, batch, VALUES)
    if not _field(data, batch, COMPRESSION) and V4_COMPRESSION not in bytes(data):
        return 0
    vector = _below(data, batch, BUFFERS)
    places = range(vector + 4, vector + 4 + 16 * _number(data, vector, 4), 16)  # of pairs: start and length
    starts = [_number(data, place, 8) for place in places if _number(data, place + 8, 8)]
    return sum(max(0, _number(body, start, 8, signed=True)) for start in starts)  # -1 for one that is not compressed


def _number(data: memoryview, at: int, size: int, *, signed: bool = False) -> int:
    return int.from_bytes(data[at : at + size], "little", signed=signed)


def _field(data: memoryview, table: int, field: int) -> int:
    """Where a field of a flatbuffer's table is; 0 if the table lacks it."""
    layout, at = table - _number(data, table, 4, signed=True), 4 + 2 * field
    offset = _number(data, layout + at, 2) if at < _number(data, layout, 2) else 0
    return table + offset if offset else 0


def _below(data: memoryview, table: int, field: int) -> int:
    """Where the table or vector in a field begins."""
    at = _field(data, table, field)
    if not at:
        raise ValueError("a batch without its parts")
    return at + _number(data, at, 4)
