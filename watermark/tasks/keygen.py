"""Making keys: one, or many in a folder of which none passes for another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ringmark.errors import KeyFileError, SchemeError
from ringmark.inversion.recover import Model
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.verifier import check_fit
from ringmark.watermark.keys.folder import load_folder
from ringmark.watermark.keys.key import Key
from ringmark.watermark.null import Array, Null
from ringmark.watermark.schemes.base import Scheme, SchemeTest, make_key, scheme_of
from ringmark.watermark.statistics import ALPHA
from ringmark.watermark.tasks.calibrate import recovery_of

__all__ = ["TRIES", "Grown", "Ring", "draw_keys", "grow", "keys_in", "new_key"]

TRIES = 1000  # draws of one key before giving up; on average 1 / (1 − alpha)^N are needed beside N others


@dataclass(frozen=True)
class Grown:
    """A folder's new keys by file, how many it kept, and how many draws came too close to another key."""

    new: dict[Path, Key]
    kept: int
    drawn_again: int


def new_key(model: Model, scheme: str, calibration: Calibration | None = None, **parameters: Any) -> Key:
    """A new key for a model, placed by a calibration or by what is known of the model.

    `parameters` are the scheme's own. Raises SchemeError for a mark that does not fit, CalibrationError for a
    calibration of another model or one that does not tell where marks come back best.
    """
    recovery = recovery_of(model, calibration)
    return make_key(scheme, model.latent_shape, model=model.identity, recovery=recovery, **parameters)


@dataclass
class _Kind:
    """The keys of one kind in a ring, and what their tests observe of every mark of the ring (N, d)."""

    tests: list[SchemeTest] = field(default_factory=list)
    observed: list[Array] = field(default_factory=list)

    def add(self, marks: Iterable[Tensor]) -> None:
        """Observe these marks."""
        self.observed += [self.tests[0].observe(mark) for mark in marks]


class Ring:
    """Keys of which none passes for another.

    An image from which key A's mark comes back perfectly, and nothing else, must not reach p ≤ alpha for key B, tested
    alone: that is asked in both directions. Keys of schemes without free numbers are left out. Raises KeyFileError for
    keys of another model or latent shape.
    """

    def __init__(self, model: Model, keys: Iterable[Key], alpha: float = ALPHA) -> None:
        self.null, self.log10_alpha = Null.of_model(model), float(np.log10(alpha))
        self.kinds: dict[Any, _Kind] = {}
        self.marks: list[Tensor] = []
        for key in keys:
            check_fit(key, model)
            scheme = scheme_of(key)
            if scheme.free:
                self._add(scheme)

    def admits(self, key: Key) -> bool:
        """Whether this key passes for none of the ring, and none of the ring for it; if so it becomes one of them."""
        scheme = scheme_of(key)
        mark = scheme.embed(torch.zeros(1, *scheme.latent_shape))
        if self._sees_another(scheme) or self._is_seen(mark):
            return False
        self._add(scheme)
        return True

    def _sees_another(self, scheme: Scheme) -> bool:
        """Whether the key is found where another one's mark is."""
        if not self.marks:
            return False
        test, kind = scheme.on(self.null), self.kinds.get(scheme.kind)
        observed = kind.observed if kind else [test.observe(mark) for mark in self.marks]
        return self._reached(test, test.score(np.concatenate(observed)))

    def _is_seen(self, mark: Tensor) -> bool:
        """Whether another key is found where this mark is."""
        for kind in self.kinds.values():
            observed = kind.tests[0].observe(mark)
            scores = np.concatenate([test.score(observed) for test in kind.tests])
            if self._reached(kind.tests[0], scores):
                return True
        return False

    def _reached(self, test: SchemeTest, scores: Array) -> bool:
        return bool((test.log10_p(scores) <= self.log10_alpha).any())

    def _add(self, scheme: Scheme) -> None:
        mark = scheme.embed(torch.zeros(1, *scheme.latent_shape))
        for kind in self.kinds.values():
            kind.add([mark])
        self.marks.append(mark)
        if scheme.kind not in self.kinds:
            self.kinds[scheme.kind] = _Kind([scheme.on(self.null)])
            self.kinds[scheme.kind].add(self.marks)
        else:
            self.kinds[scheme.kind].tests.append(scheme.on(self.null))


def draw_keys(
    model: Model, old: Iterable[Key], number: int, make: Callable[[], Key], alpha: float = ALPHA
) -> tuple[list[Key], int]:
    """`number` keys by `make` that can be told from each other and from `old`, and how many draws were rejected.

    Raises SchemeError for a scheme without free numbers, in which all keys are the same, and where TRIES draws in a
    row come too close.
    """
    key = make()
    scheme = scheme_of(key)
    if scheme.free < 2:
        fact = f"has {scheme.free} free numbers, too few to tell keys apart"
        raise SchemeError("scheme.no-free-numbers", fact, subject=scheme.label)
    ring, keys, rejected, row = Ring(model, old, alpha), list[Key](), 0, 0
    with tqdm(total=number, desc="keygen", unit="key", disable=None, leave=False, delay=2) as bar:
        while len(keys) < number:
            if ring.admits(key):
                keys.append(key)
                row = 0
                bar.update()
            else:
                rejected, row = rejected + 1, row + 1
                if row == TRIES:
                    raise _too_few(scheme, len(keys), number)
            key = make()
    return keys, rejected


def _too_few(scheme: Scheme, found: int, number: int) -> SchemeError:
    fact = f"has {scheme.free} free numbers, too few for {number} distinct keys; {found} were found"
    return SchemeError("scheme.crowded", fact, subject=scheme.label)


def keys_in(folder: Path) -> dict[Path, Key]:
    """The keys that are in a folder; none where there is no folder yet. Raises KeyFileError."""
    if folder.exists() and not folder.is_dir():
        raise KeyFileError("key.not-a-folder", "is not a folder", subject=folder)
    return load_folder(folder) if folder.exists() else {}


def grow(
    model: Model, folder: Path, number: int, make: Callable[[], Key], old: dict[Path, Key], *, force: bool = False
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
        raise KeyboardInterrupt(f"{len(new)} of {number} keys are written to {folder}; each is whole") from None
    return Grown(new, 0 if force else len(old), rejected)
