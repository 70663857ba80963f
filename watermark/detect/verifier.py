"""From pictures to verdicts: noise recovery, detection and the optional search, as used by verify and audit."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ringmark.data.batches import batched, grouped
from ringmark.errors import CalibrationError, KeyFileError, SchemeError
from ringmark.inversion.memory import fitting_batch, halving
from ringmark.inversion.recover import Identified, Recoverer
from ringmark.inversion.sizes import Size, candidate_sizes
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.cascade import Stage, calibrated_stages, walk
from ringmark.watermark.detect.detector import Detector, check_unranked
from ringmark.watermark.detect.search import Found, Search, check_searchable
from ringmark.watermark.detect.verdict import OUTCOMES, Judged, Verdict, Verdicts
from ringmark.watermark.keys.key import Key, Kind, distinct
from ringmark.watermark.null import Null
from ringmark.watermark.statistics import ALPHA, corrected

if TYPE_CHECKING:
    from ringmark.data.images import Sample

__all__ = [
    "Verifier",
    "at_best_size",
    "better",
    "built_in_calibration",
    "check_fit",
    "detector_at",
    "fitting_calibration",
    "sizes_kept",
]

MAX_SIZES, MAX_TESTS = 64, 64_000  # sizes whose detectors are kept, and tests in all of them (some kB each)


def sizes_kept(keys: int) -> int:
    """For how many sizes detectors of this number of keys are kept; strangers send pictures of every size."""
    return min(MAX_SIZES, max(4, MAX_TESTS // max(1, keys)))


class Verifier:
    """Tests pictures for keys; all keys are tested on the same inversion.

    A picture is tried at every size at which it may have been drawn: at `sizes` (H, W) if they are given, otherwise at
    those of `candidate_sizes`. The size that fits best counts, and the sizes after one at which a key is found are not
    tried. With a `search`, pictures in which no key is found are also searched for changes of their plane, at the first
    of their sizes, unless they are inconclusive. The best of all tests counts, so p = min(1, K n
    min pᵢ) for K keys, each with n tests: one at every size, and the search. The score and p of a key found by the
    search are those of the search; they do not use the calibration, which was measured with the direct inversion.

    Pictures of the calibration's size go through the stages that it was made for (`detect.cascade`), as far as needed
    or, if `thorough`, all of them. Without a null, an early stage cannot be judged: latents are far from white noise.

    Raises KeyFileError for a key made for another kind of latents, CalibrationError for a calibration made with other
    settings, ModelError for a size that the model cannot draw, SchemeError for a key that cannot be searched for or
    that does not fit the model's native size or one of `sizes`.
    """

    def __init__(
        self,
        recoverer: Recoverer,
        keys: Sequence[Key],
        *,
        alpha: float = ALPHA,
        calibration: Calibration | None = None,
        search: Search | None = None,
        sizes: Sequence[Size] = (),
        thorough: bool = False,
    ) -> None:
        model = recoverer.model
        self.recoverer, self.search, self.alpha, self.thorough = recoverer, search, alpha, thorough
        self.keys, self.sizes = distinct(keys), tuple(dict.fromkeys(sizes))
        self._notes = {key.fingerprint: check_fit(key, model) for key in self.keys}
        if calibration:
            calibration.check(recoverer.settings.as_dict())
        self.calibration = calibration
        self._early = calibrated_stages(recoverer, calibration) if calibration else []
        self._stages = lru_cache(sizes_kept(len(self.keys)))(self._stages_at)
        for size in (model.image_size, *self.sizes):  # so that a key that does not fit is refused now
            self._stages(size)
        self.detector = self._stages((*self.sizes, model.image_size)[0])[-1].detector.trying(self._tests(1))
        if search:
            check_searchable(self.detector.schemes)

    def _stages_at(self, size: Size) -> list[Stage]:
        """The stages of pictures of this size; there are early ones if the calibration was made at this size."""
        shape, model = self.recoverer.model.noise_shape(size), self.recoverer.model
        detector = detector_at(
            shape,
            self.keys,
            null=Null.of_model(model, shape),
            calibration=self.calibration,
            alpha=self.alpha,
            notes=self._notes,
        )
        calibration = detector.calibration
        early = self._early if calibration and shape == calibration.latent_shape else []
        stages = [Stage.early(recoverer, detector.early(made)) for recoverer, made in early]
        weight = 1 - sum(stage.weight for stage in stages)
        last = Stage(name="full", recoverer=self.recoverer, detector=detector, weight=weight)
        if not calibration and size != model.image_size:
            check_unranked(last.detector.schemes.values())
        return [*stages, last]

    def _tests(self, sizes: int) -> int:
        """The number of tests of each key in a picture that is tried at this number of sizes."""
        return sizes + (1 if self.search else 0)

    def detector_of(self, judged: Judged) -> Detector:
        """The detector that judged a sample."""
        return self._stages(_size_of(judged.sample))[judged.stage].trying(judged.tests)

    def sizes_of(self, picture: Size) -> tuple[Size, ...]:
        """The sizes (H, W) at which a picture of this size is tried, of which every key fits each; at least one.

        If pictures are searched, they are `WithParts`.
        """
        from ringmark.data.images import WithParts

        model = self.recoverer.model
        fitting = [size for size in self.sizes or candidate_sizes(picture, model) if self._fits(size)]
        sizes = fitting or [model.image_size]
        return WithParts(sizes) if self.search else tuple(sizes)

    def _fits(self, size: Size) -> bool:
        try:
            self._stages(size)
        except SchemeError:  # an old key, or radii beyond what latents of this size hold
            return False
        return True

    def settings(self) -> dict[str, Any]:
        """Everything that verdicts depend on."""
        both = self.recoverer.settings.as_dict() | self.detector.settings()
        search = {"search": repr(self.search)} if self.search else {}
        sizes = {"sizes": list(map(list, self.sizes))} if self.sizes else {}
        weights = {stage.name: stage.weight for stage in self._stages(self.recoverer.model.image_size)}
        stages = {"stages": weights, "thorough": self.thorough} if len(weights) > 1 else {}
        return both | search | sizes | stages

    @cached_property
    def batch(self) -> int:
        """How many pictures to judge at a time; on a GPU, one is recovered to find out."""
        model = self.recoverer.model
        return fitting_batch(model.device, partial(self.recoverer, torch.zeros(1, 3, *model.image_size)))

    def scan(self, pictures: Iterable[Sequence[Sample]], batch: int | None = None) -> Iterator[Judged]:
        """Judge every picture, in order; each is given at the sizes of `sizes_of`. Batches are those of `batched`.

        A batch that the GPU's memory does not hold is halved. Raises ModelError if it holds no picture at all.
        """
        batch = batch or self.batch

        def judge(group: list[Sequence[Sample]]) -> list[Judged]:
            judged = self._judge(group)
            return self._searched(judged, [views[0] for views in group], batch) if self.search else judged

        return batched(pictures, lambda views: (_size_of(views[0]), len(views)), partial(halving, judge), batch)

    def _judge(self, pictures: list[Sequence[Sample]]) -> list[Judged]:
        """Judge each picture at its best size."""

        def label(i: int, turn: int) -> tuple[Size, int]:
            return _size_of(pictures[i][turn]), len(pictures[i])

        def judge(members: list[int], turn: int) -> list[Judged]:
            return self._at([pictures[i][turn] for i in members], self._tests(len(pictures[members[0]])))

        return at_best_size(list(map(len, pictures)), label, judge)

    def _at(self, samples: list[Sample], tests: int) -> list[Judged]:
        """Judge samples of one size with this number of tests of each key."""
        return walk(self._stages(_size_of(samples[0])), samples, tests, thorough=self.thorough)

    def _searched(self, judged: list[Judged], samples: list[Sample], batch: int) -> list[Judged]:
        """The same, searching those samples in which no key was found directly and that are not inconclusive."""
        assert self.search
        absent = OUTCOMES.index(False)
        missed = [i for i, j in enumerate(judged) if not j.verdicts.found and (j.verdicts.outcome == absent).any()]
        for members in grouped(missed, [_size_of(samples[i]) for i in missed]):
            detector, chosen = self._stages(_size_of(samples[members[0]]))[-1].detector, [samples[i] for i in members]
            best_fits = self.search(self.recoverer.model, detector.schemes, chosen, batch=batch)
            for i, fits in zip(members, best_fits, strict=True):
                pairs = zip(judged[i].verdicts, fits, strict=True)
                verdicts = [self._better(verdict, fit, judged[i].tests) for verdict, fit in pairs]
                judged[i] = judged[i]._replace(verdicts=Verdicts.of(verdicts))
        return judged

    def _better(self, verdict: Verdict, found: Found, tests: int) -> Verdict:
        """The verdict with the search's p if that is smaller, and with the search's score if that finds the key."""
        verdict = replace(verdict, seconds=verdict.seconds + found.seconds)
        log10_p = float(corrected(found.log10_p, tests * len(self.keys)))
        if verdict.present is None or log10_p >= verdict.log10_p:
            return verdict
        verdict = replace(verdict, p_value=10**log10_p, log10_p=log10_p, conformal_p=None)
        if verdict.p_value > self.alpha:
            return verdict
        return replace(verdict, present=True, by_search=True, score=found.score, notes=(*verdict.notes, found.note))


def detector_at(
    shape: tuple[int, int, int],
    keys: Sequence[Key],
    *,
    null: Null,
    calibration: Calibration | None,
    alpha: float,
    notes: Mapping[str, str],
) -> Detector:
    """The detector for latents of this shape; without the calibration, and with a note, if that is for others."""
    try:
        if calibration:
            calibration.null_at(shape)
    except CalibrationError as error:
        calibration, why = None, f"the calibration {error.fact}"
        notes = {name: "; ".join(filter(None, [note, why])) for name, note in notes.items()}
    return Detector(keys, null=null, calibration=calibration, alpha=alpha, latent_shape=shape, notes=notes)


def at_best_size(
    views: Sequence[int],
    label: Callable[[int, int], Hashable],
    judge: Callable[[list[int], int], list[Judged]],
) -> list[Judged]:
    """Judge pictures at one size after the other, until a key is found; the size that fits best counts.

    Picture i has `views[i]` sizes. `judge(members, turn)` judges the views number `turn` of pictures with equal
    `label(i, turn)`.
    """
    best: dict[int, Judged] = {}
    for turn in range(max(views, default=0)):
        found = {i for i, judged in best.items() if judged.verdicts.found}
        todo = [i for i, number in enumerate(views) if turn < number and i not in found]
        for members in grouped(todo, [label(i, turn) for i in todo]):
            for i, judged in zip(members, judge(members, turn), strict=True):
                best[i] = better(best[i], judged) if i in best else judged
    return [best[i] for i in range(len(views))]


def better(one: Judged, other: Judged) -> Judged:
    """The judgement of a sample at the size that fits better, with the trails at both."""
    first = min(one, other, key=lambda each: each.best.rank())
    return first._replace(trail=one.trail + other.trail)


def _size_of(sample: Sample) -> Size:
    return sample.image.height, sample.image.width


def check_fit(key: Key, model: Identified) -> str:
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
