"""Files written whole or not at all, and never over what is somebody else's."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from ringmark.errors import StoreError, one_line

__all__ = ["one_line", "refuse_existing", "remedy", "write_atomic"]


def write_atomic(path: str | os.PathLike, content: str | bytes, mode: int = 0o644) -> None:
    """Writes a whole file or nothing: readers see the old content or the new. Text is UTF-8; `mode` is cut by the umask.

    Parent folders are created; a link is followed, so that the file it names is replaced. Raises OSError when it
    cannot be written, also when `path` is a device, a pipe or a folder.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():  # as root, os.replace would swap /dev/null for a file
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave the new name with no content
        os.replace(partial, target)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.strerror:  # a full disk names no file, a failed rename the partial one
            error.filename, error.filename2 = str(path), None
        raise


def remedy(error: OSError, otherwise: str) -> str:
    """What to do about a file that cannot be written: make room where there is none, else `otherwise`."""
    return "make room on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else otherwise


def refuse_existing(path: str | os.PathLike, *, force: bool = False) -> None:
    """Raises StoreError where there is something of this name: a folder, or without `force` anything."""
    if os.path.isdir(path):
        raise StoreError(f"{one_line(path)}: is a folder; name a file in it")
    if os.path.lexists(path) and not force:
        raise StoreError(f"{one_line(path)}: exists already; choose another name, or --force to replace it")


def _refuse_special(path: Path) -> None:
    if path.exists() and not path.is_file():  # opening a pipe could wait for ever
        raise OSError(errno.EINVAL, "not a regular file")
