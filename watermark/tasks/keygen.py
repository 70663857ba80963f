"""Make one key, or a folder of keys that can be distinguished from each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
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
from ringmark.watermark.schemes.base import DEFAULT, Scheme, SchemeTest, TemplateTest, make_key, scheme_of
from ringmark.watermark.statistics import ALPHA
from ringmark.watermark.tasks.calibrate import recovery_of

__all__ = ["TRIES", "Grown", "Ring", "draw_keys", "grow", "keys_in", "new_key", "write_key"]

TRIES = 1000  # draws of one key before giving up; next to N other keys, 1 / (1 − alpha)^N are needed on average


@dataclass(frozen=True)
class Grown:
    """New keys by file, the number of old keys kept, and the number of draws rejected as too close to another key."""

    new: dict[Path, Key]
    kept: int
    drawn_again: int


def new_key(model: Model, scheme: str = DEFAULT, calibration: Calibration | None = None, **parameters: Any) -> Key:
    """A new key for a model, placed where noise is best recovered according to the calibration or the model.

    Its reference size is that of the calibration or the model's native size. `parameters` are those of the scheme.
    Raises SchemeError for a mark that does not fit, CalibrationError for a calibration of another model or one without
    measured recovery.
    """
    recovery = recovery_of(model, calibration)
    shape, kind = (calibration or model).latent_shape, model.kind
    reference = [n * kind["factor"] for n in shape[1:]]
    return make_key(scheme, kind=kind, reference=reference, model=model.identity, recovery=recovery, **parameters)


def write_key(output: Path, make: Callable[[], Key], *, force: bool = False) -> Key:
    """Make one key and write it to a file; `force` replaces a key that is there.

    Raises SchemeError for a key of too few free numbers to be detected, KeyFileError if the file cannot be written.
    """
    key = make()
    scheme_of(key).check_findable(ALPHA)
    key.save(output, overwrite=force)
    return key


@dataclass
class _Kind:
    """The tests of a ring's keys of one kind, and what they observe of every mark in the ring (N, d)."""

    tests: list[SchemeTest] = field(default_factory=list)
    observed: list[Array] = field(default_factory=list)

    def add(self, marks: Iterable[Tensor]) -> None:
        """Add what the tests observe of these marks."""
        self.observed += [self.tests[0].observe(mark) for mark in marks]

    def scores(self, mark: Tensor) -> Array:
        """The score of each test (K,) for this mark; one matrix product if the tests have templates."""
        first = self.tests[0]
        observed = first.observe(mark)
        if not isinstance(first, TemplateTest):
            return np.concatenate([test.score(observed) for test in self.tests])
        templates = [test.template for test in self.tests if isinstance(test, TemplateTest)]
        return first.scores(observed, np.stack(templates)).reshape(-1)


class Ring:
    """Keys that can be distinguished from each other.

    If exactly the mark of key A is recovered, key B, tested alone, must not reach p ≤ alpha, and vice versa. Keys of
    schemes without free numbers are left out. All of this is checked at the model's own size. Raises KeyFileError for
    keys of another kind of latents.
    """

    def __init__(self, model: Model, keys: Iterable[Key], alpha: float = ALPHA) -> None:
        # All bands count, as they do for verdicts by a calibration.
        self.null, self.log10_alpha = replace(Null.of_model(model), layout_known=True), float(np.log10(alpha))
        self.latent_shape = model.latent_shape
        self.kinds: dict[Hashable, _Kind] = {}
        self.marks: list[Tensor] = []
        for key in keys:
            check_fit(key, model)
            scheme = scheme_of(key, self.latent_shape)
            if scheme.free:
                self._add(scheme.kind, scheme.on(self.null), self._mark(scheme))

    def admits(self, key: Key) -> bool:
        """Add the key if it can be distinguished from all keys of the ring; return whether it was added."""
        scheme = scheme_of(key, self.latent_shape)
        test, mark = scheme.on(self.null), self._mark(scheme)
        if self._sees_another(scheme.kind, test) or self._is_seen(mark):
            return False
        self._add(scheme.kind, test, mark)
        return True

    def _mark(self, scheme: Scheme) -> Tensor:
        """The mark alone (1, C, h, w)."""
        return scheme.embed(torch.zeros(1, *self.latent_shape))

    def _sees_another(self, kind: Hashable, test: SchemeTest) -> bool:
        """Whether a key with this test is found in the mark of another key."""
        if not self.marks:
            return False
        known = self.kinds.get(kind)
        observed = known.observed if known else [test.observe(mark) for mark in self.marks]
        return self._reached(test, test.score(np.concatenate(observed)))

    def _is_seen(self, mark: Tensor) -> bool:
        """Whether another key is found in this mark."""
        for kind in self.kinds.values():
            if self._reached(kind.tests[0], kind.scores(mark)):
                return True
        return False

    def _reached(self, test: SchemeTest, scores: Array) -> bool:
        return bool((test.log10_p(scores) <= self.log10_alpha).any())

    def _add(self, kind: Hashable, test: SchemeTest, mark: Tensor) -> None:
        for known in self.kinds.values():
            known.add([mark])
        self.marks.append(mark)
        if kind in self.kinds:
            self.kinds[kind].tests.append(test)
        else:
            self.kinds[kind] = _Kind([test])
            self.kinds[kind].add(self.marks)


def draw_keys(model: Model, old: Iterable[Key], number: int, make: Callable[[], Key]) -> tuple[list[Key], int]:
    """Draw `number` keys by `make`, distinguishable from each other and from `old`; also return how many were rejected.

    Raises SchemeError for a scheme without free numbers, in which all keys are the same, for one with too few of them
    to be detected, and if TRIES draws in a row are rejected.
    """
    first = make()
    scheme = scheme_of(first)
    if not scheme.free:
        raise SchemeError("scheme.no-free-numbers", "has no free numbers to tell keys apart", subject=scheme.label)
    scheme.check_findable(ALPHA)
    drawn = chain([first], iter(make, None))
    ring, keys, rejected, row = Ring(model, old), list[Key](), 0, 0
    with tqdm(total=number, desc="keygen", unit="key", disable=None, leave=False, delay=2) as bar:
        while len(keys) < number:
            if ring.admits(key := next(drawn)):
                keys.append(key)
                row = 0
                bar.update()
            else:
                rejected, row = rejected + 1, row + 1
                if row == TRIES:
                    raise _too_few(scheme, len(keys), number)
    return keys, rejected


def _too_few(scheme: Scheme, found: int, number: int) -> SchemeError:
    fact = f"has {scheme.free} free numbers, too few for {number} distinct keys; {found} were found"
    return SchemeError("scheme.crowded", fact, subject=scheme.label)


def keys_in(folder: Path) -> dict[Path, Key]:
    """The keys in a folder; empty if the folder does not exist yet. Raises KeyFileError."""
    if folder.exists() and not folder.is_dir():
        raise KeyFileError("key.not-a-folder", "is not a folder", subject=folder)
    return load_folder(folder) if folder.exists() else {}


def grow(
    model: Model, folder: Path, number: int, make: Callable[[], Key], old: dict[Path, Key], *, force: bool = False
) -> Grown:
    """Add `number` keys by `make` to a folder with the keys `old`, each in a file named by its fingerprint.

    With `force`, the old keys are removed once all new ones are written. An interrupted run leaves only complete key
    files; the KeyboardInterrupt says how many are new.
    """
    new: dict[Path, Key] = {}
    try:
        keys, rejected = draw_keys(model, old.values(), number, make)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for key in keys:
            path = folder / f"{key.fingerprint}.key"
            key.save(path, overwrite=True)  # atomic, so a killed process leaves no partial key
            new[path] = key
        for path in old if force else ():
            path.unlink()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{len(new)} of {number} keys are written to {folder}; all of them are complete"
        ) from None
    return Grown(new, 0 if force else len(old), rejected)
