"""Keys: secret values with a public description, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ringmark.data.files import one_line, remedy, write_atomic
from ringmark.errors import KeyFileError

__all__ = ["Key", "describe", "export_public", "listing", "load_folder", "load_ring", "refuse_existing"]

MAX_BYTES = 64 << 20
MAX_HEADER = 1 << 20  # of those, before the values
MAX_AXES = 8
READABLE = "RINGMARK_READABLE_KEYS"  # environment: anything but nothing allows keys that others may read
FIELDS = {
    "scheme": str,
    "pattern": str,
    "mask": str,
    "channels": list,
    "radii": list,
    "latent_shape": list,
    "model": dict,
    "created": str,
}


@dataclass(frozen=True, eq=False)
class Key:
    """`values` float32, secret; `metadata` the description (FIELDS); `fingerprint` 16 hex digits over both.

    The creation time is not part of the fingerprint. Printing a key shows no values.
    """

    values: np.ndarray
    metadata: dict

    def __repr__(self) -> str:
        return f"Key({self.fingerprint})"

    @classmethod
    def new(cls, values: np.ndarray, **metadata) -> Key:
        """A key made now."""
        return cls(
            np.asarray(values, np.float32),
            metadata | {"created": datetime.now(timezone.utc).isoformat(timespec="seconds")},
        )

    @staticmethod
    def system_rng() -> np.random.Generator:
        """A generator seeded with 256 bits from the operating system; the seed is kept nowhere."""
        return np.random.default_rng(secrets.randbits(256))

    @property
    def commitment(self) -> str:
        """SHA-256, 64 hex digits, of the description without `created` as sorted JSON, then the values' bytes.

        It begins with the fingerprint, which is too short to bind its owner: two keys of one fingerprint can be made
        with 2³² trials. It needs no salt: from 256 random bits, the values are not to be guessed (*zeros* is no secret).
        """
        public = {k: v for k, v in self.metadata.items() if k != "created"}
        return hashlib.sha256(
            json.dumps(public, sort_keys=True).encode() + np.ascontiguousarray(self.values).tobytes()
        ).hexdigest()

    @property
    def fingerprint(self) -> str:
        return self.commitment[:16]

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the file whole or not at all, readable by its owner only. Raises KeyFileError where one exists.

        With `overwrite` a regular file is replaced, a link followed, and nothing else touched.
        """
        from safetensors.numpy import save

        data = save(
            {"values": np.ascontiguousarray(self.values)},
            {"ringmark": json.dumps(self.metadata | {"fingerprint": self.fingerprint})},
        )
        path = Path(path)
        try:
            if not overwrite:
                _reserve(path)
            try:
                write_atomic(path, data, 0o600)
            except BaseException:
                if not overwrite:
                    path.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise KeyFileError(
                f"{path}: cannot be written: {error.strerror}; {remedy(error, 'choose another name')}"
            ) from None

    @classmethod
    def load(cls, path: Path) -> Key:
        """Read and check a key. Raises KeyFileError; no message shows a value.

        What the file declares is checked before anything of that size is allocated. A key that others than its owner
        may read or write is refused, where files have modes, unless the environment variable READABLE is set.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        try:
            if path.is_dir():
                raise KeyFileError(f"{path}: is a folder; name a key file in it")
            if not path.is_file():
                raise KeyFileError(f"{path}: no such key file; make one with: ringmark keygen -o {path}")
            if path.stat().st_size > MAX_BYTES:
                raise KeyFileError(f"{path}: too large to be a key ({path.stat().st_size >> 20} MB)")
            with path.open("rb") as file:
                facts = os.fstat(file.fileno())
                _check_header(file, facts.st_size)
            with safe_open(path, "numpy") as file:
                metadata = json.loads((file.metadata() or {})["ringmark"])
                values = file.get_tensor("values")
            key = cls._checked(path, values, metadata)
            _refuse_readable(path, facts.st_mode)  # last, for what is no key needs no mode
            return key
        except KeyFileError:
            raise
        except PermissionError as error:
            raise KeyFileError(f"{path}: cannot be read: {error.strerror}") from None
        # Any other dtype, number or nesting than keygen writes may fail in numpy, safetensors or json, each in its way.
        except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, RecursionError, OSError):
            raise KeyFileError(
                f"{path}: not a ringmark key, or damaged; use the file that ringmark keygen wrote"
            ) from None

    @classmethod
    def _checked(cls, path: Path, values: np.ndarray, metadata: dict) -> Key:
        stored = metadata.pop("fingerprint", None) if isinstance(metadata, dict) else None
        if stored is None or not _described(metadata) or values.dtype != np.float32:
            raise KeyFileError(f"{path}: not a ringmark key, or damaged; use the file that ringmark keygen wrote")
        key = cls(values, metadata)
        if key.fingerprint != stored or not np.isfinite(values).all():
            raise KeyFileError(f"{path}: damaged: its fingerprint does not fit its contents; restore it from a copy")
        return key


def _described(metadata: dict) -> bool:
    """Whether every field is there and of its type; lists hold whole numbers."""
    return (
        all(isinstance(metadata.get(k), kind) for k, kind in FIELDS.items())
        and all(type(n) is int for k, kind in FIELDS.items() if kind is list for n in metadata[k])
        and (len(metadata["radii"]), len(metadata["latent_shape"])) == (2, 3)
    )


def refuse_existing(path: Path) -> None:
    """Raises KeyFileError where there is something of this name."""
    if os.path.isdir(path):
        raise KeyFileError(f"{path}: is a folder; name a file, or say with -n how many keys it is to get")
    if os.path.lexists(path):
        raise KeyFileError(
            f"{path}: exists already; choose another name, or --force to replace it (marks made with the old key are then lost)"
        )


def _reserve(path: Path) -> None:
    """Take the name with an empty file, so that no two writers can both succeed. Raises KeyFileError where it is taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        refuse_existing(path)
        raise


def _check_header(file: BinaryIO, size: int) -> None:
    """Raises what `Key.load` turns into one message unless a float32 tensor "values" fills the rest of `size` bytes."""
    length = int.from_bytes(file.read(8), "little")
    rest = size - 8 - length
    if rest < 0 or length > MAX_HEADER:
        raise ValueError("header")
    tensors = json.loads(file.read(length))
    tensors.pop("__metadata__", None)
    values, shape = tensors["values"], tensors["values"]["shape"]
    if len(tensors) > 1 or values["dtype"] != "F32" or values["data_offsets"] != [0, rest]:
        raise ValueError("tensors")
    if not 0 < len(shape) <= MAX_AXES or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError("shape")
    if 4 * math.prod(shape) != rest:
        raise ValueError("size")


def _refuse_readable(path: Path, mode: int) -> None:
    # Windows, where modes say nothing, keeps a user's files from others by its own means.
    if os.name == "posix" and mode & 0o066 and not os.environ.get(READABLE):
        raise KeyFileError(
            f"{path}: others may read or write this key; run: chmod 600 {shlex.quote(str(path))} (or set {READABLE}=1 where that cannot be done)"
        )


def load_folder(folder: Path) -> dict[Path, Key]:
    """All keys of a folder by file: *.key in it, hidden files and subfolders left out, sorted by name; may be none.

    Raises KeyFileError for a file that is no key and for two files that hold one key.
    """
    try:
        paths = sorted(p for p in folder.iterdir() if p.suffix == ".key" and not p.name.startswith("."))
    except OSError as error:
        raise KeyFileError(f"{folder}: cannot be listed: {error.strerror}; name a folder of keys") from None
    found, first = {}, {}
    for path in paths:
        found[path] = key = Key.load(path)
        other = first.setdefault(key.fingerprint, path)
        if other != path:
            raise KeyFileError(f"{path}: holds the same key as {other}; remove one of the two")
    return found


def load_ring(paths: Iterable[Path]) -> dict[Path, Key]:
    """The keys that these files and folders hold, by file, in the order given; a key met again counts once.

    Raises KeyFileError like `Key.load` and `load_folder`, and for a folder without keys.
    """
    ring: dict[str, tuple[Path, Key]] = {}
    for path in paths:
        found = load_folder(path) if path.is_dir() else {path: Key.load(path)}
        if not found:
            raise KeyFileError(
                f"{path}: no *.key file in this folder; name another, or make keys with: ringmark keygen -n 4 -o {shlex.quote(str(path))}"
            )
        for file, key in found.items():
            ring.setdefault(key.fingerprint, (file, key))
    return dict(ring.values())


def describe(key: Key) -> dict:
    """All that may be told of a key: fingerprint, the fields of FIELDS, commitment; never the values."""
    return {"fingerprint": key.fingerprint, **{k: key.metadata[k] for k in FIELDS}, "commitment": key.commitment}


def listing(ring: dict[Path, Key]) -> str:
    """A line a key, in columns under a header."""
    rows = [("fingerprint", "scheme", "pattern", "mask", "channels", "radii", "model", "created", "file")]
    for path, key in ring.items():
        meta = key.metadata
        channels, radii = ",".join(map(str, meta["channels"])), "-".join(map(str, meta["radii"]))
        model = meta["model"].get("name", "?")
        names = (meta["scheme"], meta["pattern"], meta["mask"], channels, radii, model, meta["created"], path)
        rows.append((key.fingerprint, *map(one_line, names)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def export_public(key: Key, path: Path) -> dict:
    """Write and return a public record, as JSON: `describe(key)` and what it proves.

    The record, once published at a known time, proves that the key existed then; so the key of a later verdict was not
    made up to fit an image that is younger than the record. Against an older image it proves nothing: whoever has an
    image can take the noise recovered from it for a key. `created` is the owner's word and not in the commitment.
    """
    record = {
        "ringmark": "public key record",
        **describe(key),
        "proves": "that this key existed when this record was published",
        "commitment_of": "SHA-256 of the key's description, without created, as sorted JSON, and its values",
    }
    write_atomic(path, json.dumps(record, indent=1) + "\n")
    return record
