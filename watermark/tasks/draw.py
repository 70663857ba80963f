"""Draw marked or unmarked images into a folder. An interrupted run can be resumed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ringmark.data.images import from_array, is_whole_png, save_png
from ringmark.data.reader import read_records
from ringmark.data.results import Results
from ringmark.data.scenes import scene
from ringmark.errors import ModelError, StoreError
from ringmark.inversion.models.pipeline import LatentModel, Size
from ringmark.watermark.detect.verifier import check_fit
from ringmark.watermark.embed import generate
from ringmark.watermark.evaluation.tables import write_table
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.base import scheme_of

__all__ = ["DRAWN", "LABELS", "UNSEEN_SCENES", "draw", "prompts_for"]

LOG = logging.getLogger(__name__)

DRAWN = "drawn.jsonl"  # journal in a folder of drawn images: model, key, and each image's seed and prompt
LABELS = "labels.csv"
UNSEEN_SCENES = 2_000_000  # first of the seeds that scripts/train_pocket.py does not use


def prompts_for(given: list[str], number: int, seed: int) -> list[str]:
    """`number` prompts: the given ones in turn, or captions of procedural scenes that no model was trained on."""
    if given:
        return [given[i % len(given)] for i in range(number)]
    seeds = range(UNSEEN_SCENES + seed, UNSEEN_SCENES + seed + number)
    return [
        scene(seed).caption for seed in tqdm(seeds, "write prompts", delay=2, unit="prompt", disable=None, leave=False)
    ]


def draw(
    model: LatentModel,
    folder: Path,
    prompts: list[str],
    first_seed: int,
    *,
    key: Key | None,
    steps: int,
    guidance: float,
    size: Size | None = None,
    sampler: str | None = None,
    negative: str = "",
    loras: Sequence[str] = (),
    batch: int = 8,
    force: bool = False,
) -> list[Path]:
    """Draw an image for each prompt into `folder` as PNG, and write labels.csv (path, label, prompt, seed).

    The model's pipeline draws them, by default at its native `size` (H, W) and with its own sampler. `negative` is a
    prompt for what they should not show; `loras` are those that the model was loaded with. Images are named by their
    seeds, which count up from `first_seed`; images drawn by an earlier run are kept. Raises ModelError for settings
    that the model does not support, KeyFileError for a key for another kind of latents, SchemeError for a size that the
    key cannot mark, and StoreError for a folder with images of other settings or prompts and, without `force`, if a
    file that an earlier run did not draw would be replaced.
    """
    size = size or model.image_size
    how = {"steps": steps, "guidance": guidance, "size": size, "sampler": sampler, "negative": negative}
    settings = _settings(model, key, loras, how)
    wanted = {f"{seed:07d}.png": (seed, prompt) for seed, prompt in enumerate(prompts, first_seed)}
    if not force:
        _refuse_foreign(folder, list(wanted))
    with Results(folder / DRAWN, settings) as store:
        _refuse_other_prompts(store, {name: prompt for name, (_, prompt) in wanted.items()})
        missing = [name for name in wanted if name not in store.done or not is_whole_png(folder / name)]
        LOG.info("draw %d of %d images into %s", len(missing), len(wanted), folder)
        images = _drawn(model, {name: wanted[name] for name in missing}, key=key, batch=batch, **how)
        done = len(wanted) - len(missing)
        for name, record, pixels in tqdm(
            images, f"draw {folder.name}", len(wanted), initial=done, unit="image", disable=None
        ):
            # Recorded first, so that a file without a record was never drawn by us.
            store.append(record)
            # Not signed: nothing in the file should reveal that it is marked.
            save_png(from_array(pixels), folder / name, signed=False)
    _write_labels(folder)
    return [folder / name for name in wanted]


def _settings(model: LatentModel, key: Key | None, loras: Sequence[str], how: dict[str, Any]) -> dict[str, Any]:
    """Everything that the images depend on, with the name of the sampler. Raises as `draw` for what does not fit."""
    if key:
        check_fit(key, model)
        scheme_of(key, model.noise_shape(how["size"]))
    scheduler = type(model.sampler(how["sampler"], how["steps"], how["size"])).__name__
    made_with = {"model": model.identity, "dtype": str(model.dtype), "loras": [Path(lora).name for lora in loras]}
    named = {"sampler": how["sampler"] or scheduler, "size": list(how["size"])}
    return made_with | how | named | {"key": key.fingerprint if key else None}


def _drawn(
    model: LatentModel, wanted: dict[str, tuple[int, str]], *, key: Key | None, **settings: Any
) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Name, record and pixels (3, H, W) of each image, drawn batch by batch."""
    seeds, prompts = [seed for seed, _ in wanted.values()], [prompt for _, prompt in wanted.values()]
    images = generate(model, prompts, seeds, key=key, **settings)
    for name, drawn in zip(wanted, images, strict=True):
        if not drawn.image.isfinite().all():
            raise ModelError("model.not-finite", "drew an image that is not finite", subject=model.name)
        record = {"sample_id": name, "prompt": drawn.prompt, "seed": drawn.seed, "label": bool(key)}
        yield name, record, drawn.image.numpy()


def _refuse_foreign(folder: Path, names: list[str]) -> None:
    """Raises StoreError for an existing file that no earlier run recorded, and for a link."""
    recorded = set()
    if (folder / DRAWN).is_file():
        recorded = {record["sample_id"] for record in read_records(folder / DRAWN)[1]}
    for name in (*names, LABELS):
        path = folder / name
        ours = name in recorded or (name == LABELS and recorded)
        if path.is_symlink() or (os.path.lexists(path) and not ours):
            raise StoreError("results.foreign-image", "exists and was not drawn by an earlier run", subject=path)


def _refuse_other_prompts(store: Results, wanted: dict[str, str]) -> None:
    """Raises StoreError if an image in the folder was drawn with another prompt."""
    for name, record in store.records.items():
        old = record["prompt"]
        if wanted.get(name, old) != old:
            fact = f"{name} was drawn with prompt {old!r}, not {wanted[name]!r}"
            raise StoreError("results.other-prompt", fact, subject=store.path)


def _write_labels(folder: Path) -> None:
    """Write labels.csv from the journal."""
    _, records = read_records(folder / DRAWN)
    rows = [
        {"path": r["sample_id"], "label": int(r["label"]), "prompt": r["prompt"], "seed": r["seed"]} for r in records
    ]
    write_table(folder / LABELS, rows)
