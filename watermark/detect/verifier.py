"""From pictures to verdicts: noise recovery, detection and the optional search, as used by verify and audit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ringmark.errors import CalibrationError, KeyFileError, SchemeError
from ringmark.inversion.recover import Model, Recoverer
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.detector import Detector
from ringmark.watermark.detect.search import Found, Search
from ringmark.watermark.detect.verdict import Judged, Verdict
from ringmark.watermark.keys.key import Key, Kind
from ringmark.watermark.null import Null
from ringmark.watermark.statistics import ALPHA, corrected

if TYPE_CHECKING:
    from ringmark.data.images import Sample

__all__ = ["Verifier", "built_in_calibration", "check_fit", "fitting_calibration"]


class Verifier:
    """Tests pictures for keys; all keys are tested on the same inversion.

    With a `search`, pictures in which direct detection finds no key are also searched for rotation, scaling, cropping
    and shifts. The better of the two tests counts, so p = min(1, 2 K min(p₁, p₂)) for K keys. Pictures in which a key
    is found directly are not searched, since p could only fall, nor are inconclusive ones. The score and p of a key
    found by the search are those of the search; they do not use the calibration, which was measured with the direct
    inversion.

    Raises KeyFileError for a key made for another kind of latents, CalibrationError for a calibration made with other
    settings, SchemeError for a key that cannot be searched for.
    """

    def __init__(
        self,
        recoverer: Recoverer,
        keys: Sequence[Key],
        *,
        alpha: float = ALPHA,
        calibration: Calibration | None = None,
        search: Search | None = None,
    ) -> None:
        model = recoverer.model
        notes = {key.fingerprint: check_fit(key, model) for key in keys}
        if calibration:
            calibration.check(recoverer.settings.as_dict())
        tests = 2 if search else 1
        self.recoverer, self.search = recoverer, search
        self.detector = Detector(
            keys,
            null=Null.of_model(model),
            calibration=calibration,
            alpha=alpha,
            tests=tests,
            latent_shape=model.latent_shape,
            notes=notes,
        )
        for name, scheme in self.detector.schemes.items() if search else ():
            if not scheme.searchable:
                raise SchemeError(
                    "scheme.no-search", f"({scheme.label}) cannot be searched for", subject=f"key {name[:8]}"
                )

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the pictures that are judged."""
        return self.recoverer.model.image_size

    def settings(self) -> dict[str, Any]:
        """Everything that verdicts depend on."""
        both = self.recoverer.settings.as_dict() | self.detector.settings()
        return both | ({"search": repr(self.search)} if self.search else {})

    def scan(self, samples: Iterable[Sample], batch: int = 8) -> Iterator[Judged]:
        """Judge every sample, batch by batch, in order."""
        samples = iter(samples)
        while group := list(islice(samples, batch)):
            judged = self._judge(group)
            yield from self._searched(judged, batch) if self.search else judged

    def _judge(self, samples: list[Sample]) -> list[Judged]:
        from ringmark.data.images import to_array

        recovered = self.recoverer(torch.from_numpy(np.stack([to_array(s.image) for s in samples])))
        verdicts = self.detector.judge(samples, recovered)
        return list(map(Judged, samples, verdicts, recovered.noise))

    def _searched(self, judged: list[Judged], batch: int) -> list[Judged]:
        """The same, searching those samples in which no key was found directly and that are not inconclusive."""
        assert self.search
        missed = [i for i, j in enumerate(judged) if not j.present and any(v.present is False for v in j.verdicts)]
        schemes, null = self.detector.schemes, self.detector.known
        best_fits = self.search(self.recoverer.model, schemes, null, [judged[i].sample for i in missed], batch=batch)
        for i, fits in zip(missed, best_fits, strict=True):
            pairs = zip(judged[i].verdicts, fits, strict=True)
            judged[i] = judged[i]._replace(verdicts=[self._better(verdict, fit) for verdict, fit in pairs])
        return judged

    def _better(self, verdict: Verdict, found: Found) -> Verdict:
        """The verdict with the search's p if that is smaller, and with the search's score if that finds the key."""
        verdict = replace(verdict, seconds=verdict.seconds + found.seconds)
        log10_p = corrected(found.log10_p, self.detector.number_of_tests)
        if verdict.present is None or log10_p >= verdict.log10_p:
            return verdict
        verdict = replace(verdict, p_value=10**log10_p, log10_p=log10_p, conformal_p=None)
        if verdict.p_value > self.detector.alpha:
            return verdict
        return replace(verdict, present=True, by_search=True, score=found.score, notes=(*verdict.notes, found.note))


def check_fit(key: Key, model: Model) -> str:
    """A note if the key was made for a model of other weights, otherwise "".

    Other weights of the same kind (a fine-tune, a LoRA, another precision) recover most of a mark, and p holds for
    whatever model recovers the noise, because it rests on images without the key. Raises KeyFileError for a key of
    another kind of latents, or of other latents than the model's if the key is old.
    """
    made_for = key.metadata["model"]
    if key.values is None:
        needed, given = str(Kind(**key.metadata["kind"])), str(Kind(**model.kind))
    else:
        needed, given = ("x".join(map(str, shape)) for shape in (key.latent_shape, model.latent_shape))
    if needed != given:
        fact = f"is for latents of {needed}, and {model.name} has {given}"
        raise KeyFileError("key.latents", fact, subject=f"key {key.fingerprint[:8]}", model=made_for.get("name"))
    if made_for.get("fingerprint") == model.identity["fingerprint"]:
        return ""
    return f"the key was made for model {made_for.get('name')} ({made_for.get('fingerprint')})"


def fitting_calibration(
    recoverer: Recoverer, keys: Sequence[Key], calibration: Calibration
) -> tuple[Calibration | None, CalibrationError | None]:
    """The calibration if it fits the settings and the keys, otherwise the error that says why not."""
    try:
        Verifier(recoverer, keys, calibration=calibration)
    except CalibrationError as error:
        return None, error
    return calibration, None


def built_in_calibration(
    recoverer: Recoverer, keys: Sequence[Key], folder: Path
) -> tuple[Calibration | None, CalibrationError | None]:
    """`fitting_calibration` for the one in a model's folder. Raises CalibrationError for a damaged file."""
    calibration = Calibration.built_in(folder)
    return fitting_calibration(recoverer, keys, calibration) if calibration else (None, None)
