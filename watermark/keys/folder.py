"""Folders of keys, and the public description of a key."""

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
    """The keys in the *.key files of a folder, by file and sorted by name, without hidden files and subfolders.

    Raises KeyFileError for a file that is not a key and for two files with the same key.
    """
    try:
        paths = sorted(p for p in folder.iterdir() if p.suffix == ".key" and not p.name.startswith("."))
    except OSError as error:
        raise KeyFileError("key.unlisted", f"cannot be listed ({error.strerror})", subject=folder) from None
    keys: dict[Path, Key] = {}
    first: dict[str, Path] = {}
    for path in paths:
        keys[path] = key = Key.load(path)
        other = first.setdefault(key.fingerprint, path)
        if other != path:
            raise KeyFileError("key.duplicate", f"holds the same key as {other}", subject=path)
    return keys


def load_ring(paths: Iterable[Path]) -> dict[Path, Key]:
    """The keys in these files and folders, by file, in the given order. Duplicates are ignored.

    Raises KeyFileError like `Key.load` and `load_folder`, and for a folder without keys.
    """
    ring: dict[str, tuple[Path, Key]] = {}
    for path in paths:
        keys = load_folder(path) if path.is_dir() else {path: Key.load(path)}
        if not keys:
            raise KeyFileError("key.none", "holds no *.key file", subject=path)
        for file, key in keys.items():
            ring.setdefault(key.fingerprint, (file, key))
    return dict(ring.values())


def describe(key: Key) -> dict[str, Any]:
    """The public facts about a key: fingerprint, description and commitment, but not the secret."""
    return {"fingerprint": key.fingerprint, **key.metadata, "commitment": key.commitment}


def export_public(key: Key, path: Path) -> dict[str, Any]:
    """Write a public record of a key as JSON and return it: `describe(key)` and what the record proves.

    If the record is published at a known time, it proves that the key existed then, so the key was not made up to fit
    an image that is newer than the record. For an older image it proves nothing, since anyone can declare the noise
    recovered from an image to be a key. `created` is the owner's claim and not part of the commitment.
    """
    record = {
        "ringmark": "public key record",
        **describe(key),
        "proves": "that this key existed when this record was published",
        "commitment_of": "SHA-256 of the key's description, without created, as sorted JSON, and its secret or values",
    }
    write_atomic(path, json.dumps(record, indent=1) + "\n")
    return record
