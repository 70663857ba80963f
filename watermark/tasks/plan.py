"""What to evaluate: images, keys, attacks and decoder inversions; problems are found before any work is done."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from ringmark.data.files import refuse_foreign
from ringmark.data.labels import read_labels, read_prompts
from ringmark.data.reader import read_records
from ringmark.data.sources import check_folder, find_images
from ringmark.errors import EvaluationError
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.recover import STEPS, check_method
from ringmark.inversion.sizes import Size
from ringmark.watermark.attacks.chains import Chain, expand
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.evaluation.report import TABLES
from ringmark.watermark.keys.folder import load_ring
from ringmark.watermark.keys.key import Key
from ringmark.watermark.tasks.draw import DRAWN

__all__ = ["Plan", "names_in", "prompts_in"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to evaluate: images (drawn unless folders are given), keys, attacks and decoder inversions.

    `number` images of each kind are drawn from `seed`, with `guidance`, in `draw_steps` steps, at `size` (H, W), by
    default the model's native one. All images are read at that size, in `steps` steps. Marked and unmarked images are
    independent; all keys mark the same noises for the same prompts. Without `keys`, a new key is made and kept in
    `output`.

    Problems that can be found without a model are raised at once. EvaluationError: evaluation.keys if marked images are
    given without exactly one key, evaluation.same-key, evaluation.methods for a method named twice, evaluation.output
    for an output folder within a folder of images, evaluation.overlap of the two folders, evaluation.carried for images
    drawn with another key, and evaluation.unlabelled and evaluation.labels for labels. AttackError, RingmarkError,
    ImageError, CalibrationError and KeyFileError for the parts; StoreError if, without `force`, an output would replace
    a file that ringmark did not write.
    """

    output: Path
    keys: tuple[Path, ...] = ()
    marked: Path | None = None
    unmarked: Path | None = None
    number: int = 32
    attacks: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("encoder", "operator")
    seed: int = 0
    guidance: float = 3.0
    size: Size | None = None
    max_steps: int | None = None
    draw_steps: int = 25
    steps: int = STEPS
    batch: int = 8
    calibration: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.marked and len(self.given_keys) != 1:
            fact = f"marked images need exactly the one key that they carry, not {len(self.given_keys)} keys"
            raise EvaluationError("evaluation.keys", fact)
        self._check_methods()
        self._check_folders()
        _ = self.chains, self.given_keys, self.given_calibration
        self._check_labels()
        for name in TABLES:
            refuse_foreign(self.output / name, self.force)

    def _check_methods(self) -> None:
        for method in self.methods:
            check_method(method)
        if len(set(self.methods)) < len(self.methods):
            raise EvaluationError("evaluation.methods", "a method is named twice", subject=", ".join(self.methods))

    def _check_folders(self) -> None:
        folders = [folder for folder in (self.marked, self.unmarked) if folder]
        for folder in folders:
            check_folder(folder)
            if self.output.resolve().is_relative_to(folder.resolve()):
                fact = f"lies in the image folder {folder}"
                raise EvaluationError("evaluation.output", fact, subject=self.output)
        for one, other in combinations(folders, 2):
            if _overlap(one.resolve(), other.resolve()):
                raise EvaluationError("evaluation.overlap", "one lies in the other", subject=f"{one} and {other}")

    def _check_labels(self) -> None:
        for folder, marked in ((self.marked, True), (self.unmarked, False)):
            if folder:
                prompts_in(folder / "labels.csv", names_in(folder, find_images(folder)), marked)
        if self.marked:
            _check_carried(self.marked, self.given_keys[0])

    @cached_property
    def chains(self) -> list[Chain]:
        """The attacks. Raises AttackError."""
        return expand(self.attacks)

    @cached_property
    def given_keys(self) -> list[Key]:
        """Raises KeyFileError, and EvaluationError, evaluation.same-key, for a key given twice."""
        keys: list[Key] = []
        first: dict[str, Path] = {}
        for file, key in (pair for path in self.keys for pair in load_ring([path]).items()):
            if key.fingerprint in first:
                fact = f"holds the same key as {first[key.fingerprint]}"
                raise EvaluationError("evaluation.same-key", fact, subject=file)
            first[key.fingerprint] = file
            keys.append(key)
        return keys

    @cached_property
    def given_calibration(self) -> Calibration | None:
        """Raises CalibrationError."""
        return Calibration.load(self.calibration) if self.calibration else None

    def settings(self, model: LatentModel) -> dict[str, Any]:
        """Everything that the images depend on. Keys, attacks, methods and calibrations may differ between runs."""
        return {
            "model": model.identity,
            "marked": self._relative(self.marked),
            "unmarked": self._relative(self.unmarked),
            "number": self.number,
            "seed": self.seed,
            "guidance": self.guidance,
            "steps": self.draw_steps,
        } | ({"size": list(self.size)} if self.size else {})

    def _relative(self, folder: Path | None) -> str | None:
        return os.path.relpath(folder, self.output) if folder else None


def names_in(folder: Path, files: list[Path]) -> list[str]:
    """Paths below a folder, with forward slashes."""
    return [path.relative_to(folder).as_posix() for path in files]


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def _check_carried(folder: Path, key: Key) -> None:
    """Raises EvaluationError if the folder's journal says that its images were drawn with another key."""
    if not (folder / DRAWN).is_file():
        return
    carried = read_records(folder / DRAWN)[0].get("key")
    if carried != key.fingerprint:
        fact = f"was drawn with {f'key {carried[:8]}' if carried else 'no key'}, not {key.fingerprint[:8]}"
        raise EvaluationError("evaluation.carried", fact, subject=folder)


def prompts_in(file: Path, names: list[str], marked: bool) -> dict[str, str]:
    """The prompts in a folder's labels.csv, if any. Raises EvaluationError if its labels contradict `marked`."""
    if not file.exists():
        return {}
    labels = read_labels(file)
    if not labels.keys() & set(names):
        fact = f"no label of {len(labels)} fits an image"
        raise EvaluationError("evaluation.unlabelled", fact, subject=file, example=names[0])
    wrong = [name for name in names if labels.get(name, marked) != marked]
    if wrong:
        kind = "unmarked" if marked else "marked"
        fact = f"labels {len(wrong)} of {len(names)} images as {kind}, the first is {wrong[0]}"
        raise EvaluationError("evaluation.labels", fact, subject=file, kind=kind)
    return read_prompts(file)
