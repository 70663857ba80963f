"""Keys: secret values with a public description, in one safetensors file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmark.data.files import TensorInfo, read_tensors, refuse_existing, write_atomic
from ringmark.data.settings import typed
from ringmark.errors import KeyFileError

__all__ = ["COMMON", "READABLE", "Key"]

MAX_BYTES = 64 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)
READABLE = "RINGMARK_READABLE_KEYS"  # environment variable; if set, keys that others can read are allowed
COMMON = ("scheme", "latent_shape", "model", "created")
"""Fields of every key's description; schemes add their own."""


@dataclass(frozen=True, eq=False)
class Key:
    """A key: secret `values` (float32) and their public description, `metadata`, with COMMON and the scheme's fields.

    `fingerprint` is 16 hex digits of a hash over both, without the creation time. Printing a key does not show values.
    """

    values: NDArray[np.float32]
    metadata: dict[str, Any]

    def __repr__(self) -> str:
        return f"Key({self.fingerprint})"

    @classmethod
    def new(cls, values: NDArray[Any], **metadata: Any) -> Key:
        """A key with the current time as its creation time."""
        return cls(
            np.asarray(values, np.float32),
            metadata | {"created": datetime.now(timezone.utc).isoformat(timespec="seconds")},
        )

    @staticmethod
    def system_rng() -> np.random.Generator:
        """A generator seeded with 256 bits from the operating system; the seed is not stored."""
        return np.random.default_rng(secrets.randbits(256))

    @property
    def commitment(self) -> str:
        """SHA-256, 64 hex digits, of the description without `created` as sorted JSON, then the values' bytes.

        It begins with the fingerprint, which is too short to be binding: two keys with the same fingerprint can be
        found in 2³² trials. No salt is needed, since values drawn from 256 random bits cannot be guessed.
        """
        public = {k: v for k, v in self.metadata.items() if k != "created"}
        return hashlib.sha256(
            json.dumps(public, sort_keys=True).encode() + np.ascontiguousarray(self.values).tobytes()
        ).hexdigest()

    @property
    def fingerprint(self) -> str:
        """The first 16 digits of the commitment."""
        return self.commitment[:16]

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the file atomically, readable only by its owner. Raises KeyFileError if it exists.

        With `overwrite`, a regular file is replaced, also through a link; anything else is refused.
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
                "file.full" if error.errno in FULL else "key.unwritable",
                f"cannot be written ({error.strerror})",
                subject=path,
            ) from None

    @classmethod
    def load(cls, path: Path) -> Key:
        """Read and check a key. Raises KeyFileError; messages never show values.

        Sizes are checked before memory is allocated. On systems with file modes, a key that anyone but its owner can
        read or write is refused, unless the environment variable READABLE is set.
        """
        path = Path(path)
        tensors, metadata = read_tensors(path, max_bytes=MAX_BYTES, check=_check_file, error=KeyFileError, room="key")
        key = cls._checked(path, tensors["values"], json.loads(metadata["ringmark"]))
        _refuse_readable(path)  # last: the mode of a file that is not a key does not matter
        return key

    @classmethod
    def _checked(cls, path: Path, values: NDArray[np.float32], description: dict[str, Any]) -> Key:
        stored = description.pop("fingerprint")
        key = cls(values, description)
        try:
            damaged = key.fingerprint != stored or not np.isfinite(values).all()
        except RecursionError:  # a description nested too deeply to be written
            damaged = True
        if damaged:
            raise KeyFileError(
                "key.fingerprint", "is damaged: its fingerprint does not match its contents", subject=path
            )
        return key


def _check_file(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
    """Raises ValueError unless the header has one float32 tensor "values" and a description; reads no values."""
    shape = typed(_Description, json.loads(metadata["ringmark"])).latent_shape
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError("no shape of latents")
    if set(infos) != {"values"} or infos["values"].dtype != "F32":
        raise ValueError("no values of a key")


@dataclass(frozen=True)
class _Description:
    """What a key file says of its key; the scheme checks the fields of its own."""

    scheme: str
    latent_shape: list[int]
    model: dict[str, Any]
    created: str
    fingerprint: str


def _reserve(path: Path) -> None:
    """Reserve the name with an empty file, so that only one writer succeeds. Raises KeyFileError if it is taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        refuse_existing(path, error=KeyFileError, room="key")
        raise


def _refuse_readable(path: Path) -> None:
    # On Windows modes mean nothing; it protects a user's files by other means.
    if os.name == "posix" and path.stat().st_mode & 0o066 and not os.environ.get(READABLE):
        raise KeyFileError("key.readable", "other users can read or write this key", subject=path)
