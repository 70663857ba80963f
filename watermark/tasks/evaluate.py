"""Decoder inversions, keys and attacks compared on marked and unmarked images; what was computed once is kept."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ringmark.data.cache import cached
from ringmark.data.images import read_sample
from ringmark.data.labels import read_labels
from ringmark.data.results import Results, read_records
from ringmark.data.scene_classifier import ATTRIBUTES, asked, features, train_classifiers
from ringmark.data.sources import check_folder, find_images
from ringmark.errors import CalibrationError, EvaluationError, ImageError
from ringmark.inversion.memory import peak_during, release_memory
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.recover import Recoverer, check_method
from ringmark.watermark.attacks.chains import Chain, expand
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.detector import Detector
from ringmark.watermark.detect.verifier import Verifier, fitting_calibration
from ringmark.watermark.evaluation.cells import CLEAN, DISTANCE, Cell, Evaluation
from ringmark.watermark.evaluation.quality import frechet_test, simple_features
from ringmark.watermark.evaluation.rates import rate, tied_below
from ringmark.watermark.evaluation.report import write_plots, write_tables
from ringmark.watermark.keys.folder import describe, load_ring
from ringmark.watermark.keys.key import Key
from ringmark.watermark.null import Array
from ringmark.watermark.schemes.base import DEFAULT, make_key, scheme_of
from ringmark.watermark.statistics import conformal_p
from ringmark.watermark.tasks.attack import attack_files, attacked_name
from ringmark.watermark.tasks.draw import DRAWN, draw, prompts_for
from ringmark.watermark.tasks.recover import RecoveredFiles, recover_files

__all__ = ["Comparison", "compare", "scores_of"]

SCENES = 1000  # that the classifier of prompts learns from: 98 % of grounds and all skies of 200 others
SCENE_SIZE = 64  # px: larger ones are told apart no better
UNMARKED, MATCHED, CONFORMAL, PUBLISHED_P = "unmarked", "matched filter", "conformal p", "published p"
GIVEN = "images of the folders given are taken as they are; marked and unmarked ones are compared as independent"
INDEPENDENT = "marked and unmarked images are independent: other seeds, other draws of each attack, prompts drawn apart, some of which recur; all keys mark the same noises for the same prompts"


@dataclass(frozen=True)
class Comparison:
    """A plan: images, drawn unless folders are given, what is done to them, and the methods that look for the keys.

    Marked and unmarked images are independent: other seeds, prompts drawn apart. All keys mark the same noises, for the same
    prompts. Raises what can be said against it before a model is loaded: EvaluationError, AttackError, RingmarkError,
    ImageError or KeyFileError.
    """

    output: Path
    keys: tuple[Path, ...]
    marked: Path | None
    unmarked: Path | None
    number: int
    attacks: tuple[str, ...]
    methods: tuple[str, ...]
    seed: int
    guidance: float
    max_steps: int | None
    steps: int
    batch: int
    calibration: Path | None = None

    def __post_init__(self) -> None:
        if self.marked and len(self.given_keys) != 1:
            raise EvaluationError(
                f"--marked needs the one --key that these images carry, not {len(self.given_keys)} keys"
            )
        for method in self.methods:
            check_method(method)
        if len(set(self.methods)) < len(self.methods):
            raise EvaluationError(f"methods {', '.join(self.methods)}: one is named twice; name each once")
        for folder in filter(None, (self.marked, self.unmarked)):
            check_folder(folder)
            if self.output.resolve().is_relative_to(folder.resolve()):
                raise EvaluationError(f"{self.output}: lies in {folder}, whose images are evaluated; choose another -o")
        if self.marked and self.unmarked and _overlap(self.marked.resolve(), self.unmarked.resolve()):
            raise EvaluationError(f"{self.marked} and {self.unmarked}: one lies in the other; keep marked images apart")
        _ = self.chains, self.given_keys, self.given_calibration
        for folder, marked in ((self.marked, True), (self.unmarked, False)):
            if folder:
                _prompts(folder / "labels.csv", _names(folder, find_images(folder)), marked)
        if self.marked:
            _check_carried(self.marked, self.given_keys[0])

    @cached_property
    def chains(self) -> list[Chain]:
        """The attacks. Raises AttackError."""
        return expand(self.attacks)

    @cached_property
    def given_keys(self) -> list[Key]:
        """Raises KeyFileError, and EvaluationError for a key given twice."""
        keys, first = [], {}
        for path in self.keys:
            for file, key in load_ring([path]).items():
                if key.fingerprint in first:
                    raise EvaluationError(f"{file}: holds the same key as {first[key.fingerprint]}; give each key once")
                first[key.fingerprint] = file
                keys.append(key)
        return keys

    @cached_property
    def given_calibration(self) -> Calibration | None:
        """Raises CalibrationError."""
        return self.calibration and Calibration.load(self.calibration)

    def settings(self, model: LatentModel) -> dict:
        """What the images depend on; keys, attacks, methods and calibrations may change in a folder."""
        folders = {
            name: folder and os.path.relpath(folder, self.output)
            for name, folder in (("marked", self.marked), ("unmarked", self.unmarked))
        }
        return {
            "model": model.identity,
            **folders,
            **{n: getattr(self, n) for n in ("number", "seed", "guidance", "steps")},
        }


def compare(model: LatentModel, plan: Comparison, folder: Path | None = None) -> Evaluation:
    """Everything that the plan names, kept and written in plan.output, where one more attack costs one attack.

    The plan's calibration, or one in the model's `folder`, is used by those methods whose settings it fits. Raises
    StoreError if plan.output was begun with other images, EvaluationError where labels contradict the plan or a kind
    has no image that can be used, KeyFileError for a key of another model, and CalibrationError where the plan's
    calibration fits no method.
    """
    keys = plan.given_keys or [_own_key(model, plan)]
    verifiers, unfit = _verifiers(model, keys, plan, folder)
    Results(plan.output / "plan.jsonl", plan.settings(model)).close()  # refuses another plan's images
    memory = {name: _megabytes(verifier.recoverer, plan) for name, verifier in verifiers.items()}
    sets = [_images(model, plan, key) for key in (None, *keys)]
    cells, records, refused = [], [], []
    for chain in (None, *plan.chains):
        places = [_paths(model, plan, images, chain, refused) for images in sets]
        for method, verifier in verifiers.items():
            name = f"{chain or CLEAN}, {method}"
            unmarked, *marked = (
                _recover(verifier.recoverer, plan, *pair, name, refused) for pair in zip(sets, places, strict=True)
            )
            for key, own in zip(keys, marked, strict=True):
                both = [_score(verifier.detector, key.fingerprint, recovered) for recovered in (own, unmarked)]
                about = {"key": key.fingerprint[:8], "attack": str(chain or CLEAN), "method": method}
                cells += _cells(about, key, *both, memory[method])
                records += [
                    about | record
                    for scored, label in zip(both, (1, 0), strict=True)
                    for record in scored.records(label)
                ]
    quality = _quality(model, plan, sets)
    found = Evaluation(
        _facts(model, plan, keys, verifiers, unfit), cells, records, quality, list(dict.fromkeys(refused))
    )
    write_tables(found, plan.output)
    write_plots(found, plan.output)
    return found


def scores_of(detector: Detector, key: str, noise: Tensor) -> tuple[dict[str, Array], Array]:
    """All statistics (n,) of recovered noise (n, C, h, w) by name, larger if marked, and p-values (n,) of the first.

    The first is the score of the key's scheme, for the detector's key of this fingerprint. Ranks need a calibration.
    """
    scheme = detector.schemes[key]
    score, log10_p = detector.statistic(key, noise)
    found = {scheme.score_name: score}
    if (matched := detector.matched_filter(key, noise)) is not None:
        found[MATCHED] = matched
    if (references := detector.reference_scores(key)) is not None:
        found[CONFORMAL] = -conformal_p(score, references)
    for name, (values, larger) in scheme.published(noise).items():
        found[name.replace("_", " ")] = values if larger else -values
    return found, 10**log10_p


@dataclass(frozen=True)
class _Images:
    """Unmarked images or a key's: `names` are paths below `folder`, `prompts` theirs as far as they are known."""

    name: str
    folder: Path
    names: list[str]
    prompts: dict[str, str]


@dataclass(frozen=True)
class _Recovered:
    """Names, prompts ("" if not known) and noises of the images that could be used."""

    names: list[str]
    prompts: list[str]
    files: RecoveredFiles


@dataclass(frozen=True)
class _Scored:
    """The statistics (n,) of images, their p-values, and `doubts`, why nothing can be said of image i."""

    seen: _Recovered
    values: dict[str, np.ndarray]
    p: np.ndarray

    @property
    def doubtful(self) -> np.ndarray:
        return np.isin(np.arange(len(self.p)), list(self.seen.files.doubts))

    @property
    def groups(self) -> list[str]:
        """The prompts; an image without one is a group of its own."""
        return [prompt or name for prompt, name in zip(self.seen.prompts, self.seen.names, strict=True)]

    def records(self, label: int) -> Iterator[dict]:
        """A row of scores.csv an image; scores are left out where there is a doubt."""
        columns = {"score": next(iter(self.values)), "matched_filter": MATCHED, "published_distance": DISTANCE}
        columns |= {"conformal_p": CONFORMAL, "published_p": PUBLISHED_P}
        nothing = np.full(len(self.p), np.nan)
        scores = {column: self.values.get(name, nothing) for column, name in columns.items()}
        scores |= {column: -scores[column] for column in ("conformal_p", "published_distance", "published_p")}
        for i, (name, prompt) in enumerate(zip(self.seen.names, self.seen.prompts, strict=True)):
            doubt = self.seen.files.doubts.get(i, "")
            known = {"image": name, "label": label, "prompt": prompt, "seconds": float(self.seen.files.seconds[i])}
            said = {c: None if doubt or np.isnan(values[i]) else float(values[i]) for c, values in scores.items()}
            yield known | {"doubt": doubt, "p": float(self.p[i])} | said


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def _verifiers(
    model: LatentModel, keys: list[Key], plan: Comparison, folder: Path | None
) -> tuple[dict[str, Verifier], dict[str, str]]:
    """By method; and of those that the calibration at hand does not fit, why."""
    recoverers = {name: Recoverer.named(model, name, plan.max_steps, plan.steps) for name in plan.methods}
    calibration = plan.given_calibration or (Calibration.built_in(folder) if folder else None)
    if calibration is None:
        return {name: Verifier(recoverer, keys) for name, recoverer in recoverers.items()}, {}
    fitted = {name: fitting_calibration(one, keys, calibration) for name, one in recoverers.items()}
    unfit = {name: why for name, (_, why) in fitted.items() if why}
    if plan.calibration and len(unfit) == len(recoverers):
        raise CalibrationError("; ".join(dict.fromkeys(unfit.values())))
    return {name: Verifier(recoverers[name], keys, calibration=found) for name, (found, _) in fitted.items()}, unfit


def _own_key(model: LatentModel, plan: Comparison) -> Key:
    path = plan.output / "evaluation.key"
    if not path.exists():
        make_key(DEFAULT, model.latent_shape, model=model.identity, recovery=model.recovery).save(path)
    return Key.load(path)


def _images(model: LatentModel, plan: Comparison, key: Key | None) -> _Images:
    """The marked images of a key, or the unmarked ones: drawn, unless a folder is given."""
    name, folder = (key.fingerprint[:8], plan.marked) if key else (UNMARKED, plan.unmarked)
    if folder:
        files = find_images(folder)
    else:
        folder, first = plan.output / "images" / name, plan.seed + (0 if key else plan.number)
        prompts = prompts_for([], plan.number, first)
        files = draw(model, folder, prompts, first, key=key, steps=plan.steps, guidance=plan.guidance, batch=plan.batch)
    names = _names(folder, files)
    return _Images(name, folder, names, _prompts(folder / "labels.csv", names, key is not None))


def _names(folder: Path, files: list[Path]) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in files]


def _check_carried(folder: Path, key: Key) -> None:
    """Raises EvaluationError where `ringmark generate` noted that these images carry another key."""
    if not (folder / DRAWN).is_file():
        return
    carried = read_records(folder / DRAWN)[0].get("key")
    if carried != key.fingerprint:
        raise EvaluationError(
            f"{folder}: was drawn with {f'key {carried[:8]}' if carried else 'no key'}, not {key.fingerprint[:8]}; give its own key"
        )


def _prompts(file: Path, names: list[str], marked: bool) -> dict[str, str]:
    """The prompts that a folder's labels.csv holds, if there is one. Raises EvaluationError where its labels differ."""
    if not file.exists():
        return {}
    labels = read_labels(file)
    if not labels.keys() & set(names):
        raise EvaluationError(f"{file}: none of its {len(labels)} labels fits an image; paths must be like {names[0]}")
    wrong = [name for name in names if labels.get(name, marked) != marked]
    if wrong:
        kinds = ("unmarked", "marked") if marked else ("marked", "unmarked")
        raise EvaluationError(
            f"{file}: says that {len(wrong)} of {len(names)} images are {kinds[0]}, first {wrong[0]}; give {kinds[1]} images as --{kinds[1]}"
        )
    with file.open(encoding="utf-8-sig", newline="") as text:
        header, *rows = csv.reader(text)
    columns = [name.strip().lower() for name in header]
    if not {"path", "prompt"} <= set(columns):  # labels may be JSON, too
        return {}
    path, prompt = columns.index("path"), columns.index("prompt")
    return {row[path]: row[prompt] for row in rows if len(row) > max(path, prompt)}


def _paths(
    model: LatentModel, plan: Comparison, images: _Images, chain: Chain | None, refused: list[str]
) -> dict[str, Path]:
    """Where the images are, by name, after an attack."""
    if chain is None:
        return {name: images.folder / name for name in images.names}
    place = plan.output / "attacked" / chain.slug / images.name
    seed = plan.seed + (images.name != UNMARKED)  # or files of one name would be attacked alike, marked and not
    refused += attack_files(images.folder, place, [chain], seed=seed, model=model).errors
    places = {name: place / attacked_name(name) for name in images.names}
    return {name: path for name, path in places.items() if path.exists()}


def _recover(
    recoverer: Recoverer, plan: Comparison, images: _Images, paths: dict[str, Path], name: str, refused: list[str]
) -> _Recovered:
    files = recover_files(
        recoverer, paths.values(), plan.output / "cache", batch=plan.batch, name=f"{name}, {images.name}"
    )
    refused += map(str, files.refused)
    if not files.ids:
        raise EvaluationError(
            f"{images.folder}: no image can be used, of {len(images.names)}; last: {[name, *refused][-1]}"
        )
    named = {str(path): name for name, path in paths.items()}
    names = [named[name] for name in files.ids]
    return _Recovered([f"{images.name}/{n}" for n in names], [images.prompts.get(n, "") for n in names], files)


def _score(detector: Detector, key: str, seen: _Recovered) -> _Scored:
    values, p = scores_of(detector, key, torch.nan_to_num(seen.files.noise, 0.0, 0.0, 0.0))
    p[list(seen.files.doubts)] = 1.0
    return _Scored(seen, values, p)


def _cells(about: dict, key: Key, marked: _Scored, unmarked: _Scored, megabytes: float) -> Iterator[Cell]:
    """A cell for each statistic."""
    scheme = scheme_of(key)
    seconds = float(torch.cat([marked.seen.files.seconds, unmarked.seen.files.seconds]).median())
    doubtful = np.concatenate([marked.doubtful, unmarked.doubtful])
    for statistic in marked.values:
        scores = tied_below(np.concatenate([marked.values[statistic], unmarked.values[statistic]]), doubtful)
        own, others = np.split(scores, [len(marked.p)])
        yield Cell(
            **about,
            scheme=scheme.label,
            statistic=statistic,
            marked=own,
            unmarked=others,
            groups=(marked.groups, unmarked.groups),
            p=(marked.p, unmarked.p) if statistic == scheme.score_name else None,
            seconds=seconds,
            megabytes=megabytes,
        )


def _megabytes(recoverer: Recoverer, plan: Comparison) -> float:
    """Memory of a batch above that of the model, the embedding and two steps: no method's grows after them."""
    model, inverter = recoverer.model, recoverer.inverter
    settings = [model.identity, str(model.dtype), str(model.device), repr(inverter)]
    short = Recoverer(model, replace(inverter, max_steps=min(2, inverter.max_steps)), steps=2)
    images = torch.rand(plan.batch, 3, *model.image_size) * 2 - 1

    def measure() -> dict[str, Tensor]:
        short(images[:1])  # what the libraries allocate once is not the method's
        release_memory()  # or what another method has freed would count as there before
        return {"megabytes": torch.tensor(peak_during(model.device, lambda: short(images))[1])}

    return float(cached(plan.output / "cache", ["megabytes", plan.batch, *settings], measure)["megabytes"])


def _quality(model: LatentModel, plan: Comparison, sets: list[_Images]) -> list[dict]:
    """What each key's mark costs its clean images: a distance to the unmarked ones, and how prompts are obeyed."""
    looks = [_looks(model, images) for images in sets]
    if min(map(len, looks)) < 2:
        return []
    hits = _obedience(plan, sets, looks)
    rows = []
    for i, images in enumerate(sets[1:], 1):
        distance = frechet_test([x for x, _ in looks[i].values()], [x for x, _ in looks[0].values()])
        row = {"key": images.name} | {f"frechet_{name}": value for name, value in asdict(distance).items()}
        for (name, shown), j in product(hits.items(), (i, 0)):
            kind = f"{name}_{'marked' if j else 'unmarked'}"
            share, (low, high) = rate(int(shown[j].sum()), len(shown[j]))
            row |= {kind: share, f"{kind}_low": low, f"{kind}_high": high}
        rows.append(row)
    return rows


def _looks(model: LatentModel, images: _Images) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each readable image its simple features, and those that the classifier of prompts wants."""
    found = {}
    for name in images.names:
        try:
            picture = read_sample(images.folder / name, model.image_size).image
        except ImageError:  # which `recover_files` has named
            continue
        small = picture.resize((SCENE_SIZE, SCENE_SIZE), Image.Resampling.BOX)
        found[name] = simple_features(np.asarray(picture)), features(np.asarray(small))
    return found


def _obedience(plan: Comparison, sets: list[_Images], looks: list[dict]) -> dict[str, list[Tensor]]:
    """For sky and ground, for each set, whether each image (n,) shows what its prompt asks for.

    Nothing unless all prompts are captions of procedural scenes, which alone the classifier knows.
    """
    wanted = [[asked(images.prompts.get(name, "")) for name in seen] for images, seen in zip(sets, looks, strict=True)]
    if any(None in some for some in wanted):
        return {}
    inputs = [torch.from_numpy(np.stack([x for _, x in seen.values()])) for seen in looks]

    def classify() -> dict[str, Tensor]:
        trees, _ = train_classifiers(SCENES, 200, SCENE_SIZE)
        return {
            f"{name} {i}": torch.from_numpy(trees[name].predict(x.numpy()) == [w[name] for w in wanted[i]])
            for name, (i, x) in product(ATTRIBUTES, enumerate(inputs))
        }

    hits = cached(plan.output / "cache", ["obedience", SCENES, SCENE_SIZE, wanted, *inputs], classify)
    return {name: [hits[f"{name} {i}"] for i in range(len(sets))] for name in ATTRIBUTES}


def _facts(
    model: LatentModel, plan: Comparison, keys: list[Key], verifiers: dict[str, Verifier], unfit: dict[str, str]
) -> dict[str, Any]:
    """The settings as the report tells them."""
    facts = {
        "dtype": str(model.dtype),
        "attacks": [CLEAN, *map(str, plan.chains)],
        "keys": [describe(key) for key in keys],
        "calibrations": {name: verifier.detector.settings()["calibration"] for name, verifier in verifiers.items()},
        "calibration_unfit": unfit,
        "images": GIVEN if plan.marked or plan.unmarked else INDEPENDENT,
    }
    return plan.settings(model) | {name: getattr(plan, name) for name in ("methods", "max_steps", "batch")} | facts
