"""Keys: secret values with a public description, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from data.store import write_atomic
from watermark.errors import KeyFileError

__all__ = ["Key", "refuse_existing"]

MAX_BYTES = 64 << 20
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
    def fingerprint(self) -> str:
        public = {k: v for k, v in self.metadata.items() if k != "created"}
        return hashlib.sha256(
            json.dumps(public, sort_keys=True).encode() + np.ascontiguousarray(self.values).tobytes()
        ).hexdigest()[:16]

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
            raise KeyFileError(f"{path}: cannot be written: {error.strerror}; choose another name") from None

    @classmethod
    def load(cls, path: Path) -> Key:
        """Read and check a key. Raises KeyFileError; no message shows a value."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        try:
            if path.is_dir():
                raise KeyFileError(f"{path}: is a folder; name a key file in it")
            if not path.is_file():
                raise KeyFileError(f"{path}: no such key file; make one with: ringmark keygen -o {path}")
            if path.stat().st_size > MAX_BYTES:
                raise KeyFileError(f"{path}: too large to be a key ({path.stat().st_size >> 20} MB)")
            path.open("rb").close()  # says why, where safetensors does not
            with safe_open(path, "numpy") as file:
                metadata = json.loads((file.metadata() or {})["ringmark"])
                values = file.get_tensor("values")
            return cls._checked(path, values, metadata)
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
