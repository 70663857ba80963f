"""The fields of an audit's records, and their columns in Parquet.

Within a version of the format, fields may be added; a field never changes its type or meaning. Numbers of a record that
are not among the fields are statistics of its scheme; Parquet keeps them in the map `statistics`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ringmark.data.lines import Record, succeeded

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["FIELDS", "arrow_schema", "file_name", "record_of", "row_of"]

FIELDS = {
    "sample_id": "string",
    "content": "string",
    "width": "int32",
    "height": "int32",
    "present": "bool",
    "key": "string",
    "p_value": "double",
    "log10_p": "double",
    "score": "double",
    "stage": "string",
    "calibration": "string",
    "conformal_p": "double",
    "model": "string",
    "seconds": "double",
    "carries": "strings",
    "keys": "tables",
    "stages": "numbers",
    "statistics": "numbers",
    "residual": "double",
    "status": "string",
    "notes": "strings",
    "by_search": "bool",
    "shows": "bool",
    "same_as": "string",
    "error": "string",
    "code": "string",
    "size": "int64",
    "mtime_ns": "int64",
    "tensors": "row",
}
"""Name and type of each field, in the order of the columns; docs/reference/formats.md says what they mean."""

NAMES = ("sample_id", "same_as")  # which may hold file names that are not UTF-8
STAMP = ("size", "mtime_ns")
UNKNOWN = ("present", "residual", "conformal_p", "calibration", "p_value", "log10_p", "score")
"""Fields of a verdict that may be null."""
LONE = re.compile("[\udc80-\udcff]")
ESCAPED = re.compile(r"\\udc([89a-f][0-9a-f])")


def arrow_schema(metadata: dict[bytes, bytes] | None = None) -> pa.Schema:
    """The Parquet schema."""
    import pyarrow as pa

    text, number = pa.string(), pa.float64()
    numbers = pa.map_(text, number)
    kinds = {
        **{"string": text, "double": number, "bool": pa.bool_(), "int32": pa.int32(), "int64": pa.int64()},
        "strings": pa.list_(text),
        "numbers": numbers,
        "tables": pa.map_(text, numbers),
        "row": pa.struct({"file": pa.int64(), "at": pa.int64(), "size": pa.int64(), "sha256": text, "row": pa.int32()}),
    }
    return pa.schema([(name, kinds[kind]) for name, kind in FIELDS.items()], metadata)


def row_of(record: Record, *, strict: bool = True) -> Record:
    """A record as a row with exactly the FIELDS.

    Another field that is not a number raises TypeError if `strict`; otherwise it is left out, since a later version may
    have written it.
    """
    others = {name: value for name, value in record.items() if name not in FIELDS}
    if wrong := [name for name, value in others.items() if isinstance(value, (str, list, dict))]:
        if strict:
            raise TypeError(f"{wrong[0]} is not a field of a record")
        others = {name: value for name, value in others.items() if name not in wrong}
    row = {name: record.get(name) for name in FIELDS} | {"statistics": others or None}
    return {name: LONE.sub(_escaped, value) if isinstance(value, str) else value for name, value in row.items()}


def _escaped(byte: re.Match[str]) -> str:
    return rf"\u{ord(byte[0]):04x}"


def file_name(text: str) -> str:
    """The name of a file from a row, in which bytes that are not UTF-8 are escaped."""
    return ESCAPED.sub(lambda x: chr(int(f"dc{x[1]}", 16)), text)


def record_of(row: Record) -> Record:
    """The record of a row; the inverse of `row_of`. Fields without a value are left out unless they may be null."""
    kept = (*STAMP, *UNKNOWN) if succeeded(row) else STAMP
    record = {name: value for name, value in row.items() if value is not None or name in kept}
    for name in record.keys() & NAMES:
        record[name] = file_name(record[name])
    statistics: Record = record.pop("statistics", {})
    return record | statistics


def table_of(records: Iterable[Record], metadata: dict[bytes, bytes]) -> pa.Table:
    """Records as a table."""
    import pyarrow as pa

    return pa.Table.from_pylist(list(map(_with_pairs, map(row_of, records))), schema=arrow_schema(metadata))


def _with_pairs(row: Record) -> Record:
    """The row with its maps as lists of pairs."""
    return row | {name: _pairs(row[name]) for name, kind in FIELDS.items() if kind in ("numbers", "tables")}


def _pairs(value: Any) -> Any:
    return [(name, _pairs(item)) for name, item in value.items()] if isinstance(value, dict) else value
