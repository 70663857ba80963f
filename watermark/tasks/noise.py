"""Marked initial noise in a file, for tools that draw from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ringmark.data.files import refuse_existing, write_atomic
from ringmark.errors import SchemeError
from ringmark.inversion.models.families import noise_shape
from ringmark.inversion.sizes import Size
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.base import scheme_of

__all__ = ["write_noise"]


def write_noise(
    key: Key, path: Path, seeds: Sequence[int], *, size: Size | None = None, force: bool = False
) -> tuple[int, int, int]:
    """Write standard normal noise with the mark of a key, one sample for each seed, and return its shape (C, h, w).

    The file holds the float32 tensor "noise" (N, C, h, w) and, in its metadata under "ringmark", a description in JSON.
    Only its owner can read it, because it reveals the mark. The noise is for images of `size` (H, W), by default the
    key's reference size. Raises StoreError for a file that exists, unless `force`; ModelError for a size that such
    models cannot draw; and SchemeError for a size given with an old key, which marks only its own.
    """
    from safetensors.torch import save

    refuse_existing(path, force=force)
    shape = _latent_shape(key, size)
    noise = scheme_of(key, shape).embed(initial_noise(list(seeds), shape))
    about = {"key": key.fingerprint, "kind": key.metadata.get("kind"), "size": size, "seeds": list(seeds)}
    write_atomic(path, save({"noise": noise.contiguous()}, {"ringmark": json.dumps(about)}), 0o600)
    return shape


def _latent_shape(key: Key, size: Size | None) -> tuple[int, int, int]:
    """The shape of latents of pictures of this size, by the key's description alone."""
    if size is None:
        return key.latent_shape
    if key.values is not None:
        fact = f"marks only latents of {'x'.join(map(str, key.latent_shape))}, so no size can be chosen"
        raise SchemeError("scheme.old-key", fact, subject=f"key {key.fingerprint[:8]}")
    kind = key.metadata["kind"]
    return noise_shape(size, subject=kind["family"], **kind)
