"""Measure a calibration from folders of unmarked images, and recommend where to place a new mark."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ringmark.data.files import one_line
from ringmark.data.reader import read_records
from ringmark.data.results import ResultsFolder
from ringmark.data.sources import list_images
from ringmark.errors import CalibrationError
from ringmark.inversion.noise_recovery import NoiseRecovery
from ringmark.inversion.recover import Model, Recoverer
from ringmark.watermark.calibration import Calibration, check_number
from ringmark.watermark.detect.cascade import early_stages
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.schemes.base import DEFAULT, parameters_text, recommended
from ringmark.watermark.statistics import ALPHA, needed_references
from ringmark.watermark.tasks.draw import DRAWN
from ringmark.watermark.tasks.recover import RecoveredFiles, recover_files

__all__ = ["KNOWN", "Calibrated", "Unmarked", "calibrate", "recovery_of"]

KNOWN = 32  # images of known noise; with fewer, its recovery is poorly measured, above all on rings of few bins


class Origin(NamedTuple):
    """What an image was drawn from: the model's fingerprint, the noise's seed, and (H, W) unless it was the native."""

    fingerprint: str
    seed: int
    size: tuple[int, int] | None


@dataclass(frozen=True)
class Unmarked:
    """Images for a calibration, assumed to be unmarked.

    `paths` has no duplicates. `drawn` holds the origin of each image drawn by ringmark.
    `errors` has a line for each folder that could not be listed.
    """

    paths: list[Path]
    drawn: dict[Path, Origin]
    errors: list[str]

    @classmethod
    def of(cls, folders: Iterable[Path]) -> Unmarked:
        """All images of these folders, recursively.

        Raises ImageError for a folder without images, StoreError for a damaged journal of drawn images, and
        CalibrationError for images drawn with a key, for two images drawn from the same noise and for too few images.
        """
        listings = [list_images(folder) for folder in folders]
        paths = list({os.path.realpath(path): path for listing in listings for path in listing.images}.values())
        real = {path: Path(os.path.realpath(path)) for path in paths}  # so that a link cannot hide a mark
        records = {folder: _drawn(folder) for folder in {file.parent: None for file in real.values()}}
        drawn = {path: made for path, file in real.items() if (made := records[file.parent].get(file.name))}
        _refuse_repeated(drawn)
        check_number(len(paths))
        return cls(paths, drawn, [str(error) for listing in listings for error in listing.unlisted])


def _drawn(folder: Path) -> dict[str, Origin]:
    """The origin of each image drawn into a folder. Raises CalibrationError for marked images."""
    path = folder / DRAWN
    if not path.is_file():
        return {}
    settings, records = read_records(path)
    if key := settings.get("key"):
        raise CalibrationError("calibration.marked", f"its images were drawn with key {str(key)[:8]}", subject=folder)
    model = settings.get("model")
    fingerprint = model.get("fingerprint", "") if isinstance(model, dict) else ""
    size = tuple(settings["size"]) if settings.get("size") else None  # older runs drew at the native size only
    return {r["sample_id"]: Origin(fingerprint, r["seed"], size) for r in records if _is_seed(r.get("seed"))}


def _is_seed(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _refuse_repeated(drawn: dict[Path, Origin]) -> None:
    """Raises CalibrationError for two images drawn from the same noise, since they are not independent."""
    first: dict[Origin, Path] = {}
    for path, made in drawn.items():
        other = first.setdefault(made, path)
        if other != path:
            fact = f"was drawn from the same noise (seed {made.seed}) as {one_line(other)}"
            raise CalibrationError("calibration.same-noise", fact, subject=path)


@dataclass(frozen=True)
class Calibrated:
    """A calibration, its file, the number of its images whose noise is `known`, and `errors` for images left out."""

    calibration: Calibration
    output: Path
    known: int
    errors: list[str]

    @property
    def recommended(self) -> dict[str, Any] | None:
        """The parameters recommended for new keys of the default scheme; None if noise recovery was not measured."""
        recovery = self.calibration.recovery
        return recommended(DEFAULT, recovery, self.calibration.latent_shape) if recovery else None

    def record(self) -> dict[str, Any]:
        """The result as plain values for JSON."""
        made = self.calibration
        return {
            "path": str(self.output),
            "fingerprint": made.fingerprint,
            "images": made.n,
            "sources": made.sources,
            "reach": made.reach,
            "recommended": self.recommended,
            "errors": self.errors,
        }

    def sentence(self) -> str:
        """The result as text."""
        calibration, best = self.calibration, self.recommended
        kinds = ", ".join(f"{count} {kind}" for kind, count in calibration.sources.items())
        enough = needed_references(ALPHA)
        more = "" if calibration.n >= enough else f"; for p ≤ {ALPHA:g} use {enough}"
        lines = [
            f"calibration {calibration.fingerprint} written to {self.output}: {calibration.n} unmarked images "
            f"({kinds}), {len(self.errors)} left out. "
            f"Their ranks confirm p down to {1 / (calibration.n + 1):.2g}{more}. "
            "The file holds rough copies of the images: keep it as private as they are."
        ]
        if best:
            lines.append(f"recommended mark: {parameters_text(DEFAULT, best)}")
        else:
            lines.append(f"no recommended mark: this needs {KNOWN} images drawn by this model, not {self.known}")
        return "\n".join(lines)


def calibrate(
    recoverer: Recoverer, images: Unmarked, output: Path, *, size: tuple[int, int] | None = None, batch: int = 8
) -> Calibrated:
    """Measure the nulls of noise recovered from unmarked images, at all stages, and write the calibration to `output`.

    Images are fitted to `size` (H, W), by default the model's native one.

    Recovered noise is kept in the folder `output`.unfinished until the calibration is written, so that an interrupted
    run can be resumed. Images drawn by this model are of kind "drawn", all others of kind "given". If at least KNOWN
    drawn images are used, their known noise shows where marks are best recovered. Raises CalibrationError, and
    StoreError if another run makes the same calibration.
    """
    unfinished = ResultsFolder(output.with_name(f"{output.name}.unfinished"))
    recover = partial(recover_files, kept=unfinished, size=size, batch=batch)
    with unfinished:
        files = recover(recoverer, images.paths, name="calibrate")
        unusable = files.doubts | _copies(files)
        kept = [i for i in range(len(files.ids)) if i not in unusable]
        paths = [Path(files.ids[i]) for i in kept]
        stages = early_stages(recoverer)
        early = [recover(stage, paths, name=f"calibrate, {stage.steps} steps").noise for stage in stages]
    left_out = [f"{one_line(files.ids[i])}: {reason}, so it is left out" for i, reason in unusable.items()]
    errors = [*images.errors, *map(str, files.refused), *left_out]
    fitted = size or recoverer.model.image_size
    seeds = _seeds(recoverer.model, images, paths, fitted)
    counts = {"drawn": len(seeds), "given": len(kept) - len(seeds)}
    sources = {kind: count for kind, count in counts.items() if count}

    def measured(stage: Recoverer, noise: Tensor, recovery: NoiseRecovery | None = None) -> Calibration:
        settings = stage.settings_at(fitted)
        return Calibration.measure(noise, settings.as_dict(), sources, recovery=recovery)

    try:
        last = measured(recoverer, files.noise[kept], _recovery(files.noise[kept], seeds))
        calibration = replace(last, earlier=tuple(map(measured, stages, early)))
    except CalibrationError as error:
        reason = f" ({len(errors)} were left out, the first: {errors[0]})" if errors else ""
        raise CalibrationError(error.code, f"{error.fact}{reason}", subject=error.subject, **error.details) from None
    calibration.save(output)
    unfinished.remove()
    return Calibrated(calibration=calibration, output=output, known=len(seeds), errors=errors)


def _copies(files: RecoveredFiles) -> dict[int, str]:
    """Files with the same pixels as an earlier one, by number, with the reason to leave them out."""
    first: dict[str, int] = {}
    copies: dict[int, str] = {}
    for i, content in enumerate(files.contents):
        if (original := first.setdefault(content, i)) != i:
            copies[i] = f"shows the same pixels as {one_line(files.ids[original])}"
    return copies


def _seeds(model: Model, images: Unmarked, paths: list[Path], size: tuple[int, int]) -> dict[int, int]:
    """Noise seeds of the images that this model drew at this size (H, W), by position in `paths`."""
    made = {i: images.drawn[path] for i, path in enumerate(paths) if path in images.drawn}
    mine = (model.identity["fingerprint"], size)
    return {i: o.seed for i, o in made.items() if (o.fingerprint, o.size or model.image_size) == mine}


def _recovery(noise: Tensor, seeds: dict[int, int]) -> NoiseRecovery | None:
    """How well noise (n, C, h, w) is recovered, measured on images of known seeds; None for fewer than KNOWN."""
    if len(seeds) < KNOWN:
        return None
    _, channels, height, width = noise.shape
    truth = initial_noise(list(seeds.values()), (channels, height, width))
    return NoiseRecovery.measure(noise[list(seeds)], truth)


def recovery_of(model: Model, calibration: Calibration | None) -> NoiseRecovery | None:
    """How well a model's noise is recovered, from the calibration if there is one, otherwise from the model.

    Raises CalibrationError for a calibration of another model or one without this measurement.
    """
    if calibration is None:
        return model.recovery
    made_for = calibration.settings.get("model", {})
    if made_for.get("fingerprint") != model.identity["fingerprint"]:
        fact = (
            f"was made for model {made_for.get('name')!r} ({made_for.get('fingerprint')}), "
            f"not {model.name!r} ({model.identity['fingerprint']})"
        )
        raise CalibrationError("calibration.model", fact, subject=calibration.name)
    if calibration.recovery is None:
        fact = "does not say where marks are best recovered"
        raise CalibrationError("calibration.no-recovery", fact, subject=calibration.name, needed=KNOWN)
    return calibration.recovery
