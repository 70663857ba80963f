"""Tables as Markdown and CSV. pandas is only imported when a table is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringmark.data.files import write_atomic

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["interval_text", "markdown", "with_interval", "write_table"]


def markdown(table: DataFrame | Sequence[Mapping[str, object]]) -> str:
    """A Markdown table with aligned columns; rows have the columns of the first. None and NaN leave a cell empty."""
    import pandas

    frame = pandas.DataFrame(table, dtype=object)
    text: str = frame.where(frame.notna(), "").astype(str).to_markdown(index=False, disable_numparse=True)
    return text


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a CSV file with a header of all their columns. None, NaN and missing values leave a cell empty.

    Characters that UTF-8 cannot encode (from file names in another encoding) are escaped.
    """
    import pandas

    text = pandas.DataFrame(list(rows), dtype=object).to_csv(index=False, lineterminator="\n")
    write_atomic(path, text.encode("utf-8", "backslashreplace"))


def interval_text(row: Mapping[str, Any], name: str) -> str:
    """A number of a row with its interval if it has one, "0.843 [0.810, 0.871]"; empty if the number is None."""
    if row[name] is None:
        return ""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return with_interval(row[name], None if low is None else (low, high))


def with_interval(value: float, interval: tuple[float, float] | None) -> str:
    """A number with its interval, if it is known: "0.843 [0.810, 0.871]"."""
    return f"{value:.3f}" if interval is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
