"""Labels of pictures: which of them are marked."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable

from ringmark.data.images import _open
from ringmark.errors import ImageError

__all__ = ["LABELS", "read_labels"]


LABELS = {
    "1": True,
    "true": True,
    "yes": True,
    "marked": True,
    "0": False,
    "false": False,
    "no": False,
    "unmarked": False,
}


def read_labels(path: str | os.PathLike) -> dict[str, bool]:
    """Which images are marked, from a CSV with the columns path and label or from a JSON object {path: label}.

    A label is 1, true, yes or marked, or 0, false, no or unmarked, in either case; other columns are ignored, and so
    are repetitions that agree. Raises ImageError, with the line (in JSON: the entry), for anything else.
    """
    with _open(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ImageError(path, f"line {line} is not UTF-8 text; save the labels as UTF-8") from error
    rows = _json_rows(path, text) if text.lstrip().startswith(("{", "[")) else _csv_rows(path, text)
    labels: dict[str, bool] = {}
    for where, name, value in rows:
        label = LABELS.get(str(value).strip().lower())
        if not name or label is None:
            raise ImageError(
                path, f"{where} has the path {name!r} and the label {value!r}; a label is one of {', '.join(LABELS)}"
            )
        if labels.setdefault(name, label) != label:
            raise ImageError(path, f"{where} contradicts an earlier label of {name!r}; keep one of the two")
    if not labels:
        raise ImageError(path, "holds no labels; add a line for each image")
    return labels


def _csv_rows(path: str | os.PathLike, text: str) -> Iterable[tuple[str, str, object]]:
    """Where it stands, path and label of each row."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if header.count("path") != 1 or header.count("label") != 1:
            raise ImageError(path, "line 1 must name the columns path and label, once each; add the header path,label")
        at, label = header.index("path"), header.index("label")
        for row in filter(None, reader):
            if len(row) <= max(at, label):
                raise ImageError(path, f"line {reader.line_num} has too few columns; give a path and a label")
            yield f"line {reader.line_num}", row[at], row[label]
    except csv.Error as error:
        raise ImageError(path, f"line {reader.line_num} is not CSV ({error}); mend that line") from error


def _json_rows(path: str | os.PathLike, text: str) -> Iterable[tuple[str, str, object]]:
    try:
        pairs = json.loads(text, object_pairs_hook=tuple)  # a dict would hide repeated paths
    except json.JSONDecodeError as error:
        raise ImageError(path, f"line {error.lineno} is not JSON ({error.msg}); mend that line") from error
    except (RecursionError, ValueError) as error:
        raise ImageError(path, f"is not a JSON object of labels ({error}); write {{path: label}}") from error
    if not isinstance(pairs, tuple):
        raise ImageError(path, "line 1 does not start a JSON object; write {path: label}")
    return [(f"the entry {name!r}", name, value) for name, value in pairs]
