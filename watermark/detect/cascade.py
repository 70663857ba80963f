"""The stages of a verdict, from cheap to expensive.

Noise is recovered ever more accurately. First the encoder's latents stand for it, which costs no call of the network;
then a few steps of the sampler inversion follow; the last stage is the inversion in full. Most marked pictures show
their key in the first stage.

**p holds for the whole walk.** Stage i has its own null and p-value pᵢ, with P(pᵢ ≤ u) ≤ u for unmarked pictures. This
is measured for every key: before the last stage, keys differ in how far their scores spread (`Detector.early`). With
weights wᵢ > 0, Σ wᵢ = 1, the p of a picture is the smallest pᵢ/wᵢ of the stages that it went through. Wherever the walk
ends, p ≤ α only if pᵢ ≤ wᵢ α at some stage i, so P(p ≤ α) ≤ Σ P(pᵢ ≤ wᵢ α) ≤ Σ wᵢ α = α (Bonferroni). The stages may
depend on each other, and the picture may decide where the walk ends. A stage that is left out only makes p larger, and
so does one whose p its unmarked pictures contradict, which counts only if it is the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ringmark.inversion.decoder import INVERTERS
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.detector import Detector, Seen
from ringmark.watermark.detect.verdict import OUTCOMES, Judged, Tried, Verdicts

if TYPE_CHECKING:
    from ringmark.data.images import Sample

__all__ = ["EARLY", "Stage", "Trial", "calibrated_stages", "early_stages", "go_through", "stage_name", "walk"]

EARLY = {0: 0.1, 3: 0.2}
"""Weights of the stages before the last by their numbers of steps; see scripts/experiments/cascade.py."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A stage for latents of one shape: its name, how it tests noise, and its weight."""

    name: str
    detector: Detector
    weight: float = 1.0

    def trying(self, tests: int) -> Detector:
        """The detector for this number of tests of each key; p/w is p corrected for 1/w as many tests."""
        return self.detector.trying(tests / self.weight)


@dataclass(frozen=True, eq=False)
class Stage(Trial):
    """A stage that also recovers the noise."""

    recoverer: Recoverer = field(kw_only=True)

    @classmethod
    def early(cls, recoverer: Recoverer, detector: Detector) -> Stage:
        """One of the stages before the last."""
        steps = recoverer.steps
        return cls(name=stage_name(steps), recoverer=recoverer, detector=detector, weight=EARLY[steps])


def stage_name(steps: int) -> str:
    """The name of the early stage with this number of steps."""
    return f"{steps} steps" if steps else "latents"


def early_stages(recoverer: Recoverer) -> list[Recoverer]:
    """The recoverers of the stages before this one, the cheapest first; they invert by the encoder alone."""
    return [Recoverer(recoverer.model, INVERTERS["encoder"], steps) for steps in EARLY if steps < recoverer.steps]


def calibrated_stages(recoverer: Recoverer, calibration: Calibration) -> list[tuple[Recoverer, Calibration]]:
    """Those of `early_stages` of which the calibration holds the null, each with its calibration.

    Raises CalibrationError for one made with other settings.
    """
    made = {each.settings["steps"]: each for each in calibration.earlier}
    stages = [(early, made[early.steps]) for early in early_stages(recoverer) if early.steps in made]
    for early, null in stages:
        null.check(early.settings.as_dict())
    return stages


def walk(stages: Sequence[Stage], samples: Sequence[Sample], tests: int, *, thorough: bool = False) -> list[Judged]:
    """Judge samples of one size, with this number of tests of each key, by one stage after the other.

    A sample leaves the walk at the stage that finds a key in it. Before the last stage, it also leaves if the stage has
    nothing to say for any key, p/w ≥ 1. With `thorough`, all samples go through all stages. E(x) is computed once.
    """
    from ringmark.data.images import to_array

    images = torch.from_numpy(np.stack([to_array(sample.image) for sample in samples]))
    started = time.perf_counter()
    encoded = stages[0].recoverer.encode(images)
    encoding = (time.perf_counter() - started) / len(samples)

    def recover(number: int, rows: list[int]) -> Seen:
        recovered = stages[number].recoverer(images[rows], encoded[rows])
        return Seen.of(replace(recovered, seconds=recovered.seconds + (0 if number else encoding)))

    return go_through(stages, samples, tests, recover, thorough=thorough)


def go_through(
    stages: Sequence[Trial],
    samples: Sequence[Sample],
    tests: int,
    recover: Callable[[int, list[int]], Seen],
    *,
    thorough: bool = False,
    depth: int | None = None,
) -> list[Judged]:
    """`walk`, where `recover(number, rows)` gives what a stage sees of these samples; at most `depth` stages."""
    whole = stages[-1].detector.calibration
    calibration = whole.fingerprint if whole else None
    judged: dict[int, Judged] = {}
    rows, settled = list(range(len(samples))), set[int]()
    for number, stage in enumerate(stages[:depth]):
        seen = recover(number, rows)
        found = stage.trying(tests).judge([samples[i] for i in rows], seen)
        for i, verdicts, noise in zip(rows, found, seen.noise, strict=True):
            here = Judged(
                sample=samples[i],
                verdicts=verdicts.at_stage(stage.name, calibration),
                noise=noise,
                tests=tests,
                stage=number,
                trail=(Tried(notes=samples[i].notes, noise=(noise,)),),
            )
            judged[i] = _joined(judged[i], here) if number else here
            if not thorough and _settled(judged[i], verdicts, next_is_last=number == len(stages) - 2):
                settled.add(i)
        rows = [i for i in rows if i not in settled]
        if not rows:
            break
    return [judged[i] for i in range(len(samples))]


def _settled(judged: Judged, here: Verdicts, *, next_is_last: bool) -> bool:
    """Whether a key was found, or the last stage is next and this one has nothing to say for any key."""
    silent = next_is_last and here.shows and bool((here.log10_p >= 0).all())
    return silent or judged.verdicts.found


def _joined(earlier: Judged, later: Judged) -> Judged:
    """The judgement by both stages, with the noise of the stage on which the best verdict rests."""
    one, other = earlier.verdicts, later.verdicts
    kept = (one.outcome != OUTCOMES.index(None)) & one.before(other)
    verdicts = one.joined(other, kept)
    trail = (Tried(notes=earlier.trail[0].notes, noise=earlier.trail[0].noise + later.trail[0].noise),)
    return (earlier if kept[verdicts.best] else later)._replace(verdicts=verdicts, trail=trail)
