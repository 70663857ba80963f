"""Compare decoder inversions, keys and attacks on marked and unmarked images. Finished work is kept and reused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringmark.data.results import Results, ResultsFolder, content_id
from ringmark.data.sources import find_images
from ringmark.errors import CalibrationError, EvaluationError
from ringmark.inversion.memory import peak_during, release_memory
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.attacks.chains import Chain
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.detector import Detector
from ringmark.watermark.detect.verifier import Verifier, fitting_calibration
from ringmark.watermark.evaluation.cells import CLEAN, Cell, Evaluation, Row
from ringmark.watermark.evaluation.gain import compare_ways
from ringmark.watermark.evaluation.plots import write_plots
from ringmark.watermark.evaluation.rates import Array, tied_below
from ringmark.watermark.evaluation.report import write_tables
from ringmark.watermark.keys.folder import describe
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.base import DEFAULT, published_statistics
from ringmark.watermark.statistics import conformal_p
from ringmark.watermark.tasks.attack import attack_files, attacked_name
from ringmark.watermark.tasks.draw import draw, prompts_for
from ringmark.watermark.tasks.keygen import new_key
from ringmark.watermark.tasks.plan import Plan, names_in, prompts_in
from ringmark.watermark.tasks.quality import ImageSet, quality_rows
from ringmark.watermark.tasks.recover import RecoveredFiles, recover_files

__all__ = ["evaluate", "scores_of"]

UNMARKED, MATCHED, CONFORMAL = "unmarked", "matched filter", "conformal p"
GIVEN = "images are taken from the given folders; marked and unmarked images are assumed to be independent"
INDEPENDENT = (
    "marked and unmarked images are independent, with different seeds, random draws of attacks and draws of prompts "
    "(some prompts recur); all keys mark the same noises for the same prompts"
)


def evaluate(model: LatentModel, plan: Plan, folder: Path | None = None) -> Evaluation:
    """Carry out the plan and write tables and plots into plan.output.

    Results are kept there, so adding an attack to an earlier run only costs that attack. The plan's calibration, or the
    one in the model's `folder`, is used by the methods whose settings it fits. Raises StoreError if plan.output holds
    results for other images or another run writes to it, EvaluationError (evaluation.images) if there is no usable
    image of one kind, KeyFileError for a key of another model, and CalibrationError if the plan's calibration fits no
    method.
    """
    keys = plan.given_keys or [_own_key(model, plan)]
    verifiers, unfit = _verifiers(model, keys, plan, folder)
    with (
        Results(plan.output / "plan.jsonl", plan.settings(model)) as results,
        ResultsFolder(plan.output / "recovered") as kept,
    ):
        run = _Run(
            model=model,
            plan=plan,
            keys=keys,
            verifiers=verifiers,
            megabytes={name: _megabytes(verifier.recoverer, plan, results) for name, verifier in verifiers.items()},
            sets=[_images(model, plan, key) for key in (None, *keys)],
            kept=kept,
        )
        for chain in (None, *plan.chains):
            run.under(chain)
        quality = quality_rows(run.sets, plan.size or model.image_size, results)
    evaluation = run.evaluation(quality, unfit)
    write_tables(evaluation, plan.output)
    write_plots(evaluation, plan.output, force=plan.force)
    return evaluation


def scores_of(detector: Detector, key: str, noise: Tensor) -> tuple[dict[str, Array], Array]:
    """All statistics (n,) of recovered noise (n, C, h, w) by name, larger if marked, and p-values (n,) of the first.

    The first statistic is the score of the key's scheme; `key` is the fingerprint of one of the detector's keys. Ranks
    are included if the detector has a calibration.
    """
    scheme = detector.schemes[key]
    score, log10_p = detector.statistic(key, noise)
    scores = {scheme.score_name: score}
    if (matched := detector.matched_filter(key, noise)) is not None:
        scores[MATCHED] = matched
    if (references := detector.reference_scores(key)) is not None:
        scores[CONFORMAL] = -conformal_p(score, references)
    for name, values in scheme.published(noise).items():
        statistic = published_statistics()[name]
        scores[statistic.label] = statistic.sign * values
    return scores, 10**log10_p


# -- recovering and scoring -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recovered:
    """Names, prompts ("" if unknown) and recovered noise of the usable images."""

    names: list[str]
    prompts: list[str]
    files: RecoveredFiles

    @property
    def groups(self) -> list[str]:
        """The prompt of each image; an image without a prompt forms its own group."""
        return [prompt or name for prompt, name in zip(self.prompts, self.names, strict=True)]


@dataclass(frozen=True)
class _Scored:
    """The statistics (n,) of images, the detector's score first, and the p-values (n,) of that score."""

    recovered: _Recovered
    values: dict[str, Array]
    p: Array

    @property
    def doubtful(self) -> Array:
        """Mask (n,) of the images that cannot be tested."""
        return np.isin(np.arange(len(self.p)), list(self.recovered.files.doubts))

    def records(self, label: int) -> Iterator[Row]:
        """A row of scores.csv per image, without scores for images that cannot be tested."""
        columns = self._columns()
        seconds, doubts = self.recovered.files.seconds, self.recovered.files.doubts
        for i, (name, prompt) in enumerate(zip(self.recovered.names, self.recovered.prompts, strict=True)):
            doubt = doubts.get(i, "")
            row = {"image": name, "label": label, "prompt": prompt, "seconds": float(seconds[i]), "doubt": doubt}
            scores = {c: None if doubt or np.isnan(v[i]) else float(v[i]) for c, v in columns.items()}
            yield row | {"p": float(self.p[i])} | scores

    def _columns(self) -> dict[str, Array]:
        """Columns of scores.csv; p-values and published statistics have their usual sign."""
        unknown = np.full(len(self.p), np.nan)
        columns = {
            "score": next(iter(self.values.values())),
            "matched_filter": self.values.get(MATCHED, unknown),
            "conformal_p": -self.values.get(CONFORMAL, unknown),
        }
        known = [s for s in published_statistics().values() if s.label in self.values]
        return columns | {s.name: s.sign * self.values[s.label] for s in known}


@dataclass(frozen=True)
class _Run:
    """An evaluation in progress; `sets` are the unmarked images, then the marked images of each key."""

    model: LatentModel
    plan: Plan
    keys: list[Key]
    verifiers: dict[str, Verifier]
    megabytes: dict[str, float]
    sets: list[ImageSet]
    kept: ResultsFolder
    cells: list[Cell] = field(default_factory=list)
    records: list[Row] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def under(self, chain: Chain | None) -> None:
        """Attack all images and score them by every method."""
        places = [self._paths(images, chain) for images in self.sets]
        for method, verifier in self.verifiers.items():
            name = f"{chain or CLEAN}, {method}"
            unmarked, *marked = (
                self._recover(verifier.recoverer, images, paths, name)
                for images, paths in zip(self.sets, places, strict=True)
            )
            for key, recovered in zip(self.keys, marked, strict=True):
                about = {"key": key.fingerprint[:8], "attack": str(chain or CLEAN), "method": method}
                self._score(verifier.detector, key.fingerprint, about, recovered, unmarked)

    def evaluation(self, quality: list[Row], unfit: dict[str, str]) -> Evaluation:
        """What was found, with the reasons why the calibration does not fit a method."""
        return Evaluation(
            settings=_facts(self, unfit),
            cells=self.cells,
            images=self.records,
            quality=quality,
            refused=list(dict.fromkeys(self.refused)),
            gains=compare_ways(self.records, list(map(str, self.plan.chains)) or [CLEAN]),
        )

    def _score(
        self, detector: Detector, key: str, about: dict[str, str], marked: _Recovered, unmarked: _Recovered
    ) -> None:
        scored = [_scored(detector, key, recovered) for recovered in (marked, unmarked)]
        about_cells = about | {"scheme": detector.schemes[key].label}
        self.cells.extend(_cells(about_cells, scored[0], scored[1], self.megabytes[about["method"]]))
        for images, kind in zip(scored, (1, 0), strict=True):
            self.records.extend(about | record for record in images.records(kind))

    def _paths(self, images: ImageSet, chain: Chain | None) -> dict[str, Path]:
        """Paths of the images after an attack, by name."""
        if chain is None:
            return {name: images.folder / name for name in images.names}
        place = self.plan.output / "attacked" / chain.slug / images.name
        # Marked and unmarked files of the same name must get different random draws.
        seed = self.plan.seed + (images.name != UNMARKED)
        self.refused.extend(attack_files(images.folder, place, [chain], seed=seed, model=self.model).errors)
        paths = {name: place / attacked_name(name) for name in images.names}
        return {name: path for name, path in paths.items() if path.exists()}

    def _recover(self, recoverer: Recoverer, images: ImageSet, paths: dict[str, Path], name: str) -> _Recovered:
        title = f"{name}, {images.name}"
        files = recover_files(
            recoverer, paths.values(), self.kept, size=self.plan.size, batch=self.plan.batch, name=title
        )
        self.refused.extend(map(str, files.refused))
        if not files.ids:
            fact = f"no image can be used, of {len(images.names)}; last: {[name, *self.refused][-1]}"
            raise EvaluationError("evaluation.images", fact, subject=images.folder)
        by_path = {str(path): name for name, path in paths.items()}
        names = [by_path[name] for name in files.ids]
        return _Recovered(
            names=[f"{images.name}/{name}" for name in names],
            prompts=[images.prompts.get(name, "") for name in names],
            files=files,
        )


def _scored(detector: Detector, key: str, recovered: _Recovered) -> _Scored:
    values, p = scores_of(detector, key, torch.nan_to_num(recovered.files.noise, 0.0, 0.0, 0.0))
    p[list(recovered.files.doubts)] = 1.0
    return _Scored(recovered, values, p)


def _cells(about: dict[str, str], marked: _Scored, unmarked: _Scored, megabytes: float) -> Iterator[Cell]:
    """A cell for each statistic."""
    seconds = torch.cat([marked.recovered.files.seconds, unmarked.recovered.files.seconds])
    doubtful = np.concatenate([marked.doubtful, unmarked.doubtful])
    default = next(iter(marked.values))
    published = {statistic.label: statistic for statistic in published_statistics().values()}
    for statistic, values in marked.values.items():
        scores = tied_below(np.concatenate([values, unmarked.values[statistic]]), doubtful)
        yield Cell(
            **about,
            statistic=statistic,
            marked=scores[: len(values)],
            unmarked=scores[len(values) :],
            groups=(marked.recovered.groups, unmarked.recovered.groups),
            p=(marked.p, unmarked.p) if statistic == default else None,
            published=published.get(statistic),
            seconds=float(seconds.median()),
            megabytes=megabytes,
        )


# -- models and methods -----------------------------------------------------------------------------------------------


def _verifiers(
    model: LatentModel, keys: list[Key], plan: Plan, folder: Path | None
) -> tuple[dict[str, Verifier], dict[str, str]]:
    """Verifiers by method, and by method the reasons why the calibration does not fit."""
    sizes = [plan.size] if plan.size else []
    recoverers = {name: Recoverer.named(model, name, plan.max_steps, plan.steps) for name in plan.methods}
    calibration = plan.given_calibration or (Calibration.built_in(folder) if folder else None)
    if calibration is None:
        return {name: Verifier(recoverer, keys, sizes=sizes) for name, recoverer in recoverers.items()}, {}
    fitted = {name: fitting_calibration(recoverer, keys, calibration) for name, recoverer in recoverers.items()}
    unfit = {name: error.fact for name, (_, error) in fitted.items() if error}
    if plan.calibration and len(unfit) == len(recoverers):
        facts = "; ".join(dict.fromkeys(unfit.values()))
        raise CalibrationError("evaluation.calibration", facts, subject=plan.calibration)
    made = {name: Verifier(recoverers[name], keys, calibration=fit, sizes=sizes) for name, (fit, _) in fitted.items()}
    return made, unfit


def _own_key(model: LatentModel, plan: Plan) -> Key:
    path = plan.output / "evaluation.key"
    if not path.exists():
        new_key(model, DEFAULT).save(path)
    return Key.load(path)


def _megabytes(recoverer: Recoverer, plan: Plan, results: Results) -> float:
    """Memory of a batch in addition to the model's, kept in the results; NaN where the system does not tell."""
    model = recoverer.model
    settings = [model.identity, str(model.dtype), str(model.device), repr(recoverer.inverter)]
    sample_id = content_id("megabytes", plan.batch, plan.size, *settings)
    if sample_id not in results.done:
        results.append({"sample_id": sample_id, "megabytes": _measured_megabytes(recoverer, plan)})
    megabytes = results.records[sample_id]["megabytes"]
    return math.nan if megabytes is None else float(megabytes)


def _measured_megabytes(recoverer: Recoverer, plan: Plan) -> float:
    """The peak of the encoder and two steps; later steps need no more."""
    model, inverter = recoverer.model, recoverer.inverter
    short = Recoverer(model, replace(inverter, max_steps=min(2, inverter.max_steps)), steps=2)
    images = torch.rand(plan.batch, 3, *(plan.size or model.image_size)) * 2 - 1
    short(images[:1])  # warm up: libraries allocate some memory once
    release_memory()  # otherwise memory freed by another method would hide this one's
    return peak_during(model.device, lambda: short(images))[1]


def _facts(run: _Run, unfit: dict[str, str]) -> dict[str, Any]:
    """The settings shown in the report."""
    plan, detectors = run.plan, {name: verifier.detector for name, verifier in run.verifiers.items()}
    return plan.settings(run.model) | {
        "methods": plan.methods,
        "max_steps": plan.max_steps,
        "inversion_steps": plan.steps,
        "batch": plan.batch,
        "dtype": str(run.model.dtype),
        "attacks": [CLEAN, *map(str, plan.chains)],
        "keys": [describe(key) for key in run.keys],
        "calibrations": {name: detector.settings()["calibration"] for name, detector in detectors.items()},
        "calibration_unfit": unfit,
        "images": GIVEN if plan.marked or plan.unmarked else INDEPENDENT,
    }


# -- images ------------------------------------------------------------------------------------------------


def _images(model: LatentModel, plan: Plan, key: Key | None) -> ImageSet:
    """The marked images of a key, or the unmarked images; drawn unless a folder is given."""
    name, folder = (key.fingerprint[:8], plan.marked) if key else (UNMARKED, plan.unmarked)
    if folder:
        files = find_images(folder)
    else:
        folder, first = plan.output / "images" / name, plan.seed + (0 if key else plan.number)
        prompts = prompts_for([], plan.number, first)
        files = draw(
            model,
            folder,
            prompts,
            first,
            key=key,
            steps=plan.draw_steps,
            guidance=plan.guidance,
            size=plan.size,
            batch=plan.batch,
        )
    names = names_in(folder, files)
    prompts_by_name = prompts_in(folder / "labels.csv", names, key is not None)
    return ImageSet(name=name, folder=folder, names=names, prompts=prompts_by_name)
