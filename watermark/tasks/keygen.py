"""Making a key ring: many keys in a folder, of which none passes for another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from ringmark.errors import KeyFileError, SchemeError
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.calibration import whitened_features
from ringmark.watermark.detect.detector import ALPHA, Detector, null_covariance
from ringmark.watermark.keys.key import Key, load_folder
from ringmark.watermark.schemes.tree_ring import TreeRing

__all__ = ["TRIES", "Grown", "Ring", "begun", "check_findable", "cosine_bound", "draw_keys", "grow"]

FAINT = 0.99  # no picture gives back a mark so well that a whitened cosine reaches this
TRIES = 1000  # draws of one key before giving up; on average 1 / (1 − alpha)^N are needed beside N others


@dataclass(frozen=True)
class Grown:
    """A folder's new keys by file, how many it kept, and how many draws came too close to another key."""

    new: dict[Path, Key]
    kept: int
    drawn_again: int


def cosine_bound(d: int, alpha: float) -> float:
    """The whitened cosine of d features from which on a key is called present at p ≤ alpha.

    The detector's p is that of t = c √(ν / (1 − c²)) under Student's t, ν = d − 1, times the number of keys tested. It
    reaches alpha soonest for one key tested alone, where t ≥ t* = isf(alpha): c ≥ t* / √(ν + t*²). Two keys drawn
    at random, of white spectra, are that close with probability alpha, whatever d is. Raises SchemeError for d < 2.
    """
    if d < 2:
        raise SchemeError("one free number a key tells no two keys apart; widen --radii or --channels")
    t = stats.t.isf(alpha, d - 1)
    return float(t / np.hypot((d - 1) ** 0.5, t))


def check_findable(key: Key, alpha: float = ALPHA) -> None:
    """Raises SchemeError for a key of so few free numbers that hardly any image could reach p ≤ alpha for it."""
    scheme = TreeRing(key)
    free = len(scheme.feature_rings()[0])
    if scheme.pattern != "zeros" and cosine_bound(free, alpha) > FAINT:
        raise SchemeError(
            f"{scheme.pattern} in channels {list(scheme.placement.channels)}, radii {scheme.placement.radii[0]}-{scheme.placement.radii[1]}: {free} free numbers, of which a picture would have to give back {FAINT:.0%} to reach p ≤ {alpha:g}; widen --radii or --channels"
        )


class _View:
    """How marks look to a detector of one kind of key (a pattern, a mask and a placement)."""

    def __init__(self, model: LatentModel, scheme: TreeRing, alpha: float) -> None:
        self.scheme, self.null = scheme, null_covariance(model)
        self.free = len(scheme.feature_rings()[0])
        self.bound = cosine_bound(self.free, alpha)
        self.seen = np.empty((0, self.free))

    def of(self, marks: torch.Tensor) -> np.ndarray:
        """(N, C, h, w) → whitened features (N, d) of length 1, or 0 where nothing is seen."""
        features = whitened_features(self.scheme, marks, self.null)[0]
        length = np.linalg.norm(features, axis=1, keepdims=True)
        return np.divide(features, length, out=np.zeros_like(features), where=length > 0)

    def add(self, marks: torch.Tensor) -> None:
        self.seen = np.vstack([self.seen, self.of(marks)])

    def confuses(self, mark: torch.Tensor) -> bool:
        """Whether one of the marks seen and this one pass for each other."""
        return bool((self.seen @ self.of(mark)[0] >= self.bound).any())


class Ring:
    """Keys of which none passes for another, as far as `admits` was asked: for one kind of new key, beside any old ones.

    An image from which key A's mark comes back perfectly, and nothing else, has for features of key B those of A; key
    B is then called present if their whitened cosine reaches `cosine_bound`. So every cosine must stay below. Between
    keys of one kind it is symmetric. Of different kinds A's mark is seen by B's features where the two overlap, and B's
    by A's: both are asked. Keys *zeros* have no features of their own and are left out. Raises KeyFileError for old keys
    of another model or latent shape.
    """

    def __init__(self, model: LatentModel, old: Iterable[Key], like: Key, alpha: float = ALPHA) -> None:
        schemes = [s for s in Detector(model, list(old), steps=1).schemes.values() if s.pattern != "zeros"]
        self.view = _View(model, TreeRing(like), alpha)
        self.others, of = [], attrgetter("kind")
        for kind, some in groupby(sorted(schemes, key=of), of):
            same = list(some)
            marks = torch.cat([_mark(scheme) for scheme in same])
            self.view.add(marks)
            if kind != self.view.scheme.kind:
                self.others.append(_View(model, same[0], alpha))
                self.others[-1].add(marks)

    def admits(self, key: Key) -> bool:
        """Whether neither this key passes for one of the ring nor one of the ring for this; if so it is one of them."""
        mark = _mark(TreeRing(key))
        if any(view.confuses(mark) for view in (self.view, *self.others)):
            return False
        self.view.add(mark)
        return True


def _mark(scheme: TreeRing) -> torch.Tensor:
    """(1, C, h, w) the mark alone."""
    return scheme.embed(torch.zeros(1, *scheme.latent_shape))


def draw_keys(
    model: LatentModel, old: Iterable[Key], number: int, make: Callable[[], Key], alpha: float = ALPHA
) -> tuple[list[Key], int]:
    """`number` keys by `make` that can be told from each other and from `old`, and how many draws were rejected.

    All are of one kind. Raises SchemeError for the pattern *zeros*, which is the same in every key, and where TRIES
    draws in a row come too close.
    """
    key = make()
    if key.metadata["pattern"] == "zeros":
        raise SchemeError("pattern zeros has no free numbers, every key would be the same; leave out -n")
    ring, keys, rejected, row = Ring(model, old, key, alpha), [], 0, 0
    with tqdm(total=number, desc="keygen", unit="key", disable=None, leave=False, delay=2) as bar:
        while len(keys) < number:
            if ring.admits(key):
                keys.append(key)
                row = 0
                bar.update()
            else:
                rejected, row = rejected + 1, row + 1
                if row == TRIES:
                    raise _too_few(key, ring.view.free, len(keys), number)
            key = make()
    return keys, rejected


def _too_few(key: Key, free: int, found: int, number: int) -> SchemeError:
    meta = key.metadata
    place = f"{meta['pattern']} in channels {meta['channels']}, radii {meta['radii'][0]}-{meta['radii'][1]}"
    return SchemeError(
        f"{place}, has {free} free numbers a key: too few for {number} keys that can be told apart, {found} were found; ask for fewer, or widen --radii or --channels"
    )


def begun(folder: Path) -> dict[Path, Key]:
    """The keys that are in a folder, or none where it is yet to be made. Raises KeyFileError."""
    if folder.exists() and not folder.is_dir():
        raise KeyFileError(f"{folder}: is not a folder; with -n, -o names the folder for the keys")
    return load_folder(folder) if folder.exists() else {}


def grow(
    model: LatentModel, folder: Path, number: int, make: Callable[[], Key], old: dict[Path, Key], *, force: bool = False
) -> Grown:
    """Add `number` keys by `make` to a folder that holds `old`, each in a file named by its fingerprint.

    With `force` the old keys are removed when all new ones are there. Stopped at any moment, the folder holds whole
    keys only; the KeyboardInterrupt says how many are new.
    """
    new: dict[Path, Key] = {}
    try:
        keys, rejected = draw_keys(model, old.values(), number, make)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for key in keys:
            path = folder / f"{key.fingerprint}.key"
            key.save(path, overwrite=True)  # by renaming: not even a killed process leaves half a key
            new[path] = key
        for path in old if force else ():
            path.unlink()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{len(new)} of {number} keys are written to {folder}, each whole; keygen -n adds more"
        ) from None
    return Grown(new, 0 if force else len(old), rejected)
