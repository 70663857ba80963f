"""Recovered noise that an audit has kept, and its verification for other keys: no image is opened, no model loaded.

Of each picture, the low frequencies of the noise of every stage that it went through are kept, for every size at which
it was tried, as a calibration keeps those of its unmarked images. A key that uses others cannot be tested.

A picture left the audit where one of its keys was found, so later stages may be missing. A stage that is missing only
makes p larger (`detect.cascade`); an audit that was thorough has them all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ringmark.data.images import Sample
from ringmark.errors import KeyFileError
from ringmark.watermark.calibration import Calibration, default_reach, pack, reaches_beyond, unpack
from ringmark.watermark.detect.cascade import Trial, go_through, stage_name
from ringmark.watermark.detect.detector import FLAT_IMAGE, OVERFLOW, Seen, check_unranked
from ringmark.watermark.detect.verdict import Judged
from ringmark.watermark.detect.verifier import at_best_size, check_fit, detector_at, sizes_kept
from ringmark.watermark.keys.key import Key, distinct
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.base import scheme_of

__all__ = ["Context", "KeptPicture", "KeptVerifier", "tensors_of"]

Shape = tuple[int, int, int]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Context:
    """What verdicts on kept noise depend on besides keys and level.

    `identity`, `kind` and `latent_shape` are those of the model that recovered it, `null` its model of unmarked noise
    (None is white), `weights` those of the stages by name, of which `thorough` says whether every picture went through
    all of them.
    """

    identity: dict[str, Any]
    kind: dict[str, Any]
    latent_shape: Shape
    weights: dict[str, float]
    thorough: bool
    null: Null | None
    calibration: Calibration | None

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.identity["name"])


def tensors_of(judged: Judged) -> dict[str, NDArray[Any]]:
    """What is kept of a judged picture: its notes, the number of tests of each key, and its low frequencies.

    The latter are named turn/HxW/stage, by the size at which it was tried and that of the latents, and have the shape
    (C, m, 2) and the type float16.
    """
    notes = json.dumps([tried.notes for tried in judged.trail]).encode()
    kept: dict[str, NDArray[Any]] = {
        "tests": np.array(judged.tests, np.int32),
        "notes": np.frombuffer(notes, np.uint8),
    }
    for turn, tried in enumerate(judged.trail):
        for stage, noise in enumerate(tried.noise):
            _, height, width = noise.shape
            reach = default_reach((0, height, width))
            kept[f"{turn}/{height}x{width}/{stage}"] = pack(noise[None].numpy(), reach)[0]
    return kept


class View(NamedTuple):
    """A picture at one size: a sample without an image, the latents' shape, and each stage's frequencies (C, m, 2)."""

    sample: Sample
    shape: Shape
    stages: list[NDArray[np.float16]]


@dataclass(frozen=True, eq=False)
class KeptPicture:
    """What is kept of a picture, and what verdicts report of it."""

    views: list[View]
    tests: int
    shows: bool
    residual: float | None
    status: str

    @classmethod
    def of(cls, record: Mapping[str, Any], tensors: Arrays, *, searched: bool) -> KeptPicture:
        """A picture's record with its tensors; the search, of an audit that `searched`, was one of its tests."""
        views: dict[int, View] = {}
        notes, size = json.loads(bytes(tensors["notes"])), (record["height"], record["width"])
        names = (name.split("/") for name in tensors.keys() - {"tests", "notes"})
        for turn, latents, stage in sorted((int(turn), latents, stage) for turn, latents, stage in names):
            kept = tensors[f"{turn}/{latents}/{stage}"]
            if turn not in views:
                height, width = map(int, latents.split("x"))
                sample = Sample(
                    id=record["sample_id"],
                    image=_no_image(),
                    notes=tuple(notes[turn]),
                    content=record["content"],
                    size=size,
                )
                views[turn] = View(sample, (len(kept), height, width), [])
            views[turn].stages.append(kept)
        return cls(
            views=[views[turn] for turn in sorted(views)],
            tests=int(tensors["tests"]) - searched,
            shows=record["shows"],
            residual=record["residual"],
            status=record["status"],
        )

    def label(self, turn: int) -> tuple[Shape, int, int]:
        """What pictures that are judged together have in common: shape, depth and number of tests."""
        _, shape, stages = self.views[turn]
        return shape, len(stages), self.tests


@cache
def _no_image() -> Image.Image:
    return Image.new("RGB", (1, 1))


class KeptVerifier:
    """Tests kept noise for keys. The p-values are those of an audit with these keys, within the rounding of float16.

    Published statistics are left out: they would take most of the time.

    Raises KeyFileError for a key made for other latents or one that uses frequencies that are not kept (key.reach).
    """

    def __init__(self, keys: Sequence[Key], context: Context, *, alpha: float) -> None:
        self.keys, self.context, self.alpha = distinct(keys), context, alpha
        self._notes = {key.fingerprint: check_fit(key, context) for key in self.keys}
        self.trials = lru_cache(sizes_kept(len(self.keys)))(self._make_trials)
        self.trials(context.latent_shape)

    def settings(self) -> dict[str, Any]:
        """What verdicts depend on besides the noise."""
        return self.trials(self.context.latent_shape)[-1].detector.settings()

    def _make_trials(self, shape: Shape) -> list[Trial]:
        """The stages of latents of this shape."""
        context, reach = self.context, default_reach(shape)
        for scheme in {scheme.kind: scheme for scheme in (scheme_of(key, shape) for key in self.keys)}.values():
            if reaches_beyond(scheme, shape, reach):
                fact = f"uses rings beyond {reach}, which are not kept"
                raise KeyFileError("key.reach", fact, subject=f"key ({scheme.label})")
        detector = detector_at(
            shape,
            self.keys,
            null=context.null or Null.white(shape),
            calibration=context.calibration,
            alpha=self.alpha,
            notes=self._notes,
        )
        native = shape == context.latent_shape
        made = detector.calibration.earlier if detector.calibration and native else ()
        names = {stage_name(each.settings["steps"]): each for each in made}
        early = [
            Trial(name=name, detector=detector.early(names[name]), weight=weight)
            for name, weight in context.weights.items()
            if name in names
        ]
        if not detector.calibration and not native:
            check_unranked(detector.schemes.values())
        return [*early, Trial(name="full", detector=detector, weight=1 - sum(each.weight for each in early))]

    def judge(self, pictures: Sequence[KeptPicture]) -> list[Judged]:
        """Judge each picture at its best size, as `Verifier.scan` does."""
        return at_best_size(
            [len(picture.views) for picture in pictures],
            lambda i, turn: pictures[i].label(turn),
            lambda members, turn: self._at([pictures[i] for i in members], turn),
        )

    def _at(self, pictures: list[KeptPicture], turn: int) -> list[Judged]:
        """Judge pictures of one shape, depth and number of tests."""
        _, shape, stages = pictures[0].views[turn]

        def recover(number: int, rows: list[int]) -> Seen:
            chosen = [pictures[i] for i in rows]
            spectra = np.stack([picture.views[turn].stages[number] for picture in chosen])
            whole = [bool(np.isfinite(each).all()) for each in spectra]
            spectra[np.logical_not(whole)] = 0
            return Seen(
                noise=torch.from_numpy(unpack(spectra, shape, default_reach(shape), dtype=np.float32)),
                doubts=[_doubt(picture, fine) for picture, fine in zip(chosen, whole, strict=True)],
                residuals=[picture.residual for picture in chosen],
                status=[picture.status for picture in chosen],
                seconds=0.0,
                compared=False,
            )

        return go_through(
            self.trials(shape),
            [picture.views[turn].sample for picture in pictures],
            pictures[0].tests,
            recover,
            thorough=self.context.thorough,
            depth=len(stages),
        )


def _doubt(picture: KeptPicture, whole: bool) -> str:
    """Why a picture cannot be tested at a stage where its noise is finite, or is not."""
    if not whole:
        return OVERFLOW
    return "" if picture.shows else FLAT_IMAGE
