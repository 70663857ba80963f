"""Locks between processes that write the same file."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["lock", "lock_file"]

LOG = logging.getLogger(__name__)


def lock(path: Path, *, wait: bool) -> BaseFileLock | None:
    """The lock of a file, acquired; None, with a warning, where the file system has no locks.

    If another process holds it, this waits for it, or raises filelock.Timeout.
    """
    from filelock import FileLock, Timeout

    held = FileLock(lock_file(path), timeout=-1 if wait else 0, thread_local=False)
    try:
        held.acquire()
    except Timeout:
        raise
    except (OSError, NotImplementedError):  # some network file systems have none; continue anyway
        LOG.warning("%s: cannot be locked here; do not write to it from two runs at once", path)
        return None
    return held


def lock_file(path: Path) -> Path:
    """The hidden file beside a file that is locked in its place; the same for all names of the file."""
    target = Path(os.path.realpath(path))
    return target.with_name(f".{target.name}.lock")
