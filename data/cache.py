"""A cache of tensors, keyed by everything that they are computed from."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ringmark.data.files import read_tensors, write_atomic
from ringmark.errors import StoreError

__all__ = ["cached", "cached_rows"]

LOG = logging.getLogger(__name__)

MAX_BYTES = 8 << 30


def cached(folder: Path, key: Sequence[object], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that `make` returns, cached in `folder` under a digest of `key`, so interrupted runs can be resumed.

    Noise of marked images reveals the key, so only the owner can read the files. Damaged files are computed again.
    """
    path = _place(folder, key)
    kept = _load(path)
    return _keep(path, make()) if kept is None else kept


def cached_rows(
    folder: Path, key: Sequence[object], rows: Tensor, make: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """As `cached`, for each of the `rows` (n, …) separately; `make` is called once, with the missing rows."""
    paths = [_place(folder, [*key, row]) for row in rows]
    kept = {i: tensors for i, path in enumerate(paths) if (tensors := _load(path)) is not None}
    missing = [i for i in range(len(paths)) if i not in kept]
    if missing:
        made = make(rows[missing])
        for k, i in enumerate(missing):
            kept[i] = _keep(paths[i], {name: values[k] for name, values in made.items()})
    return {name: torch.stack([kept[i][name] for i in range(len(paths))]) for name in kept[0]}


def _place(folder: Path, key: Sequence[object]) -> Path:
    digest = hashlib.sha256()
    for part in key:
        digest.update(part.contiguous().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    return folder / f"{digest.hexdigest()[:24]}.safetensors"


def _load(path: Path) -> dict[str, Tensor] | None:
    if not path.exists():
        return None
    try:
        tensors = read_tensors(path, max_bytes=MAX_BYTES).tensors
    except StoreError as error:
        if error.code != "file.damaged":
            raise
        LOG.warning("%s; it is computed again", error)
        path.unlink()
        return None
    return {name: torch.from_numpy(values) for name, values in tensors.items()}


def _keep(path: Path, made: dict[str, Tensor]) -> dict[str, Tensor]:
    from safetensors.torch import save

    made = {name: values.contiguous() for name, values in made.items()}
    write_atomic(path, save(made), 0o600)
    return made
