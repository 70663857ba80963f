"""Attacks on files and folders. What is written says in itself how it was made, so a run goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from tqdm import tqdm

from ringmark.data.files import one_line
from ringmark.data.images import read_image, save_png
from ringmark.data.sources import SUFFIXES, list_images, stamp_of
from ringmark.errors import AttackError, ImageError
from ringmark.watermark.attacks.chains import Chain, apply, seed_of

if TYPE_CHECKING:
    from ringmark.inversion.models.pipeline import LatentModel

__all__ = ["Attacked", "attack_files", "attacked_name"]

CHUNK = "ringmark-attack"  # the PNG text in which an image says how it was made


@dataclass(frozen=True)
class Attacked:
    """Images written, images that were there already, why others could not be made, and where each attack's are."""

    written: int
    kept: int
    errors: list[str]
    outputs: dict[str, str]


@dataclass(frozen=True)
class _Job:
    """One image to make; `made` is what it will say of itself, `stamp` the part of it that changes with the source."""

    source: Path
    target: Path
    chain: Chain
    seed: int
    made: dict
    stamp: dict


def attack_files(
    source: Path,
    output: Path,
    chains: list[Chain],
    *,
    seed: int = 0,
    model: LatentModel | None = None,
    force: bool = False,
) -> Attacked:
    """The attacked images of a file, or of a folder recursively, as PNG; several attacks have a folder each.

    What is there already from the same source, attack, seed and model is not made again, unless the source has changed
    since; whatever else is there is not replaced without `force`. An image of a folder that cannot be attacked does
    not stop the others. Raises AttackError and ImageError, before anything is written if it concerns the names.
    """
    found = list_images(source) if source.is_dir() else None
    images = found.images if found else [_file(source)]
    outputs = {chain: _place(found is not None, output, chain, len(chains)) for chain in chains}
    jobs = list(_plan(source, images, outputs, seed, model))
    _refuse_sources(source, jobs)
    todo = [job for job in jobs if force or not _is_there(job)]
    errors, written = [str(error) for error in found.unlisted] if found else [], 0
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc="attack", unit="image", disable=None) as bar:
        for path, group in groupby(todo, lambda job: job.source):
            for outcome in _make(path, list(group), model):
                if outcome and not found:
                    raise outcome
                errors += [str(outcome)] if outcome else []
                written += not outcome
                bar.update()
    where = {str(chain): str(place) for chain, place in outputs.items()}
    return Attacked(written, len(jobs) - len(todo), list(dict.fromkeys(errors)), where)


def _make(path: Path, jobs: list[_Job], model: LatentModel | None) -> Iterator[ImageError | AttackError | None]:
    """Makes all images of one source; of each, why it could not be made, or None."""
    try:
        image, _ = read_image(path)
    except ImageError as error:
        yield from [error] * len(jobs)
        return
    for job in jobs:
        try:
            made = apply(job.chain, image, job.seed, model)
        except AttackError as error:
            yield AttackError(error.code, str(error), subject=path, **error.details)
            continue
        save_png(made, job.target, **{CHUNK: json.dumps(job.made | job.stamp)})
        yield None


def _file(path: Path) -> Path:
    if not path.exists():
        raise ImageError(path, "there is no such file or folder; check the name")
    return path


def _place(many: bool, output: Path, chain: Chain, chains: int) -> Path:
    """The file, or the folder, for the images of one attack."""
    suffix, is_folder = output.suffix.lower(), output.is_dir()
    if (many or chains > 1) and not is_folder and (output.exists() or suffix in SUFFIXES):
        raise AttackError(f"{one_line(output)}: is one file, but there are several to write; name a folder")
    if not is_folder and suffix in SUFFIXES and suffix != ".png":
        raise AttackError(f"{one_line(output)}: what is written is PNG, without loss; end the name in .png")
    return output / chain.slug if chains > 1 else output


def _plan(
    source: Path, images: list[Path], outputs: dict[Chain, Path], seed: int, model: LatentModel | None
) -> Iterator[_Job]:
    for path in images:
        name = path.relative_to(source).as_posix() if path != source else path.name
        stamp = stamp_of(path)
        for chain, place in outputs.items():
            identity = {"model": model.identity} if chain.needs_model and model else {}
            made = {"attack": str(chain), "source": name, "seed": seed} | identity
            # A file's output is a file if it is named as one.
            alone = path == source and not place.is_dir() and place.suffix.lower() == ".png"
            target = place if alone else place / attacked_name(name)
            yield _Job(path, target, chain, seed_of(seed, name), made, stamp)


def attacked_name(name: str) -> str:
    """What an attacked image is called, from its path below the folder."""
    return name if name.lower().endswith(".png") else f"{name}.png"


def _refuse_sources(source: Path, jobs: list[_Job]) -> None:
    """Raises AttackError if an image would be written over a source, among the sources, or over another."""
    root, sources, taken = os.path.realpath(source), {os.path.realpath(job.source) for job in jobs}, {}
    for job in jobs:
        real = os.path.realpath(job.target)
        if real in sources:
            raise AttackError(f"{one_line(job.target)}: is the image to be attacked; choose another OUT")
        if real.startswith(root + os.sep):
            raise AttackError(
                f"{one_line(job.target)}: lies in {one_line(source)}, whose images are attacked; choose another OUT"
            )
        first = taken.setdefault(real, job.source)
        if first != job.source:
            raise AttackError(
                f"{one_line(job.target)}: both {one_line(first)} and {one_line(job.source)} would be written there; rename one"
            )


def _is_there(job: _Job) -> bool:
    """Whether the image was made already. Raises AttackError if something else has its name."""
    if not job.target.exists():
        return False
    said = _said(job.target)
    if said is None:
        raise AttackError(
            f"{one_line(job.target)}: exists, and is no image of this command; choose another OUT, or --force"
        )
    old = {name: value for name, value in said.items() if name not in job.stamp}
    if old != job.made:
        names = [name for name in old | job.made if old.get(name) != job.made.get(name)]
        facts = "; ".join(f"{name} was {old.get(name)}, is {job.made.get(name)}" for name in names)
        raise AttackError(
            f"{one_line(job.target)}: was made otherwise ({one_line(facts)}); choose another OUT, or --force"
        )
    return said == job.made | job.stamp


def _said(path: Path) -> dict | None:
    """How an image says that it was made; only its header is read."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            said = json.loads(image.info[CHUNK])
    except (OSError, ValueError, KeyError, TypeError, SyntaxError):
        return None
    return said if isinstance(said, dict) else None
