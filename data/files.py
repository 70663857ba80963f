"""Write files atomically, without replacing files that ringmark did not write, and read tensors safely."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import platform
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ringmark.data.containers import PNG_MAGIC, png_chunks
from ringmark.errors import RingmarkError, StoreError, one_line

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "NO_SPACE",
    "SOFTWARE",
    "TensorInfo",
    "is_ours",
    "one_line",
    "open_regular",
    "read_tensors",
    "refuse_existing",
    "refuse_foreign",
    "replacing",
    "tensors_in",
    "write_atomic",
]

LOG = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]

SOFTWARE = "ringmark"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)  # of an OSError: the disk, or the user's share of it, is full
HEAD_BYTES = 1 << 16  # searched for the signature of an output
PARTIAL = re.compile(r"\..*-(?P<machine>[0-9a-f]{6})-(?P<pid>[0-9]+)-[0-9a-f]+\.tmp", re.DOTALL)
STALE_SECONDS = 24 * 3600  # age of temporary files to remove if their process cannot be checked
MAX_HEADER = 1 << 20
MAX_AXES = 8
DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "<u1",
    "BOOL": "|b1",
}
"""safetensors' names of the dtypes that numpy supports."""


# -- writing ----------------------------------------------------------------------------------------------------------


def write_atomic(path: PathLike, content: str | bytes, mode: int = 0o644) -> None:
    """Write a file as `replacing` does. Text is UTF-8; the umask limits `mode`."""
    with replacing(path) as partial:
        _write_through(partial, content.encode() if isinstance(content, str) else content, mode)


@contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """A file to write to, which replaces `path` atomically when the block ends: readers see the old content or the new.

    Parent folders are created. Links are followed, so the file that a link points to is replaced. The file to write to
    is hidden, lies next to the target, and is named by it and by the process id; it is removed if the block fails. The
    first write of a process to a folder removes such files there of processes that no longer run. Raises OSError if the
    file cannot be written, and if `path` is a device, a pipe or a folder.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():  # as root, os.replace would swap /dev/null for a file
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target.parent)
    partial = target.with_name(_partial_name(target))
    try:
        yield partial
        os.replace(partial, target)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.strerror:  # the error has no file name, or that of the partial file
            error.filename, error.filename2 = str(path), None
        raise


def _write_through(path: Path, content: bytes, mode: int) -> None:
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # otherwise a power failure could leave an empty file


def _partial_name(target: Path) -> str:
    """A name for a temporary file; it has that of the machine too, since process ids are only valid there."""
    name = os.fsencode(target.name)[:80].decode(errors="ignore")  # keeps long names short
    return f".{name}-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


@cache
def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


@cache
def _remove_stale(folder: Path) -> None:
    """Remove temporary files left by killed runs, once in a process: many files may be written to a large folder."""
    with os.scandir(folder) as entries:
        found = [match for entry in entries if (match := PARTIAL.fullmatch(entry.name))]
    for match in found:
        path = folder / match[0]
        if match["machine"] == _machine() and _is_stale(path, match["pid"]):
            LOG.info("%s: removed; an earlier run was stopped while it wrote this file", path)
            path.unlink(missing_ok=True)


def _is_stale(path: Path, pid: str) -> bool:
    if os.name != "posix":  # os.kill would kill the process there
        return _age(path) > STALE_SECONDS
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # the process belongs to another user, or the name is not ours
        return False
    return False


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


# -- what may be replaced ---------------------------------------------------------------------------------------------


def refuse_existing(
    path: PathLike, *, force: bool = False, error: type[RingmarkError] = StoreError, room: str = "file"
) -> None:
    """Raise `error` if `path` is a folder or, without `force`, if anything exists there, including a link.

    The codes are `room`.folder and `room`.exists.
    """
    if os.path.isdir(path):
        raise error(f"{room}.folder", "is a folder", subject=path)
    if os.path.lexists(path) and not force:
        raise error(f"{room}.exists", "exists already", subject=path)


def refuse_foreign(path: PathLike, force: bool = False) -> None:
    """Raise StoreError if writing to `path` would replace a file that ringmark did not write, also through links.

    A path is accepted if nothing exists there, if its file was written by ringmark (`is_ours`) in the format that the
    path's suffix names, or with `force`: a link why.png to a key is refused. Folders, devices and pipes are always
    refused; broken links are refused without `force`.
    """
    if os.path.isdir(path):
        raise StoreError("file.folder", "is a folder", subject=path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise StoreError("file.special", "is not a regular file", subject=path)
    if not force and os.path.lexists(path) and not is_ours(path):
        raise StoreError("file.foreign", "exists already and was not written by ringmark", subject=path)


def is_ours(path: PathLike) -> bool:
    """Whether ringmark wrote this file.

    - PNG: a text chunk before the pixels says that the Software is ringmark.
    - SVG: the creator in its metadata is ringmark.
    - JSON and JSON lines: the first name in the first object starts with "ringmark".
    - safetensors: a name in its metadata starts with "ringmark".
    - HTML: a comment after the doctype starts with "ringmark".
    - Markdown: its first line is a comment that starts with "ringmark".
    - CSV has no place for a signature: the file lies next to a ringmark journal (a *.jsonl file written by `Results`).

    A path that ends in .png, .svg, .json, .jsonl, .csv, .html or .md must hold that format. Other files, empty files
    and unreadable files are not ours.
    """
    try:
        with open_regular(path) as file:
            head = file.read(HEAD_BYTES)
    except StoreError:
        return False
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        return b"\0" not in head and _beside_journal(Path(path))
    marks = {".png": _in_png, ".svg": _in_svg, ".json": _in_json, ".jsonl": _in_json}
    marks |= {".html": _in_html, ".md": _in_markdown}
    return any(
        has_mark(head) for has_mark in ([marks[suffix]] if suffix in marks else [*marks.values(), _in_safetensors])
    )


def _in_png(head: bytes) -> bool:
    if not head.startswith(PNG_MAGIC):
        return False
    before = takewhile(lambda chunk: chunk[0] != b"IDAT", png_chunks(head, len(head)))
    texts = (head[start : start + length] for kind, start, length in before if kind == b"tEXt")
    return any(text.startswith(b"Software\0ringmark") for text in texts)


def _in_svg(head: bytes) -> bool:
    return b"<svg" in head and re.search(rb"<dc:creator>\s*<cc:Agent>\s*<dc:title>ringmark", head) is not None


def _in_json(head: bytes) -> bool:
    return re.match(rb'(\xef\xbb\xbf)?\s*\{\s*"ringmark', head) is not None


def _in_safetensors(head: bytes) -> bool:
    header = head[8 : 8 + int.from_bytes(head[:8], "little")]
    names = rb'"__metadata__"\s*:\s*\{[^{}]*?"ringmark[^"]*"\s*:'
    return header.startswith(b"{") and re.search(names, header) is not None


def _in_markdown(head: bytes) -> bool:
    return head.startswith(b"<!-- ringmark")


def _in_html(head: bytes) -> bool:
    return re.match(rb"<!doctype html>\s*<!-- ringmark", head) is not None


def _beside_journal(path: Path) -> bool:
    for journal in Path(os.path.realpath(path)).parent.glob("*.jsonl"):
        try:
            with open_regular(journal) as file:
                if _in_json(file.read(64)):
                    return True
        except StoreError:
            continue
    return False


# -- reading ----------------------------------------------------------------------------------------------------------


def open_regular(path: PathLike, error: type[RingmarkError] = StoreError, room: str = "file") -> BinaryIO:
    """Open a regular file for reading, with O_NONBLOCK since opening a pipe could otherwise block forever.

    Raises `error` with the code `room`.missing, .folder, .denied, .unreadable or .special.
    """
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    except FileNotFoundError:
        raise error(f"{room}.missing", "no such file", subject=path) from None
    except IsADirectoryError:
        raise error(f"{room}.folder", "is a folder", subject=path) from None
    except PermissionError as refusal:
        fact = "is a folder" if os.path.isdir(path) else f"may not be read: {refusal.strerror}"
        raise error(f"{room}.folder" if os.path.isdir(path) else f"{room}.denied", fact, subject=path) from None
    except (OSError, ValueError) as refusal:  # ValueError: the name has a null byte
        reason = getattr(refusal, "strerror", None) or str(refusal)
        raise error(f"{room}.unreadable", f"cannot be opened: {reason}", subject=path) from None
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise error(f"{room}.special", "is not a regular file", subject=path)


class TensorInfo(NamedTuple):
    """A tensor in a safetensors header: dtype ("F32", …), shape, and its range of bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile(NamedTuple):
    """The contents of a safetensors file: writable arrays by name, and metadata as text by name."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


Check = Callable[[Mapping[str, TensorInfo], dict[str, str]], object]


def read_tensors(
    path: PathLike,
    *,
    max_bytes: int,
    check: Check | None = None,
    error: type[RingmarkError] = StoreError,
    room: str = "file",
) -> TensorFile:
    """The tensors and metadata of a safetensors file; the header is checked before anything is allocated.

    The header must describe tensors of DTYPES with at most MAX_AXES axes and distinct names; their bytes must fill the
    file without gaps or overlaps. `check(infos, metadata)` can check more before values are read; if it raises
    ValueError, LookupError, TypeError or AttributeError, the file counts as damaged.

    Raises `error` with a code of `open_regular`, `room`.too-large for more than `max_bytes`, or `room`.damaged.
    """
    with open_regular(path, error, room) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            fact = f"has {size >> 20} MB, more than the limit of {max_bytes >> 20} MB"
            raise error(f"{room}.too-large", fact, subject=path)
        try:
            return tensors_in(file, size, check)
        except RingmarkError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as fault:
            reason = f"it lacks {fault}" if isinstance(fault, KeyError) else one_line(fault) or type(fault).__name__
            fact = f"is damaged or of another kind ({one_line(reason)})"
            raise error(f"{room}.damaged", fact, subject=path) from None
        except OSError as fault:
            raise error(f"{room}.unreadable", f"cannot be read: {fault.strerror}", subject=path) from None


def tensors_in(file: BinaryIO, size: int, check: Check | None = None) -> TensorFile:
    """The tensors and metadata in a file of `size` bytes. Raises as a damaged one does (see `read_tensors`)."""
    infos, metadata = _read_header(file, size)
    if check:
        check(infos, metadata)
    return TensorFile(_read_values(file, infos), metadata)


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The header; raises ValueError unless the values fill the rest of `size` bytes."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, MAX_HEADER):
        raise ValueError("no safetensors header")
    entries = json.loads(file.read(length), object_pairs_hook=_unique)
    if not isinstance(entries, dict):
        raise ValueError("no safetensors header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("the metadata have the wrong type")
    infos = {name: _tensor_info(entry) for name, entry in entries.items()}
    end = 0
    for info in sorted(infos.values(), key=lambda info: info.begin):
        if info.begin != end:
            raise ValueError("the tensors have gaps or overlaps")
        end = info.end
    if end != size - 8 - length:
        raise ValueError("the values are truncated" if end > size - 8 - length else "there are bytes after the values")
    return infos, metadata


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _tensor_info(entry: dict[str, object]) -> TensorInfo:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if len(entry) != 3 or not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError("a tensor has an unknown type")
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("a tensor has an impossible shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise ValueError("a tensor has no position")
    begin, end = offsets
    if end - begin != math.prod(shape) * int(DTYPES[dtype][2:]):
        raise ValueError("the bytes of a tensor do not fit its shape")
    return TensorInfo(dtype=dtype, shape=tuple(shape), begin=begin, end=end)


def _read_values(file: BinaryIO, infos: Mapping[str, TensorInfo]) -> dict[str, np.ndarray]:
    import numpy as np

    start, tensors = file.tell(), {}
    for name, info in infos.items():
        tensors[name] = np.empty(info.shape, DTYPES[info.dtype])
        file.seek(start + info.begin)
        buffer = tensors[name].reshape(-1).view(np.uint8)
        if file.readinto(buffer) != info.end - info.begin:  # type: ignore[attr-defined]
            raise ValueError("the values are truncated")
    return tensors
