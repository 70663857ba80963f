"""Labels that say whether pictures are marked, read from common formats and matched to records."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ringmark.data.files import open_regular
from ringmark.errors import EvaluationError, ImageError

__all__ = ["LABELS", "Matched", "match_labels", "read_labels", "read_prompts"]

PathLike = str | os.PathLike[str]

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
PATH_COLUMNS = ("path", "file_name", "filename", "file", "image", "sample_id")
LABEL_COLUMN, PROMPT_COLUMN = "label", "prompt"
DELIMITERS = (",", ";", "\t")
CODES = ("labels.missing", "labels.folder", "labels.denied", "labels.unreadable", "labels.special")
"""Codes of `read_labels` for files that cannot be opened."""


class _Row(NamedTuple):
    """What a label file says of one image, and where."""

    where: str
    path: object
    label: object
    prompt: object = None


# -- reading ----------------------------------------------------------------------------------------------------------


def read_labels(path: PathLike) -> dict[str, bool]:
    """Whether images are marked, by path as given in the file.

    The file is a table with a header (one of PATH_COLUMNS and "label", separated by commas, semicolons or tabs), a JSON
    object {path: label}, or JSON objects with these names, in an array or one per line. The encoding is UTF-8, or
    UTF-16 with a byte order mark. A label is 1, true, yes or marked, or 0, false, no or unmarked, in upper or lower
    case, or the number 1 or 0. Other columns and consistent repetitions are ignored.

    Raises ImageError with the code labels.empty, .encoding, .header, .damaged, .value or .contradiction and the line
    (in JSON: the entry), or one of CODES.
    """
    labels: dict[str, bool] = {}
    for where, name, value, _ in _rows(path):
        label = _label(value)
        if not isinstance(name, str) or not name or label is None:
            fact = f"{where} has the path {name!r} and the label {value!r}"
            raise ImageError("labels.value", fact, subject=path, known=", ".join(LABELS))
        if labels.setdefault(name, label) != label:
            raise ImageError("labels.contradiction", f"{where} contradicts an earlier label of {name!r}", subject=path)
    if not labels:
        raise ImageError("labels.empty", "holds no labels", subject=path)
    return labels


def read_prompts(path: PathLike) -> dict[str, str]:
    """The prompts by path, if the file that `read_labels` reads has a column "prompt". Raises as it does."""
    return {str(row.path): row.prompt for row in _rows(path) if isinstance(row.prompt, str)}


def _rows(path: PathLike) -> Iterable[_Row]:
    text = _text(path)
    return _json_rows(path, text) if text.lstrip()[:1] in ("{", "[") else _table_rows(path, text)


def _text(path: PathLike) -> str:
    with open_regular(path, ImageError, "labels") as file:
        content = file.read()
    if not content:
        raise ImageError("labels.empty", "is empty", subject=path)
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        name = encoding.upper().removesuffix("-SIG")
        raise ImageError("labels.encoding", f"line {line} is not {name} text", subject=path) from error


def _label(value: object) -> bool | None:
    text = str(value).strip().lower()
    if text in LABELS:
        return LABELS[text]
    try:
        return {0.0: False, 1.0: True}.get(float(text))
    except ValueError:
        return None


def _table_rows(path: PathLike, text: str) -> Iterator[_Row]:
    delimiter = next((d for d in DELIMITERS if _columns(_first_row(text, d))), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = _columns(next(reader, []))
        if not columns:
            names = f"one of {', '.join(PATH_COLUMNS)} and {LABEL_COLUMN}"
            raise ImageError("labels.header", f"line 1 does not name the columns {names}, once each", subject=path)
        for row in filter(None, reader):
            if len(row) <= max(columns[:2]):
                raise ImageError("labels.damaged", f"line {reader.line_num} has too few columns", subject=path)
            yield _Row(f"line {reader.line_num}", *(row[column] for column in columns if column < len(row)))
    except csv.Error as error:
        raise ImageError("labels.damaged", f"line {reader.line_num} is not CSV ({error})", subject=path) from error


def _first_row(text: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    except csv.Error:
        return []


def _columns(header: Iterable[str]) -> list[int]:
    """The columns of path, label and, if there is one, prompt; none if one of the first two is missing."""
    names = [name.strip().lower() for name in header]
    path = next((name for name in PATH_COLUMNS if names.count(name) == 1), None)
    if not path or names.count(LABEL_COLUMN) != 1:
        return []
    return [names.index(name) for name in (path, LABEL_COLUMN, PROMPT_COLUMN) if name in names]


def _json_rows(path: PathLike, text: str) -> list[_Row]:
    try:
        lines = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError):
        lines = []
    if lines and all(_is_record(line) for line in lines):
        return [_row(f"line {number}", record) for number, record in enumerate(lines, 1)]
    try:
        whole = json.loads(text, object_pairs_hook=tuple)  # a dict would hide repeated paths
    except json.JSONDecodeError as error:
        raise ImageError("labels.damaged", f"line {error.lineno} is not JSON ({error.msg})", subject=path) from error
    except (RecursionError, ValueError) as error:
        raise ImageError("labels.damaged", f"is not a JSON object of labels ({error})", subject=path) from error
    if isinstance(whole, tuple):
        return [_Row(f"the entry {name!r}", name, value) for name, value in whole]
    records = [dict(item) if isinstance(item, tuple) else item for item in whole] if isinstance(whole, list) else [None]
    if not all(_is_record(record) for record in records):
        raise ImageError("labels.header", "line 1 does not start a JSON object or array of labels", subject=path)
    return [_row(f"entry {number}", record) for number, record in enumerate(records, 1)]


def _is_record(value: object) -> bool:
    """Whether the object is one record with path and label, rather than a table {path: label}."""
    return (
        isinstance(value, dict) and LABEL_COLUMN in value and any(isinstance(value.get(n), str) for n in PATH_COLUMNS)
    )


def _row(where: str, record: Any) -> _Row:
    path = next(record[name] for name in PATH_COLUMNS if isinstance(record.get(name), str))
    return _Row(where, path, record[LABEL_COLUMN], record.get(PROMPT_COLUMN))


# -- matching ---------------------------------------------------------------------------------------------------------


class Matched(NamedTuple):
    """Labels by record id, and the paths without a record, as given in the label files."""

    labels: dict[str, bool]
    unmatched: list[str]


def match_labels(
    ids: Collection[str], label_files: Sequence[PathLike], *, folders: Collection[PathLike] = ()
) -> Matched:
    """The labels in these files, by record id (a path relative to an audited folder).

    A path is matched first below the name of the label file's folder, then as given; "./", backslashes and the Unicode
    form (NFC, NFD) are ignored. An absolute path is matched relative to the label file's folder and to the audited
    `folders`. Raises EvaluationError if no label matches any record (labels.unmatched) or if two files contradict each
    other (labels.contradiction), and ImageError as `read_labels` does.
    """
    index = _Index(ids)
    labels: dict[str, bool] = {}
    unmatched: list[str] = []
    for file in label_files:
        for path, label in read_labels(file).items():
            sample_id = index.find(path, Path(file).resolve().parent, folders)
            if sample_id is None:
                unmatched.append(path)
            elif labels.setdefault(sample_id, label) != label:
                fact = f"contradicts an earlier label of {sample_id}"
                raise EvaluationError("labels.contradiction", fact, subject=file)
    if not labels:
        fact = f"no label matches any of the {len(ids)} records"
        example, given = min(ids, default="-"), next(iter(unmatched), "-")
        subject = ", ".join(map(str, label_files))
        raise EvaluationError("labels.unmatched", fact, subject=subject, example=example, given=given)
    return Matched(labels, unmatched)


class _Index:
    """An index of record ids that finds them by any form used in label files."""

    def __init__(self, ids: Collection[str]) -> None:
        self._ids = set(ids)
        self._plain: dict[str, str | None] = {}
        for sample_id in ids:
            plain = _plain(sample_id)
            self._plain[plain] = None if plain in self._plain else sample_id  # ambiguous: only the exact name matches

    def find(self, path: str, beside: Path, folders: Collection[PathLike]) -> str | None:
        for name in _candidates(path, beside, folders):
            sample_id = name if name in self._ids else self._plain.get(_plain(name))
            if sample_id is not None:
                return sample_id
        return None


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))


def _candidates(path: str, beside: Path, folders: Collection[PathLike]) -> Iterator[str]:
    if not os.path.isabs(path):
        yield f"{beside.name}/{path}"
        yield path
        return
    for folder in folders:
        if inside := _below(path, Path(folder).resolve()):
            yield inside
    if inside := _below(path, beside):
        yield f"{beside.name}/{inside}"
        yield inside


def _below(path: str, folder: Path) -> str | None:
    """A path relative to a folder that contains it, as given or with links resolved."""
    for whole in (Path(os.path.normpath(path)), Path(os.path.realpath(path))):
        if whole.is_relative_to(folder):
            return whole.relative_to(folder).as_posix()
    return None
