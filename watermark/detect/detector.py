"""The detector: tests recovered noise for keys and returns verdicts. It runs no network."""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringmark.errors import SchemeError
from ringmark.inversion.recover import Recovered
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.verdict import Verdict
from ringmark.watermark.keys.key import Key
from ringmark.watermark.null import Array, Null
from ringmark.watermark.schemes.base import Scheme, SchemeTest, scheme_of
from ringmark.watermark.statistics import ALPHA, conformal_p, corrected, matched_filter, undecided

if TYPE_CHECKING:
    from ringmark.data.images import Sample

__all__ = ["Detector", "blankness", "check_unranked"]

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
        self.keys, self.known, self.calibration = list(keys), null, calibration
        self.alpha, self.tests, self.notes = alpha, tests, notes
        shape = latent_shape or (calibration.latent_shape if calibration else None)
        self.null: Null = calibration.null_at(shape) if calibration and shape else null
        self._ranked = calibration if calibration and shape == calibration.latent_shape else None
        self.schemes: dict[str, Scheme] = {key.fingerprint: scheme_of(key, shape) for key in keys}
        self._tests: dict[str, SchemeTest] = {name: scheme.on(self.null) for name, scheme in self.schemes.items()}
        self._references: dict[str, Array] = {}
        if calibration and not self._ranked:
            check_unranked(self.schemes.values())
        if self._ranked:
            for scheme in self.schemes.values():
                self._ranked.check_reach(scheme)

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

    def judge(self, samples: Sequence[Sample], recovered: Recovered) -> list[list[Verdict]]:
        """The verdicts on each recovered sample: one per key, in the order of the keys."""
        doubts = list(map(blankness, recovered.images, recovered.noise))
        noise = torch.nan_to_num(recovered.noise, 0.0, 0.0, 0.0)
        observed: dict[Hashable, Array] = {}
        per_key = []
        for name, scheme in self.schemes.items():
            if scheme.kind not in observed:
                observed[scheme.kind] = self._tests[name].observe(noise)
            scores = self._tests[name].score(observed[scheme.kind])
            per_key.append(self._verdicts(name, samples, recovered, noise, scores, doubts))
        return list(map(list, zip(*per_key, strict=True)))

    def statistic(self, key: str, noise: Tensor) -> tuple[Array, Array]:
        """Scores (B,) and log₁₀ of the uncorrected p-values (B,) of finite recovered noise (B, C, h, w)."""
        test = self._tests[key]
        scores = test.score(test.observe(noise))
        return scores, self._log10_p(key, scores)

    def matched_filter(self, key: str, noise: Tensor) -> Array | None:
        """The whitened matched filter (B,) of recovered noise (B, C, h, w); None for a scheme without a template."""
        test = self._tests[key]
        return None if test.template is None else matched_filter(test.observe(noise), test.template)[0]

    def density(self, key: str, scores: Array) -> Array | None:
        """The density of these scores under the null; None if it is not known."""
        return self._tests[key].density(scores)

    def threshold(self, key: str) -> float | None:
        """The lowest score at which a key is present; None if it is not known in closed form."""
        level = math.log10(self.alpha / self.number_of_tests)
        if self.density(key, np.zeros(1)) is None:
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
        if self._ranked is None:
            return None
        if key not in self._references:
            self._references[key] = self._ranked.reference_scores(self.schemes[key])
        return self._references[key]

    def _log10_p(self, key: str, scores: Array) -> Array:
        return self._tests[key].log10_p(scores, self.reference_scores(key))

    def _verdicts(
        self,
        key: str,
        samples: Sequence[Sample],
        recovered: Recovered,
        noise: Tensor,
        scores: Array,
        doubts: list[str],
    ) -> list[Verdict]:
        """One verdict per sample. A sample that shows nothing has p = 1 and ranks below all references."""
        blank = np.array([bool(doubt) for doubt in doubts])
        log10_p = np.where(blank, 0.0, self._log10_p(key, scores))
        conformal, contradictions = self._rank(key, np.where(blank, -np.inf, scores), 10**log10_p)
        published = self.schemes[key].published(noise)
        residuals = _residuals(recovered)
        verdicts = []
        for i, sample in enumerate(samples):
            log10 = corrected(float(log10_p[i]), self.number_of_tests)
            doubt = doubts[i] or contradictions[i]
            verdicts.append(
                Verdict(
                    sample_id=sample.id,
                    key=key,
                    present=None if doubt else 10**log10 <= self.alpha,
                    p_value=10**log10,
                    log10_p=log10,
                    score=float(scores[i]),
                    statistics={name: float(values[i]) for name, values in published.items()},
                    residual=residuals[i],
                    status=recovered.solution.status[i].value,
                    seconds=recovered.seconds,
                    label=sample.label,
                    conformal_p=None if conformal is None else min(1.0, conformal[i] * self.number_of_tests),
                    calibration=self.calibration.fingerprint if self.calibration else None,
                    notes=(*sample.notes, *filter(None, [self.notes.get(key), doubt])),
                    shows=not blank[i],
                )
            )
        return verdicts

    def _rank(self, key: str, scores: Array, p_values: Array) -> tuple[list[float] | None, list[str]]:
        """Uncorrected conformal p-values (B,), and for each the reason why it contradicts its p-value, or ""."""
        references = self.reference_scores(key)
        if references is None:
            return None, [""] * len(scores)
        n, conformal = len(references), conformal_p(scores, references)
        contradicted = undecided(p_values, conformal, n, self.alpha / self.number_of_tests)
        reasons = [
            f"{round(c * (n + 1)) - 1} of {n} unmarked images score as high, "
            f"which contradicts an uncorrected p of {p:.2g}"
            for c, p in zip(conformal, p_values, strict=True)
        ]
        notes = [reason if doubt else "" for doubt, reason in zip(contradicted, reasons, strict=True)]
        return conformal.tolist(), notes


def check_unranked(schemes: Iterable[Scheme]) -> None:
    """Raises SchemeError for keys without free numbers: p of a power, not of a cosine, needs a ranked null."""
    for scheme in schemes:
        if not scheme.free:
            fact = "needs a calibration of pictures of the tested size"
            raise SchemeError("scheme.unranked", fact, subject=f"pattern {scheme.label!r}")


def blankness(image: Tensor, noise: Tensor) -> str:
    """Why an image (3, H, W) with this recovered noise (C, h, w) cannot be tested; "" if it can."""
    if image.std((1, 2)).max() < FLAT:
        return "the image is one flat colour"
    return "" if noise.isfinite().all() else "the inversion overflowed"


def _residuals(recovered: Recovered) -> list[float | None]:
    """Pixel RMS error of each image's solution, in grey levels of 255; None if it is not finite or not computed."""
    error: NDArray[np.float32] = recovered.solution.at_value(recovered.solution.merits).numpy()
    rms = error / recovered.images[0].numel() ** 0.5 * 127.5
    return [float(x) if np.isfinite(x) else None for x in rms]
