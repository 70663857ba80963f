"""Listing of keys as lines of text; does not load torch."""

from __future__ import annotations

from pathlib import Path

from ringmark.errors import one_line
from ringmark.watermark.keys.folder import describe
from ringmark.watermark.keys.key import COMMON, Key, Kind
from ringmark.watermark.schemes.base import description

__all__ = ["card", "listing"]


def listing(ring: dict[Path, Key]) -> list[str]:
    """One line per key, in columns under a header; every field of a scheme is a column."""
    descriptions = [description(key.metadata, COMMON) for key in ring.values()]
    fields = list(dict.fromkeys(name for names in descriptions for name in names))
    rows = [("fingerprint", "scheme", *fields, "model", "created", "file")]
    for (path, key), values in zip(ring.items(), descriptions, strict=True):
        meta = key.metadata
        texts = [meta["scheme"], *(values.get(name, "") for name in fields), meta["model"].get("name", "?")]
        rows.append((key.fingerprint, *map(one_line, [*texts, meta["created"], path])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def card(key: Key) -> list[str]:
    """What may be told of one key, one line per fact; the model by name and fingerprint."""
    model = key.metadata["model"]
    texts = describe(key) | description(key.metadata, COMMON)
    if key.values is None:
        height, width = key.metadata["reference"]
        texts |= {"kind": str(Kind(**key.metadata["kind"])), "reference": f"{width}x{height} pixels"}
    else:
        texts |= {"latent_shape": "x".join(map(str, key.latent_shape))}
    texts |= {"model": f"{model.get('name', '?')} (fingerprint {model.get('fingerprint', '?')})"}
    return [f"{name:14}{one_line(text)}" for name, text in texts.items()]
