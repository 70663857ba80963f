"""Tables of pictures: Parquet and Arrow files with an image column, and lists of paths in those or in CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ringmark.data.labels import PATH_COLUMNS
from ringmark.data.locations import filename
from ringmark.data.parts import check_pyarrow
from ringmark.errors import ImageError, StoreError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["LISTS", "TABLES", "Row", "listed", "rows"]

LISTS = (".csv", ".tsv", ".txt")
TABLES = (".parquet", ".arrow", ".feather")
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "bytes", "content")
COLUMNS = ("uri", "url", *PATH_COLUMNS)
BATCH = 16  # rows read together: those of a picture dataset have about 1 MB each
MAX_GROUP = 4 << 30  # bytes of a column in a row group, which is read as a whole


class Row(NamedTuple):
    """A row's number, with a picture's bytes or a path; both are None where the row has none."""

    number: int
    content: bytes | None = None
    path: str | None = None


def rows(file: BinaryIO, id: str) -> Iterator[Row]:
    """The rows of an open table, from its image column if it has one, otherwise from its column of paths.

    An image column has one of IMAGE_COLUMNS as its name, or is the only one with bytes; each value is the bytes, or a
    struct with `bytes` or `path` as in Hugging Face's datasets. Raises ImageError: source.no-driver without pyarrow,
    source.column without such a column, source.damaged, source.bomb.
    """
    try:
        check_pyarrow(id)  # type: ignore[arg-type]
    except StoreError as error:
        raise ImageError("source.no-driver", error.fact, subject=id, package="pyarrow") from None
    import pyarrow as pa

    number = 0
    try:
        for batch in _parquet(file, id) if filename(id).endswith(".parquet") else _arrow(file, id):
            for value in batch.column(0).to_pylist():
                yield _row(number, value)
                number += 1
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        if isinstance(error, ImageError):
            raise
        fact = f"is damaged or of another kind ({type(error).__name__})"
        raise ImageError("source.damaged", fact, subject=id) from None


def _row(number: int, value: object) -> Row:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return Row(number=number, path=value)
    return Row(number=number, content=value if isinstance(value, bytes) else None)


def _parquet(file: BinaryIO, id: str) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        column = _column(table.schema_arrow, id)
        for group in range(table.metadata.num_row_groups):
            chunks = table.metadata.row_group(group)
            parts = [chunks.column(i) for i in range(chunks.num_columns)]
            held = sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] == column)
            if held > MAX_GROUP:
                raise ImageError("source.bomb", f"has more than {MAX_GROUP >> 30} GB in a row group", subject=id)
        yield from table.iter_batches(batch_size=BATCH, columns=[column])


def _arrow(file: BinaryIO, id: str) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    with (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file) as table:
        column = _column(table.schema, id)
        batches = map(table.get_batch, range(table.num_record_batches)) if is_file else table
        yield from (batch.select([column]) for batch in batches)


def _column(schema: pa.Schema, id: str) -> str:
    """The name of the image column, or of the column of paths. Raises ImageError."""
    import pyarrow as pa

    def is_bytes(kind: pa.DataType) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    def is_picture(kind: pa.DataType) -> bool:
        return is_bytes(kind) or bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)

    pictures: list[str] = [field.name for field in schema if is_picture(field.type)]
    texts: dict[str, str] = {field.name.lower(): field.name for field in schema if not is_picture(field.type)}
    named = [name for name in pictures if name.lower() in IMAGE_COLUMNS]
    if found := named[:1] or (pictures if len(pictures) == 1 else []):
        return found[0]
    if paths := [texts[name] for name in COLUMNS if name in texts]:
        return paths[0]
    known = f"{', '.join(IMAGE_COLUMNS)} or {', '.join(COLUMNS)}"
    raise ImageError("source.column", "has no column of pictures or of paths", subject=id, known=known)


def listed(file: BinaryIO, id: str) -> Iterator[str]:
    """The paths in an open list: one per line in a .txt, otherwise the column of paths of a table with a header.

    Raises ImageError: source.column without such a column, source.damaged for what is not text.
    """
    lines = io.TextIOWrapper(file, "utf-8-sig", newline="")
    try:
        if filename(id).endswith(".txt"):
            yield from filter(None, (line.strip() for line in lines))
            return
        reader = csv.reader(lines, delimiter="\t" if filename(id).endswith(".tsv") else ",")
        names = [name.strip().lower() for name in next(reader, [])]
        column = next((names.index(name) for name in COLUMNS if name in names), None)
        if column is None:
            raise ImageError("source.column", "has no column of paths", subject=id, known=", ".join(COLUMNS))
        yield from (row[column] for row in reader if len(row) > column and row[column])
    except (UnicodeDecodeError, csv.Error) as error:
        raise ImageError("source.damaged", f"is not text ({type(error).__name__})", subject=id) from None
    finally:
        lines.detach()
