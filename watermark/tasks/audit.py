"""Runs over folders: draw images into one, audit one, curves of audits. Each goes on where it was stopped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ringmark.data.files import one_line
from ringmark.data.images import Sample, from_array, read_sample, save_png
from ringmark.data.labels import match_labels
from ringmark.data.results import Results, read_records
from ringmark.data.scenes import scene
from ringmark.data.sources import list_images, stamp_of
from ringmark.errors import EvaluationError, ImageError, StoreError
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.detect.verdict import Judged
from ringmark.watermark.detect.verifier import Verifier, check_fit
from ringmark.watermark.embed import generate
from ringmark.watermark.evaluation.rates import Curve, roc, tied_below
from ringmark.watermark.figures import write_table
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.base import scheme_of

DRAWN = "drawn.jsonl"  # in a folder of drawn images: of what model, with what key, and each one's seed and prompt
NEEDED = ("present",)  # in each record of an audit
UNSEEN_SCENES = 2_000_000  # seeds that scripts/train_pocket.py neither trains on nor tests with

__all__ = [
    "DRAWN",
    "Audit",
    "audit",
    "curves",
    "curves_of_files",
    "draw",
    "prompts_for",
]


def prompts_for(given: list[str], number: int, seed: int) -> list[str]:
    """`number` prompts: those given, in turn, or else captions of procedural scenes that no model was trained on."""
    if given:
        return [given[i % len(given)] for i in range(number)]
    return [scene(UNSEEN_SCENES + seed + i).caption for i in range(number)]


def draw(
    model: LatentModel,
    folder: Path,
    prompts: list[str],
    first_seed: int,
    *,
    key: Key | None,
    steps: int,
    guidance: float,
    batch: int = 8,
) -> list[Path]:
    """Draw an image for each prompt into `folder` as PNG, with labels.csv beside them (path, label, prompt, seed).

    Images are named by their seeds. A folder begun with other settings is refused (StoreError), and so is a key of
    another model (KeyFileError).
    """
    if key:
        check_fit(key, model)
    made_with = {"model": model.identity, "dtype": str(model.dtype), "steps": steps, "guidance": guidance}
    settings = made_with | {"key": key.fingerprint if key else None}
    seeds = [first_seed + i for i in range(len(prompts))]
    names = {seed: f"{seed:07d}.png" for seed in seeds}
    with Results(folder / DRAWN, settings) as store:
        _same_prompts(store.path, {names[seed]: prompt for seed, prompt in zip(seeds, prompts, strict=True)})
        missing = [
            i for i, seed in enumerate(seeds) if names[seed] not in store.done or not (folder / names[seed]).exists()
        ]
        with tqdm(
            total=len(seeds), initial=len(seeds) - len(missing), desc=f"draw {folder.name}", unit="image", disable=None
        ) as bar:
            todo = [prompts[i] for i in missing], [seeds[i] for i in missing]
            scheme = scheme_of(key) if key else None
            for drawn in generate(model, *todo, scheme=scheme, steps=steps, guidance=guidance, batch=batch):
                save_png(from_array(drawn.image.numpy()), folder / names[drawn.seed])
                store.append(
                    {"sample_id": names[drawn.seed], "prompt": drawn.prompt, "seed": drawn.seed, "label": bool(key)}
                )
                bar.update()
    _write_labels(folder)
    return [folder / names[seed] for seed in seeds]


def _same_prompts(path: Path, wanted: dict[str, str]) -> None:
    """Raises StoreError where a picture of the folder was drawn with another prompt than is now wanted."""
    for record in read_records(path)[1]:
        name, old = record["sample_id"], record["prompt"]
        if wanted.get(name, old) != old:
            raise StoreError(
                f"{path}: {name} was drawn with prompt {old!r}, not {wanted[name]!r}; choose another -o or --seed"
            )


def _write_labels(folder: Path) -> None:
    _, records = read_records(folder / DRAWN)
    rows = [
        {"path": r["sample_id"], "label": int(r["label"]), "prompt": r["prompt"], "seed": r["seed"]} for r in records
    ]
    write_table(folder / "labels.csv", rows)


@dataclass(frozen=True)
class Audit:
    """What an audit found: how many images carry a key, carry none, are inconclusive, could not be read.

    `errors` says why, of each; `skipped` files have no image's name and were not opened.
    """

    images: int
    present: int
    absent: int
    inconclusive: int
    unreadable: int
    by_key: dict[str, int]
    errors: list[str]
    skipped: int

    @classmethod
    def of(cls, records: list[dict], skipped: int) -> Audit:
        """From an audit's records."""
        errors = [r["error"] for r in records if "error" in r]
        said = [r["present"] for r in records if "error" not in r]
        keys: dict[str, int] = {}
        for r in records:
            for name in r.get("carries", ()):
                keys[name] = keys.get(name, 0) + 1
        said_of = [said.count(outcome) for outcome in (True, False, None)]
        return cls(len(records), *said_of, len(errors), keys, errors, skipped)


def audit(verifier: Verifier, folder: Path, results: Path, *, batch: int = 8) -> Audit:
    """One record a file of `folder`, recursively, appended to `results`; files recorded as they are now are not read.

    A record holds the verdict of the best key, `carries`, the keys that fit, `keys`, p and score for each, and the
    file's `size` and `mtime_ns`. What cannot be read, or listed, gets a record with `error` and is tried again by the
    next run, which records it again only if something has changed.
    """
    found = list_images(folder)
    name_of = lambda path: str(path.relative_to(folder))
    stamps = {name_of(path): stamp_of(path) for path in (*found.images, *(e.path for e in found.unlisted))}
    # Relative, so that a tree that was moved with its results goes on.
    settings = verifier.settings() | {"folder": os.path.relpath(folder, results.parent)}
    with Results(results, settings, fields=NEEDED) as store:
        known = {r["sample_id"]: r for r in read_records(results)[1]}
        fresh = {n for n, stamp in stamps.items() if n in store.done and stamp.items() <= known[n].items()}
        with tqdm(total=len(stamps), initial=len(fresh), desc="audit", unit="image", disable=None) as bar:

            def keep(name: str, record: dict) -> None:
                record = {"sample_id": name} | record | stamps[name]
                if record != known.get(name):  # or a file that stays unreadable would be recorded by every run
                    store.append(record)
                bar.update()

            refuse = lambda error: keep(name_of(error.path), {"error": str(error)})
            for error in found.unlisted:
                refuse(error)
            todo = [path for path in found.images if name_of(path) not in fresh]
            for judged in verifier.scan(_readable(verifier, folder, todo, refuse), batch):
                keep(judged.sample.id, _record(judged))
    return Audit.of([r for r in read_records(results)[1] if r["sample_id"] in stamps], sum(found.skipped.values()))


def _record(judged: Judged) -> dict:
    per_key = {v.key: {"p_value": v.p_value, "score": v.score, **v.statistics} for v in judged.verdicts}
    return judged.best.record() | {"carries": [v.key for v in judged.present], "keys": per_key}


def _readable(
    verifier: Verifier, folder: Path, paths: list[Path], refuse: Callable[[ImageError], None]
) -> Iterator[Sample]:
    for path in paths:
        try:
            yield read_sample(path, verifier.image_size, id=str(path.relative_to(folder)))
        except ImageError as error:
            refuse(error)


def curves(
    records: list[dict],
    labels: dict[str, bool],
    *,
    name: str,
    statistics: tuple[str, ...] = ("score", "published_distance"),
    fpr_limit: float = 0.01,
) -> list[Curve]:
    """An ROC for each statistic of the best key: the score, and the published distance with its sign turned.

    An image that shows nothing is the least marked of all. Raises EvaluationError for a record without a number.
    """
    judged = [r for r in records if r["sample_id"] in labels and "error" not in r]
    truth = np.array([labels[r["sample_id"]] for r in judged], bool)
    blank = np.array([not r.get("shows", True) for r in judged], bool)
    out = []
    for statistic in statistics:
        scores = np.array([_number(r, statistic) for r in judged]) * (-1 if statistic == "published_distance" else 1)
        values = tied_below(scores, blank)
        out.append(roc(values[truth], values[~truth], name=f"{name} {statistic}".strip(), fpr_limit=fpr_limit))
    return out


def _number(record: dict, statistic: str) -> float:
    """0 for an image that shows nothing, whatever stands there."""
    value = record.get(statistic)
    if not record.get("shows", True):
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise EvaluationError(
            f"record of {one_line(record['sample_id'])}: its {statistic} is {json.dumps(value)}, not a number; audit that image anew, or give results that ringmark audit wrote"
        )
    return float(value)


def curves_of_files(results: list[Path], label_files: list[Path], fpr_limit: float) -> tuple[list[Curve], str]:
    """The curves of several audits taken together, and a sentence on how labels and records met."""
    records, folders = _records_of(results)
    labels, unmatched = match_labels({r["sample_id"] for r in records}, label_files, folders=folders)
    said = f"{len(labels)} of {len(records)} records labelled; {_unmatched(unmatched)}"
    return curves(records, labels, name="", fpr_limit=fpr_limit), said


def _unmatched(paths: list[str]) -> str:
    """How many labels fit no record, and the first of them."""
    shown = ", ".join(map(one_line, paths[:3])) + (", …" if len(paths) > 3 else "")
    return f"{len(paths)} labels fit no record" + (f" ({shown})" if paths else "")


def _records_of(results: list[Path]) -> tuple[list[dict], list[Path]]:
    """All records, and the folders that were audited; a file given twice counts once.

    Raises EvaluationError where two files have records of one id, or were made with other settings.
    """
    records, origin, made, folders = [], {}, None, []
    for path in {p.resolve(): p for p in results}.values():
        settings, found = read_records(path)
        folders.append(path.parent / str(settings.pop("folder", ".")))
        made = settings if made is None else made
        if other := sorted(n for n in settings.keys() | made.keys() if settings.get(n) != made.get(n)):
            raise EvaluationError(
                f"{path}: was made with other settings than {results[0]} ({', '.join(other)}), so scores do not compare; draw a curve for each"
            )
        for record in found:
            first = origin.setdefault(record["sample_id"], path)
            if first != path:
                raise EvaluationError(
                    f"{path}: has a record of {record['sample_id']}, and so has {first}; give only one of the two, or audit a folder that holds both"
                )
            records.append(record)
    return records, folders
