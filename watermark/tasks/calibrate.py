"""From folders of unmarked images to a calibration, and from a calibration to where a new mark is best put."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ringmark.data.files import one_line
from ringmark.data.results import read_records
from ringmark.data.sources import list_images
from ringmark.errors import CalibrationError
from ringmark.inversion.noise_recovery import NoiseRecovery
from ringmark.inversion.recover import Model, Recoverer
from ringmark.watermark.calibration import Calibration, check_number
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.schemes.fourier import Placement, recommend
from ringmark.watermark.statistics import ALPHA, needed_references
from ringmark.watermark.tasks.draw import DRAWN
from ringmark.watermark.tasks.recover import RecoveredFiles, recover_files

__all__ = ["KNOWN", "Calibrated", "Unmarked", "calibrate", "recovery_of"]

KNOWN = 32  # images of known noise: fewer do not say well where it comes back, above all on rings of few bins


@dataclass(frozen=True)
class Unmarked:
    """Images without a mark, as far as their folders tell.

    `paths` names each once. `drawn` holds the model's fingerprint and the seed of the noise for those that ringmark
    drew. `errors` says which folders could not be listed.
    """

    paths: list[Path]
    drawn: dict[Path, tuple[str, int]]
    errors: list[str]

    @classmethod
    def of(cls, folders: Iterable[Path]) -> Unmarked:
        """All images of these folders, recursively.

        Raises ImageError for a folder without images, StoreError for a damaged record of what was drawn, and
        CalibrationError for images drawn with a key, for two drawn from one noise and for too few.
        """
        found = [list_images(folder) for folder in folders]
        paths = list({os.path.realpath(path): path for listing in found for path in listing.images}.values())
        real = {path: Path(os.path.realpath(path)) for path in paths}  # links hide no mark
        records = {folder: _drawn(folder) for folder in {file.parent: None for file in real.values()}}
        drawn = {path: made for path, file in real.items() if (made := records[file.parent].get(file.name))}
        _refuse_repeated(drawn)
        check_number(len(paths))
        return cls(paths, drawn, [str(error) for listing in found for error in listing.unlisted])


def _drawn(folder: Path) -> dict[str, tuple[str, int]]:
    """Model and seed of each image that ringmark drew into a folder. Raises CalibrationError for marked ones."""
    path = folder / DRAWN
    if not path.is_file():
        return {}
    settings, records = read_records(path)
    if key := settings.get("key"):
        raise CalibrationError("calibration.marked", f"its images were drawn with key {str(key)[:8]}", subject=folder)
    model = settings.get("model")
    fingerprint = model.get("fingerprint", "") if isinstance(model, dict) else ""
    return {r["sample_id"]: (fingerprint, r["seed"]) for r in records if _is_seed(r.get("seed"))}


def _is_seed(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _refuse_repeated(drawn: dict[Path, tuple[str, int]]) -> None:
    """One noise under two prompts is not two independent images."""
    first: dict[tuple[str, int], Path] = {}
    for path, made in drawn.items():
        other = first.setdefault(made, path)
        if other != path:
            fact = f"was drawn from the noise of seed {made[1]}, as {one_line(other)} was"
            raise CalibrationError("calibration.same-noise", fact, subject=path)


@dataclass(frozen=True)
class Calibrated:
    """A calibration, where it was written, how many of its images have `known` noise, `errors` for those left out."""

    calibration: Calibration
    output: Path
    known: int
    errors: list[str]

    @property
    def recommended(self) -> Placement | None:
        """Where a mark is best put; None where it was not measured."""
        recovery = self.calibration.recovery
        return recommend(recovery, self.calibration.latent_shape) if recovery else None

    def record(self) -> dict[str, Any]:
        """As plain values."""
        made, best = self.calibration, self.recommended
        return {
            "path": str(self.output),
            "fingerprint": made.fingerprint,
            "images": made.n,
            "sources": made.sources,
            "reach": made.reach,
            "recommended": best and {"channels": list(best.channels), "radii": list(best.radii)},
            "errors": self.errors,
        }

    def sentence(self) -> str:
        """In words."""
        calibration, best = self.calibration, self.recommended
        kinds = ", ".join(f"{count} {kind}" for kind, count in calibration.sources.items())
        enough = needed_references(ALPHA)
        more = "" if calibration.n >= enough else f"; for p ≤ {ALPHA:g} use {enough}"
        lines = [
            f"calibration {calibration.fingerprint} written to {self.output}: {calibration.n} unmarked images "
            f"({kinds}), {len(self.errors)} left out. Their ranks confirm p down to {1 / (calibration.n + 1):.2g}{more}. "
            "It holds rough copies of them: keep it as private as those."
        ]
        if best:
            lines.append(f"recommended mark: {best}")
        else:
            lines.append(f"no recommended mark: it needs {KNOWN} images drawn by this model, not {self.known}")
        return "\n".join(lines)


def calibrate(recoverer: Recoverer, images: Unmarked, output: Path, *, batch: int = 8) -> Calibrated:
    """Measure the null of what `recoverer` recovers from unmarked images and write it to `output`.

    What is recovered is kept in the folder `output`.cache until all is done, so that a stopped run goes on. Images
    drawn by this very model are of kind "drawn", and where at least KNOWN of them are used, their noise tells where
    marks come back best; all others are of kind "given". Raises CalibrationError.
    """
    cache = output.with_name(f"{output.name}.cache")
    files = recover_files(recoverer, images.paths, cache, batch=batch, name="calibrate")
    useless = files.doubts | _copies(files)
    left_out = [f"{one_line(files.ids[i])}: {why}, so it is left out" for i, why in useless.items()]
    errors = [*images.errors, *map(str, files.refused), *left_out]
    kept = [i for i in range(len(files.ids)) if i not in useless]
    seeds = _seeds(recoverer.model, images, [Path(files.ids[i]) for i in kept])
    counts = {"drawn": len(seeds), "given": len(kept) - len(seeds)}
    sources = {kind: count for kind, count in counts.items() if count}
    noise = files.noise[kept]
    try:
        recovery = _recovery(noise, seeds)
        calibration = Calibration.measure(noise, recoverer.settings.as_dict(), sources, recovery=recovery)
    except CalibrationError as error:
        reason = f" ({len(errors)} were left out, the first: {errors[0]})" if errors else ""
        raise CalibrationError(error.code, f"{error.fact}{reason}", subject=error.subject, **error.details) from None
    calibration.save(output)
    _remove(cache)
    return Calibrated(calibration, output, len(seeds), errors)


def _copies(found: RecoveredFiles) -> dict[int, str]:
    """Which files show the very pixels of an earlier one, and are no independent image."""
    first: dict[bytes, int] = {}
    copies: dict[int, str] = {}
    for i, digest in enumerate(found.digests):
        if (original := first.setdefault(digest, i)) != i:
            copies[i] = f"shows the same pixels as {one_line(found.ids[original])}"
    return copies


def _seeds(model: Model, images: Unmarked, paths: list[Path]) -> dict[int, int]:
    """By place in `paths`: the seed of the noise from which this very model drew the image."""
    made = {i: images.drawn[path] for i, path in enumerate(paths) if path in images.drawn}
    return {i: seed for i, (fingerprint, seed) in made.items() if fingerprint == model.identity["fingerprint"]}


def _recovery(noise: Tensor, seeds: dict[int, int]) -> NoiseRecovery | None:
    """How well noise (n, C, h, w) comes back, from images of known seeds; None for fewer than KNOWN."""
    if len(seeds) < KNOWN:
        return None
    _, channels, height, width = noise.shape
    truth = initial_noise(list(seeds.values()), (channels, height, width))
    return NoiseRecovery.measure(noise[list(seeds)], truth)


def _remove(cache: Path) -> None:
    """What `recover_files` left there, and no file of another name."""
    for path in cache.glob("[0-9a-f]" * 24 + ".safetensors"):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        cache.rmdir()


def recovery_of(model: Model, calibration: Calibration | None) -> NoiseRecovery | None:
    """How well a model's noise comes back, by the calibration or else by what is known of the model.

    Raises CalibrationError for a calibration of another model and for one that does not tell.
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
        fact = "does not tell where marks come back best"
        raise CalibrationError("calibration.no-recovery", fact, subject=calibration.name, needed=KNOWN)
    return calibration.recovery
