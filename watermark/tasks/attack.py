"""Attacks on files and folders. A journal records how each image was made, so that a run can be resumed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ringmark.data.images import read_image, save_png
from ringmark.data.reader import read_records
from ringmark.data.results import Results
from ringmark.data.settings import differences
from ringmark.data.sources import SUFFIXES, list_images, stamp_of
from ringmark.errors import AttackError, ImageError
from ringmark.watermark.attacks.chains import Chain, apply, seed_of

if TYPE_CHECKING:
    from ringmark.inversion.models.pipeline import LatentModel

__all__ = ["JOURNAL", "Attacked", "attack_files", "attacked_name"]

LOG = logging.getLogger(__name__)

JOURNAL = "attacked.jsonl"  # in the output folder: source, attack, seed and model of each image
STAMP = ("size", "mtime_ns")  # changes when the source does


@dataclass(frozen=True)
class Attacked:
    """Number of images `written` and `kept` from earlier runs, the `errors`, and the output path of each attack."""

    written: int
    kept: int
    errors: list[str]
    outputs: dict[str, str]


@dataclass(frozen=True)
class _Job:
    """One image to make: `target` from `source` by `chain` with `seed`; `record` goes into the journal."""

    source: Path
    target: Path
    chain: Chain
    seed: int
    record: dict[str, Any]


def attack_files(
    source: Path,
    output: Path,
    chains: list[Chain],
    *,
    seed: int = 0,
    model: LatentModel | None = None,
    force: bool = False,
) -> Attacked:
    """Attack a file, or all images of a folder recursively, and write PNG; each of several attacks gets its own folder.

    Images made earlier from the same source, attack, seed and model are kept unless the source has changed; other
    existing files are only replaced with `force`. If an image of a folder cannot be attacked, the run continues with
    the others. Raises AttackError and ImageError; problems with names are raised before anything is written.
    """
    listing = list_images(source) if source.is_dir() else None
    images = listing.images if listing else [_existing(source)]
    outputs = {chain: _place(output, chain, many=bool(listing), chains=len(chains)) for chain in chains}
    base = output.parent if _is_file_name(output) else output
    jobs = list(_plan(source, images, outputs, base=base, seed=seed, model=model))
    _refuse_sources(source, jobs)
    made = _made(base)
    todo = [job for job in jobs if force or not _is_done(job, made.get(job.record["sample_id"]))]
    LOG.info("attack %s: %d of %d images to make", source, len(todo), len(jobs))
    errors = list(map(str, listing.unlisted)) if listing else []
    written = 0
    with (
        Results(base / JOURNAL, {}) as journal,
        tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc="attack", unit="image", disable=None) as bar,
    ):
        for error in _outcomes(journal, todo, model):
            if error and not listing:
                raise error
            errors += [str(error)] if error else []
            written += not error
            bar.update()
    where = {str(chain): str(place) for chain, place in outputs.items()}
    return Attacked(written=written, kept=len(jobs) - len(todo), errors=list(dict.fromkeys(errors)), outputs=where)


def _outcomes(
    journal: Results, jobs: list[_Job], model: LatentModel | None
) -> Iterator[ImageError | AttackError | None]:
    """Make all images, source by source; yields for each an error or None."""
    for path, group in groupby(jobs, lambda job: job.source):
        yield from _attack(journal, path, list(group), model)


def _attack(
    journal: Results, path: Path, jobs: list[_Job], model: LatentModel | None
) -> Iterator[ImageError | AttackError | None]:
    """Make all images of one source; yields for each an error or None."""
    try:
        image, _ = read_image(path)
    except ImageError as error:
        LOG.info("%s", error)
        yield from [error] * len(jobs)
        return
    for job in jobs:
        try:
            attacked = apply(job.chain, image, job.seed, model)
        except AttackError as error:
            yield AttackError(error.code, str(error), subject=path, **error.details)
            continue
        # Remove, record, then write, so that the record never describes an older file.
        job.target.unlink(missing_ok=True)
        journal.append(job.record)
        save_png(attacked, job.target)
        yield None


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ImageError("image.missing", "no such file or folder", subject=path)
    return path


def _is_file_name(output: Path) -> bool:
    """Whether `output` names an image file rather than a folder."""
    return output.suffix.lower() in SUFFIXES and not output.is_dir()


def _place(output: Path, chain: Chain, *, many: bool, chains: int) -> Path:
    """The output file or folder of one attack. Raises AttackError for a name that cannot be used."""
    is_file = _is_file_name(output) or (output.exists() and not output.is_dir())
    if (many or chains > 1) and is_file:
        raise AttackError("attack.one-file", "is a single file, but several images are to be written", subject=output)
    if is_file and output.suffix.lower() != ".png":
        raise AttackError("attack.not-png", "does not end in .png, the only output format", subject=output)
    return output / chain.slug if chains > 1 else output


def _plan(
    source: Path,
    images: list[Path],
    outputs: dict[Chain, Path],
    *,
    base: Path,
    seed: int,
    model: LatentModel | None,
) -> Iterator[_Job]:
    for path in images:
        name = path.relative_to(source).as_posix() if path != source else path.name
        stamp = stamp_of(path)
        for chain, place in outputs.items():
            target = place if path == source and _is_file_name(place) else place / attacked_name(name)
            made_by = {"attack": str(chain), "source": name, "seed": seed}
            needed = {"model": model.identity} if chain.needs_model and model else {}
            record = {"sample_id": target.relative_to(base).as_posix(), **made_by, **needed, **stamp}
            yield _Job(source=path, target=target, chain=chain, seed=seed_of(seed, name), record=record)


def attacked_name(name: str) -> str:
    """The file name of an attacked image, from the source's path below its folder."""
    return name if name.lower().endswith(".png") else f"{name}.png"


def _refuse_sources(source: Path, jobs: list[_Job]) -> None:
    """Raises AttackError if an output would replace a source, lie in the source folder, or replace another output."""
    root, sources = os.path.realpath(source), {os.path.realpath(job.source) for job in jobs}
    taken: dict[str, Path] = {}
    for job in jobs:
        real = os.path.realpath(job.target)
        if real in sources:
            raise AttackError("attack.source", "is the image to be attacked", subject=job.target)
        if real.startswith(root + os.sep):
            raise AttackError("attack.inside", f"lies in the source folder {source}", subject=job.target)
        first = taken.setdefault(real, job.source)
        if first != job.source:
            fact = f"both {first} and {job.source} would be written there"
            raise AttackError("attack.collision", fact, subject=job.target)


def _made(base: Path) -> dict[str, dict[str, Any]]:
    """The records in an output folder's journal, by image."""
    if not (base / JOURNAL).exists():
        return {}
    return {record["sample_id"]: record for record in read_records(base / JOURNAL)[1]}


def _is_done(job: _Job, record: dict[str, Any] | None) -> bool:
    """Whether the image exists already. Raises AttackError if another file has its name."""
    if not os.path.lexists(job.target):
        return False
    if record is None or job.target.is_symlink():
        raise AttackError("attack.foreign", "exists and was not made by an earlier run", subject=job.target)
    if changed := differences(record, job.record, ignore=STAMP):
        raise AttackError("attack.settings", f"was made with other settings ({'; '.join(changed)})", subject=job.target)
    return not differences(record, job.record)
