"""Keys: a secret with a public description, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmark.data.files import NO_SPACE, TensorInfo, read_tensors, refuse_existing, write_atomic
from ringmark.data.settings import typed
from ringmark.errors import KeyFileError

__all__ = ["COMMON", "READABLE", "SECRET_BYTES", "Key", "Kind", "distinct"]

SECRET_BYTES = 32
MAX_BYTES = 64 << 20
MAX_LATENT = MAX_BYTES // 4  # numbers in a latent of the reference size
READABLE = "RINGMARK_READABLE_KEYS"  # environment variable; if set, keys that others can read are allowed
COMMON = ("scheme", "kind", "reference", "latent_shape", "model", "created")
"""Fields of descriptions that are not the scheme's own; older keys have latent_shape for kind and reference."""


@dataclass(frozen=True)
class Kind:
    """A kind of latents: the models' family, the number of channels, and image pixels per latent pixel and side.

    As text: 'stable-diffusion (4 channels, factor 8)'.
    """

    family: str
    channels: int
    factor: int

    def __str__(self) -> str:
        return f"{self.family} ({self.channels} channels, factor {self.factor})"


@dataclass(frozen=True, eq=False, repr=False)
class Key:
    """A key: a public description, `metadata`, and a `secret` of 32 bytes from which its marks are expanded.

    `metadata` has the scheme's fields and those of COMMON. `kind` is the `Kind` of latents that the key marks.
    `reference` (H, W) is a size in pixels; radius r means r cycles per its shorter side. `model` is the identity of the
    model that the key was made for.

    A key from an older file has float32 `values` in place of the secret and `latent_shape` in place of kind and
    reference. It marks latents of that shape only.

    `fingerprint` is 16 hex digits of a hash over description and secret, without the creation time. Printing a key
    shows only the fingerprint.
    """

    metadata: dict[str, Any]
    secret: bytes = b""
    values: NDArray[np.float32] | None = None

    def __repr__(self) -> str:
        return f"Key({self.fingerprint})"

    @classmethod
    def new(cls, secret: bytes | None = None, **metadata: Any) -> Key:
        """A key made now. Its secret comes from the operating system unless it is given (tests, experiments)."""
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(metadata | {"created": created}, secret or secrets.token_bytes(SECRET_BYTES))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape (C, h, w) of latents at the reference size; for an old key, the only shape that it marks."""
        if self.values is not None:
            channels, height, width = self.metadata["latent_shape"]
            return channels, height, width
        kind, (height, width) = Kind(**self.metadata["kind"]), self.metadata["reference"]
        return kind.channels, height // kind.factor, width // kind.factor

    @property
    def _tensor(self) -> tuple[str, NDArray[Any]]:
        """The name and contents of the secret part, as in the file."""
        if self.values is not None:
            return "values", np.ascontiguousarray(self.values)
        return "secret", np.frombuffer(self.secret, np.uint8)

    @cached_property
    def commitment(self) -> str:
        """SHA-256, 64 hex digits, of the description without `created` as sorted JSON, then the secret part.

        It begins with the fingerprint, which is too short to be binding: two keys with the same fingerprint can be
        found in 2³² trials. No salt is needed, since 256 random bits cannot be guessed.
        """
        public = {k: v for k, v in self.metadata.items() if k != "created"}
        return hashlib.sha256(json.dumps(public, sort_keys=True).encode() + self._tensor[1].tobytes()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """The first 16 digits of the commitment."""
        return self.commitment[:16]

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the file atomically, readable only by its owner. Raises KeyFileError if it exists.

        With `overwrite`, a regular file is replaced, also through a link; anything else is refused.
        """
        from safetensors.numpy import save

        description = json.dumps(self.metadata | {"fingerprint": self.fingerprint})
        data = save(dict([self._tensor]), {"ringmark": description})
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
                "file.full" if error.errno in NO_SPACE else "key.unwritable",
                f"cannot be written ({error.strerror})",
                subject=path,
            ) from None

    @classmethod
    def load(cls, path: Path) -> Key:
        """Read and check a key. Raises KeyFileError; messages never show the secret.

        Sizes are checked before memory is allocated. On systems with file modes, a key that anyone but its owner can
        read or write is refused, unless the environment variable READABLE is set.
        """
        path = Path(path)
        tensors, metadata = read_tensors(path, max_bytes=MAX_BYTES, check=_check_file, error=KeyFileError, room="key")
        key = cls._checked(path, tensors, json.loads(metadata["ringmark"]))
        _refuse_readable(path)  # last: the mode of a file that is not a key does not matter
        return key

    @classmethod
    def _checked(cls, path: Path, tensors: Mapping[str, NDArray[Any]], description: dict[str, Any]) -> Key:
        stored, values = description.pop("fingerprint"), tensors.get("values")
        key = cls(description, tensors["secret"].tobytes() if values is None else b"", values)
        try:
            damaged = key.fingerprint != stored or (values is not None and not np.isfinite(values).all())
        except RecursionError:  # a description nested too deeply to be written
            damaged = True
        if damaged:
            raise KeyFileError(
                "key.fingerprint", "is damaged: its fingerprint does not match its contents", subject=path
            )
        return key


def distinct(keys: Iterable[Key]) -> list[Key]:
    """The keys without duplicates, in their order."""
    return list({key.fingerprint: key for key in keys}.values())


def _check_file(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
    """Raises ValueError unless the header has a secret or an old key's values, and a description; reads neither."""
    description = json.loads(metadata["ringmark"])
    if {name: (info.dtype, info.shape) for name, info in infos.items()} == {"secret": ("U8", (SECRET_BYTES,))}:
        stored = typed(_Description, description)
        kind, sides = typed(Kind, stored.kind), stored.reference
        if asdict(kind) != stored.kind or min(kind.channels, kind.factor) < 1:
            raise ValueError("no kind of latents")
        if len(sides) != 2 or min(sides) < 1 or any(n % kind.factor for n in sides):
            raise ValueError("no size of latents")
        if kind.channels * math.prod(sides) // kind.factor**2 > MAX_LATENT:
            raise ValueError("the latents are too large")
    elif {name: info.dtype for name, info in infos.items()} == {"values": "F32"}:
        shape = typed(_OldDescription, description).latent_shape
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError("no shape of latents")
    else:
        raise ValueError("no secret of a key")


@dataclass(frozen=True)
class _Description:
    """What a key file says of its key; the scheme checks the fields of its own."""

    scheme: str
    kind: dict[str, Any]
    reference: list[int]
    model: dict[str, Any]
    created: str
    fingerprint: str


@dataclass(frozen=True)
class _OldDescription:
    """What an older key file says of its key."""

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
