"""The cost of a mark in image quality: distance to unmarked images, and how well images follow their prompts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from ringmark.data.images import read_sample
from ringmark.data.results import Results, content_id
from ringmark.data.scene_classifier import ATTRIBUTES, asked, features, train_classifiers
from ringmark.errors import ImageError
from ringmark.watermark.evaluation.cells import Row
from ringmark.watermark.evaluation.quality import frechet_test, simple_features
from ringmark.watermark.evaluation.rates import Array, rate

__all__ = ["SCENES", "SCENE_SIZE", "ImageSet", "quality_rows"]

SCENES = 1000  # training scenes of the classifier, which gets 98 % of grounds and all skies right on 200 others
SCENE_SIZE = 64  # px; larger images are not classified better


@dataclass(frozen=True)
class ImageSet:
    """The unmarked images or those of one key: `names` are paths below `folder`, `prompts` known prompts by name."""

    name: str
    folder: Path
    names: list[str]
    prompts: dict[str, str]


@dataclass(frozen=True)
class _Features:
    """Features of an image for the Fréchet distance and for the scene classifier."""

    simple: Array
    scene: Array


def quality_rows(sets: list[ImageSet], image_size: tuple[int, int], results: Results) -> list[Row]:
    """A row for each set of marked images: Fréchet distance, and shares of images that follow the prompt.

    The first of the `sets` holds the unmarked images. Empty if a set has fewer than two images. What the classifier
    finds is kept in `results`.
    """
    looks = [_looks(images, image_size) for images in sets]
    if min(map(len, looks)) < 2:
        return []
    hits = _obedience(sets, looks, results)
    return [_row(sets[i].name, looks[i], looks[0], _of_set(hits, i)) for i in range(1, len(sets))]


def _of_set(hits: dict[str, list[list[bool]]], i: int) -> dict[str, list[bool]]:
    pairs = product(hits, (("marked", i), ("unmarked", 0)))
    return {f"{name}_{kind}": hits[name][j] for name, (kind, j) in pairs}


def _row(key: str, marked: dict[str, _Features], unmarked: dict[str, _Features], hits: dict[str, list[bool]]) -> Row:
    distance = frechet_test([look.simple for look in marked.values()], [look.simple for look in unmarked.values()])
    row: Row = {"key": key} | {f"frechet_{name}": value for name, value in asdict(distance).items()}
    for name, hit in hits.items():
        share, (low, high) = rate(sum(hit), len(hit))
        row |= {name: share, f"{name}_low": low, f"{name}_high": high}
    return row


def _looks(images: ImageSet, image_size: tuple[int, int]) -> dict[str, _Features]:
    """Features of each readable image."""
    looks = {}
    for name in images.names:
        try:
            image = read_sample(images.folder / name, image_size).image
        except ImageError:  # reported by `recover_files`
            continue
        small = image.resize((SCENE_SIZE, SCENE_SIZE), Image.Resampling.BOX)
        looks[name] = _Features(simple=simple_features(np.asarray(image)), scene=features(np.asarray(small)))
    return looks


def _obedience(
    sets: list[ImageSet], looks: list[dict[str, _Features]], results: Results
) -> dict[str, list[list[bool]]]:
    """Whether each image shows what its prompt asks for, by attribute and set.

    Empty unless all prompts are captions of procedural scenes, since the classifier knows no others.
    """
    wanted = [_asked(images, seen) for images, seen in zip(sets, looks, strict=True)]
    known = [prompts for prompts in wanted if prompts is not None]
    if len(known) < len(sets):
        return {}
    inputs = [np.stack([look.scene for look in seen.values()]) for seen in looks]
    sample_id = content_id("obedience", SCENES, SCENE_SIZE, known, *inputs)
    if sample_id not in results.done:
        results.append({"sample_id": sample_id, "obedience": _classified(inputs, known)})
    hits: dict[str, list[list[bool]]] = results.records[sample_id]["obedience"]
    return hits


def _classified(inputs: list[Array], wanted: list[list[dict[str, str]]]) -> dict[str, list[Array]]:
    trees, _ = train_classifiers(SCENES, 200, SCENE_SIZE)
    return {
        name: [
            trees[name].predict(x) == [prompt[name] for prompt in prompts]
            for x, prompts in zip(inputs, wanted, strict=True)
        ]
        for name in ATTRIBUTES
    }


def _asked(images: ImageSet, seen: dict[str, _Features]) -> list[dict[str, str]] | None:
    """What the prompts of the images ask for; None if a prompt is not a caption of a scene."""
    wanted = [asked(images.prompts.get(name, "")) for name in seen]
    known = [prompt for prompt in wanted if prompt is not None]
    return known if len(known) == len(wanted) else None
