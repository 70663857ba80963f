"""Tables of pictures: Parquet and Arrow files with an image column, and lists of paths in those or in CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ringmark.data.arrow import opened_stream
from ringmark.data.labels import PATH_COLUMNS
from ringmark.data.locations import MAX_BYTES, filename, too_many_bytes
from ringmark.data.parts import check_pyarrow
from ringmark.errors import ImageError, StoreError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["LISTS", "TABLES", "Row", "listed", "rows"]

LISTS = (".csv", ".tsv", ".txt")
TABLES = (".parquet", ".arrow", ".feather")
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "bytes", "content")
COLUMNS = ("uri", "url", *PATH_COLUMNS)
MAX_GROUP = 4 << 30  # bytes of a column in a row group, which is read as a whole


class Row(NamedTuple):
    """A row's id, with a picture's bytes, a path, or the error that takes their place."""

    id: str
    value: bytes | str | ImageError


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

    batches = _parquet(file, id) if filename(id).endswith(".parquet") else _arrow(file, id)
    try:
        for number, value in enumerate(value for batch in batches for value in batch.column(0)):
            yield _row(f"{id}#{number}", value)
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        if isinstance(error, ImageError):
            raise
        fact = f"is damaged or of another kind ({type(error).__name__})"
        raise ImageError("source.damaged", fact, subject=id) from None


def _row(id: str, value: pa.Scalar) -> Row:
    """The row of a value, of which only bytes or text are read, within MAX_BYTES."""
    import pyarrow as pa

    if isinstance(value, pa.DictionaryScalar):
        value = value.value
    names = ("bytes", "path") if isinstance(value, pa.StructScalar) else ()
    parts = [value[name] for name in names if name in value] or [value]
    held = [part for part in parts if isinstance(part, pa.BinaryScalar) and part.is_valid and part.as_buffer().size]
    if not held:
        return Row(id, ImageError("image.empty", "has no bytes", subject=id))
    return Row(id, held[0].as_py() if held[0].as_buffer().size <= MAX_BYTES else too_many_bytes(id))


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
        yield from table.iter_batches(batch_size=1, columns=[column])  # one value may stand in many rows


def _arrow(file: BinaryIO, id: str) -> Iterator[pa.RecordBatch]:
    with opened_stream(file, id) as table:
        column = _column(table.schema, id)
        for batch in table:
            values = batch.select([column])
            values.validate(full=True)  # values may point anywhere, and would be read from there
            yield values


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
