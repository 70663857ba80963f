"""The detector: tests recovered noise for keys and returns verdicts. It runs no network."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringmark.data.batches import grouped
from ringmark.errors import SchemeError
from ringmark.inversion.recover import Recovered
from ringmark.watermark.bank import Bank, blocks
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.verdict import OUTCOMES, Verdict, Verdicts
from ringmark.watermark.keys.key import Key, distinct
from ringmark.watermark.null import Array, Null
from ringmark.watermark.schemes.base import Scheme, SchemeTest, scheme_of
from ringmark.watermark.statistics import (
    ALPHA,
    conformal_p,
    corrected,
    inflation,
    matched_filter,
    may_be_undecided,
    undecided,
    widened,
)

if TYPE_CHECKING:
    from ringmark.data.images import Sample

__all__ = ["FLAT_IMAGE", "OVERFLOW", "Detector", "Seen", "blankness", "check_unranked"]

PRESENT, UNDECIDED, ABSENT = map(OUTCOMES.index, (True, None, False))
FLAT_IMAGE, OVERFLOW = "the image is one flat colour", "the inversion overflowed"
KEPT = 4096  # keys whose tests and references are kept
FLAT = 1 / 255  # an image whose pixels vary less than half a grey level (of a range of 2) shows nothing


class Detector:
    """Tests recovered noise for each of several keys.

    `null` is the model of unmarked noise, used unless there is a `calibration`. A calibration replaces it with a
    measured null, and its unmarked images check the p-values by rank, if they have the size of the tested noise. A key
    is present at a corrected p-value of at most `alpha`; p-values are corrected for the number of keys and for `tests`,
    the number of tests per key. `latent_shape` is that of the noise, by default the calibration's or each key's own;
    `notes` are remarks for verdicts, by fingerprint of the key. Raises SchemeError for a key of an unknown scheme or of
    other latents, and CalibrationError for a key or a size that the calibration does not cover.
    """

    def __init__(
        self,
        keys: Sequence[Key],
        *,
        null: Null,
        calibration: Calibration | None = None,
        alpha: float = ALPHA,
        tests: float = 1,
        latent_shape: tuple[int, int, int] | None = None,
        notes: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.keys = distinct(keys)
        self.known, self.alpha, self.tests, self.notes = null, alpha, tests, notes
        shape = latent_shape or (calibration.latent_shape if calibration else None)
        self.schemes: dict[str, Scheme] = {key.fingerprint: scheme_of(key, shape) for key in self.keys}
        self._is_early = False
        self._set_null(calibration, shape)

    def _set_null(self, calibration: Calibration | None, shape: tuple[int, int, int] | None) -> None:
        self.calibration, schemes = calibration, list(self.schemes.values())
        self.null: Null = calibration.null_at(shape) if calibration and shape else self.known
        self._ranked = calibration if calibration and shape == calibration.latent_shape else None
        if calibration and not self._ranked:
            check_unranked(schemes)
        if self._ranked:
            for scheme in schemes:
                self._ranked.check_reach(scheme)
        by_kind = grouped(range(len(schemes)), [scheme.kind for scheme in schemes])
        self._banks = [_Members(keys, Bank([schemes[k] for k in keys], self.null)) for keys in by_kind]
        self._test = lru_cache(KEPT)(self._make_test)
        self._references = lru_cache(KEPT)(self._make_references)
        self._inflation = lru_cache(KEPT)(self._make_inflation)
        self._tables: dict[tuple[int, int], _Table] = {}
        self._tabled: dict[str, Array] = {}  # references of keys whose scores are in a table

    def early(self, calibration: Calibration) -> Detector:
        """The same detector for an early stage, under its calibration.

        Latents are less like noise than what is recovered from them, and their spread differs from key to key. So each
        p-value is widened by the spread of the key's own references.
        """
        other = copy.copy(self)
        other._is_early = True
        other._set_null(calibration, calibration.latent_shape)
        return other

    def trying(self, tests: float) -> Detector:
        """The same detector with this number of tests per key."""
        other = copy.copy(self)
        other.tests = tests
        return other

    @property
    def number_of_tests(self) -> float:
        """How many tests of an image p-values are corrected for: `tests` of each key."""
        return self.tests * len(self.schemes)

    def settings(self) -> dict[str, Any]:
        """Everything that verdicts depend on besides the recovered noise."""
        return {
            "keys": sorted(self.schemes),
            "alpha": self.alpha,
            "null": self.known.name,
            "calibration": self.calibration.fingerprint if self.calibration else None,
        }

    def judge(self, samples: Sequence[Sample], seen: Seen) -> list[Verdicts]:
        """The verdicts on each recovered sample: one per key, in the order of the keys.

        A sample that shows nothing has p = 1 and ranks below all references.
        """
        blank = np.array([[bool(doubt)] for doubt in seen.doubts])
        scores, log10_p = self._scored(_finite(seen.noise))
        log10_p = np.where(blank, 0.0, log10_p)
        doubted = blank | self._contradicted(np.where(blank, -np.inf, scores), 10**log10_p)
        joint = corrected(log10_p, self.number_of_tests)
        outcome = np.where(doubted, UNDECIDED, np.where(10**joint <= self.alpha, PRESENT, ABSENT)).astype(np.int8)
        batch = _Batch(detector=self, samples=samples, seen=seen, outcome=outcome, log10_p=log10_p, scores=scores)
        return [
            Verdicts(
                outcome=outcome[i],
                log10_p=joint[i],
                score=scores[i],
                build=partial(batch.build, i),
                seconds=seen.seconds,
                shows=not seen.doubts[i],
            )
            for i in range(len(samples))
        ]

    def _scored(self, noise: Tensor) -> tuple[Array, Array]:
        """Scores (B, K) and log₁₀ of the uncorrected p-values (B, K) of recovered noise (B, C, h, w)."""
        scores = np.empty((len(noise), len(self.schemes)))
        log10_p = np.empty_like(scores)
        names = list(self.schemes)
        for number, (members, bank) in enumerate(self._banks):
            scores[:, members] = bank.scores(bank.test.observe(noise))
            if bank.by_template:
                raw = bank.test.log10_p(scores[:, members])
                log10_p[:, members] = widened(raw, self._table(number).inflation) if self._is_early else raw
                continue
            for k in members:
                log10_p[:, k] = self._log10_p(names[k], scores[:, k])
        return scores, log10_p

    def _contradicted(self, scores: Array, p_values: Array) -> NDArray[np.bool_]:
        """Which uncorrected p-values (B, K) the ranks of the scores (B, K) contradict (`statistics.undecided`)."""
        contradicted = np.zeros(scores.shape, bool)
        if self._ranked is None:
            return contradicted
        names, n, alpha = list(self.schemes), self._ranked.n, self.alpha / self.number_of_tests
        for k in np.flatnonzero((suspects := self._suspects(scores, p_values)).any(0)):
            rows, references = suspects[:, k], self.reference_scores(names[k])
            assert references is not None
            ranks = conformal_p(scores[rows, k], references)
            contradicted[rows, k] = undecided(p_values[rows, k], ranks, n, alpha)
        return contradicted

    def _suspects(self, scores: Array, p_values: Array) -> NDArray[np.bool_]:
        """Which p-values (B, K) their ranks might contradict; the references of all others need not be looked at.

        A contradiction counts only if p ≤ α, or if the rank reaches α: fewer than `most` references score as high. For
        keys with templates, the score which that takes is known from one matrix product of references and keys.
        """
        assert self._ranked
        n, alpha, most = self._ranked.n, self.alpha / self.number_of_tests, self._most
        suspects = np.ones(scores.shape, bool)
        for number, (members, bank) in enumerate(self._banks):
            if bank.by_template:
                high = scores[:, members] > self._table(number).limit
                high[high] = may_be_undecided(p_values[:, members][high], most - 1, n)
                suspects[:, members] = high | (p_values[:, members] <= alpha)
        return suspects

    @property
    def _most(self) -> int:
        """From how many references as high on a rank does not reach α."""
        assert self._ranked
        n, alpha = self._ranked.n, self.alpha / self.number_of_tests
        return min(n, int((n + 1) * max(alpha, 1 / (n + 1))) + 1)

    def _table(self, number: int) -> _Table:
        """What the references of the keys of one of the banks say."""
        assert self._ranked
        most, (members, bank) = self._most, self._banks[number]
        if (number, most) not in self._tables:
            limits, inflations = list[Array](), list[Array]()
            for block in blocks(len(members)):
                scores = self._ranked.reference_table(bank.schemes[block])
                limits.append(np.partition(scores, -most, axis=0)[-most])
                inflations.append(inflation(bank.test.log10_p(scores)) if self._is_early else np.ones(scores.shape[1]))
                if len(self._tabled) + len(members[block]) <= KEPT:
                    names = (self.keys[k].fingerprint for k in members[block])
                    self._tabled |= zip(names, scores.T.copy(), strict=True)
            self._tables[number, most] = _Table(np.concatenate(limits), np.concatenate(inflations))
        return self._tables[number, most]

    def statistic(self, key: str, noise: Tensor) -> tuple[Array, Array]:
        """Scores (B,) and log₁₀ of the uncorrected p-values (B,) of finite recovered noise (B, C, h, w)."""
        test = self._test(key)
        scores = test.score(test.observe(noise))
        return scores, self._log10_p(key, scores)

    def matched_filter(self, key: str, noise: Tensor) -> Array | None:
        """The whitened matched filter (B,) of recovered noise (B, C, h, w); None for a scheme without a template."""
        test = self._test(key)
        return None if test.template is None else matched_filter(test.observe(noise), test.template)[0]

    def density(self, key: str, scores: Array) -> Array | None:
        """The density of these ascending scores (n,) under the null; None if it is not known."""
        density = self._test(key).density(scores)
        if density is None or not self._is_early or self._inflation(key) == 1:
            return density
        return np.asarray(-np.gradient(10 ** np.minimum(0.0, self._log10_p(key, scores)), scores))

    def threshold(self, key: str) -> float | None:
        """The lowest score at which a key is present; None if it is not known in closed form."""
        level = math.log10(self.alpha / self.number_of_tests)
        if self._test(key).density(np.zeros(1)) is None:
            return None
        reached = [high for high in 2.0 ** np.arange(20) if self._log10_p(key, np.array([high]))[0] <= level]
        if not reached:
            return None
        low, high = 0.0, float(reached[0])
        while (middle := (low + high) / 2) not in (low, high):
            present = self._log10_p(key, np.array([middle]))[0] <= level
            low, high = (low, middle) if present else (middle, high)
        return high

    def reference_scores(self, key: str) -> Array | None:
        """Scores (n,) of the calibration's unmarked images for a key; None without a calibration of this size."""
        return self._tabled[key] if key in self._tabled else self._references(key)

    def _make_references(self, key: str) -> Array | None:
        return self._ranked.reference_scores(self.schemes[key]) if self._ranked else None

    def _make_test(self, key: str) -> SchemeTest:
        return self.schemes[key].on(self.null)

    def _log10_p(self, key: str, scores: Array) -> Array:
        log10_p = self._test(key).log10_p(scores, self.reference_scores(key))
        return widened(log10_p, self._inflation(key)) if self._is_early else log10_p

    def _make_inflation(self, key: str) -> Array:
        """That of one key; the p-values of one without a template rest on its references already."""
        references, test = self.reference_scores(key), self._test(key)
        return np.ones(()) if references is None or test.template is None else inflation(test.log10_p(references))


@dataclass(frozen=True, eq=False)
class Seen:
    """What verdicts on a batch rest on and report: noise (B, C, h, w), and for each picture why it cannot be tested
    ("" if it can), its residual and the status of its inversion; seconds of computing time per image. The published
    statistics, which take longer than all else, are only computed if they are `compared`."""

    noise: Tensor
    doubts: list[str]
    residuals: list[float | None]
    status: list[str]
    seconds: float
    compared: bool = True

    @classmethod
    def of(cls, recovered: Recovered) -> Seen:
        """What has just been recovered."""
        return cls(
            noise=recovered.noise,
            doubts=list(map(blankness, recovered.images, recovered.noise)),
            residuals=_residuals(recovered),
            status=[status.value for status in recovered.solution.status],
            seconds=recovered.seconds,
        )


class _Table(NamedTuple):
    """For each key (K,) of a bank: the score above which its rank reaches α, and at an early stage, how much wider than
    normal its references' scores are."""

    limit: Array
    inflation: Array


class _Members(NamedTuple):
    """The numbers of the keys of one kind, and their bank."""

    keys: list[int]
    bank: Bank


@dataclass(frozen=True, eq=False)
class _Batch:
    """Builds verdicts on samples from the outcomes, the uncorrected log₁₀ p and the scores of all keys (B, K)."""

    detector: Detector
    samples: Sequence[Sample]
    seen: Seen
    outcome: NDArray[np.int8]
    log10_p: Array
    scores: Array

    def build(self, i: int, k: int) -> Verdict:
        """The verdict on a sample and a key."""
        detector, sample, seen = self.detector, self.samples[i], self.seen
        key, doubt = detector.keys[k].fingerprint, seen.doubts[i]
        log10_p = float(corrected(self.log10_p[i, k], detector.number_of_tests))
        published = detector.schemes[key].published(_finite(seen.noise[i : i + 1])) if seen.compared else {}
        shows, (conformal, n) = not doubt, self._conformal(key, i, k)
        if conformal is not None and shows and self.outcome[i, k] == UNDECIDED:
            doubt = (
                f"{round(conformal * (n + 1)) - 1} of {n} unmarked images score as high, "
                f"which contradicts an uncorrected p of {10 ** self.log10_p[i, k]:.2g}"
            )
        return Verdict(
            sample_id=sample.id,
            key=key,
            present=OUTCOMES[self.outcome[i, k]],
            p_value=10**log10_p,
            log10_p=log10_p,
            score=float(self.scores[i, k]),
            statistics={name: float(values[0]) for name, values in published.items()},
            residual=seen.residuals[i],
            status=seen.status[i],
            seconds=seen.seconds,
            conformal_p=None if conformal is None else min(1.0, conformal * detector.number_of_tests),
            calibration=detector.calibration.fingerprint if detector.calibration else None,
            notes=(*sample.notes, *filter(None, [detector.notes.get(key), doubt])),
            shows=shows,
        )

    def _conformal(self, key: str, i: int, k: int) -> tuple[float | None, int]:
        """The uncorrected conformal p-value and the number of references, or None and 0 without any."""
        references = self.detector.reference_scores(key)
        if references is None:
            return None, 0
        score = np.array(-np.inf if self.seen.doubts[i] else self.scores[i, k])
        return float(conformal_p(score, references)), len(references)


def _finite(noise: Tensor) -> Tensor:
    """The noise with zeros for values that are not finite."""
    return torch.nan_to_num(noise, 0.0, 0.0, 0.0)


def check_unranked(schemes: Iterable[Scheme]) -> None:
    """Raises SchemeError for keys without free numbers: p of a power, not of a cosine, needs a ranked null."""
    for scheme in schemes:
        if not scheme.free:
            fact = "needs a calibration of pictures of the tested size"
            raise SchemeError("scheme.unranked", fact, subject=f"pattern {scheme.label!r}")


def blankness(image: Tensor, noise: Tensor) -> str:
    """Why an image (3, H, W) with this recovered noise (C, h, w) cannot be tested; "" if it can."""
    if image.std((1, 2)).max() < FLAT:
        return FLAT_IMAGE
    return "" if noise.isfinite().all() else OVERFLOW


def _residuals(recovered: Recovered) -> list[float | None]:
    """Pixel RMS error of each image's solution, in grey levels of 255; None if it is not finite or not computed."""
    error: NDArray[np.float32] = recovered.solution.at_value(recovered.solution.merits).numpy()
    rms = error / recovered.images[0].numel() ** 0.5 * 127.5
    return [float(x) if np.isfinite(x) else None for x in rms]
