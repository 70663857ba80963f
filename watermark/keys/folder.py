"""Folders of keys, and what may be told and published of a key."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ringmark.data.files import write_atomic
from ringmark.errors import KeyFileError
from ringmark.watermark.keys.key import Key

__all__ = ["describe", "export_public", "load_folder", "load_ring"]


def load_folder(folder: Path) -> dict[Path, Key]:
    """All keys of a folder by file: *.key in it, hidden files and subfolders left out, sorted by name; may be none.

    Raises KeyFileError for a file that is no key and for two files that hold one key.
    """
    try:
        paths = sorted(p for p in folder.iterdir() if p.suffix == ".key" and not p.name.startswith("."))
    except OSError as error:
        raise KeyFileError("key.unlisted", f"cannot be listed ({error.strerror})", subject=folder) from None
    found: dict[Path, Key] = {}
    first: dict[str, Path] = {}
    for path in paths:
        found[path] = key = Key.load(path)
        other = first.setdefault(key.fingerprint, path)
        if other != path:
            raise KeyFileError("key.duplicate", f"holds the same key as {other}", subject=path)
    return found


def load_ring(paths: Iterable[Path]) -> dict[Path, Key]:
    """The keys that these files and folders hold, by file, in the order given. Duplicates are ignored.

    Raises KeyFileError like `Key.load` and `load_folder`, and for a folder without keys.
    """
    ring: dict[str, tuple[Path, Key]] = {}
    for path in paths:
        found = load_folder(path) if path.is_dir() else {path: Key.load(path)}
        if not found:
            raise KeyFileError("key.none", "holds no *.key file", subject=path)
        for file, key in found.items():
            ring.setdefault(key.fingerprint, (file, key))
    return dict(ring.values())


def describe(key: Key) -> dict[str, Any]:
    """What may be made public of a key: fingerprint, description and commitment; never the values."""
    return {"fingerprint": key.fingerprint, **key.metadata, "commitment": key.commitment}


def export_public(key: Key, path: Path) -> dict[str, Any]:
    """Write and return a public record, as JSON: `describe(key)` and what it proves.

    Published at a known time, the record proves that the key existed then: the key of a later verdict was not made up
    to fit an image that is younger than the record. For an older image it proves nothing, since anyone can declare the
    noise recovered from an image to be a key. `created` is what the owner claims, and not part of the commitment.
    """
    record = {
        "ringmark": "public key record",
        **describe(key),
        "proves": "that this key existed when this record was published",
        "commitment_of": "SHA-256 of the key's description, without created, as sorted JSON, and its values",
    }
    write_atomic(path, json.dumps(record, indent=1) + "\n")
    return record
