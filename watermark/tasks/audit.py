"""Audit a folder: find the images that carry a key. An interrupted audit can be resumed."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringmark.data.images import Sample, SizesOf, read_samples
from ringmark.data.results import Results
from ringmark.data.sources import Listing, list_images, stamp_of
from ringmark.errors import ImageError
from ringmark.inversion.sizes import Size
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.verdict import Judged
from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.statistics import ALPHA
from ringmark.watermark.tasks.load import Keys, Model, StrPath, load_verifier
from ringmark.watermark.tasks.progress import Progress

__all__ = ["Audit", "audit", "audit_folder"]

LOG = logging.getLogger(__name__)

Record = dict[str, Any]

NEEDED = ("present",)  # in each record of an audit


@dataclass(frozen=True)
class Audit:
    """Counts of an audit: images with a key (`present`) and without, inconclusive and unreadable ones.

    `by_key` counts images by the fingerprints of the keys that they carry. `errors` has a line for each unreadable
    file. `skipped` counts, by suffix, the files that were not opened because their names are not those of images.
    `outside` has a line for each link that leads out of the folder and was not followed.
    """

    images: int
    present: int
    absent: int
    inconclusive: int
    unreadable: int
    by_key: dict[str, int]
    errors: list[str]
    skipped: dict[str, int]
    outside: list[str]

    @classmethod
    def of(cls, records: list[Record], listing: Listing) -> Audit:
        """Count the records of the files in a listing."""
        errors = [r["error"] for r in records if "error" in r]
        outcomes = Counter(r["present"] for r in records if "error" not in r)
        return cls(
            images=len(records),
            present=outcomes[True],
            absent=outcomes[False],
            inconclusive=outcomes[None],
            unreadable=len(errors),
            by_key=dict(Counter(name for r in records for name in r.get("carries", ()))),
            errors=errors,
            skipped=listing.skipped,
            outside=list(map(str, listing.outside)),
        )


def audit(
    folder: StrPath,
    keys: Keys,
    results: StrPath,
    *,
    model: Model = "pocket",
    device: str = "auto",
    dtype: str = "auto",
    method: str = "guarded",
    max_steps: int | None = None,
    steps: int = 25,
    alpha: float = ALPHA,
    calibration: StrPath | Calibration | None = None,
    search: bool = False,
    sizes: Sequence[Size] = (),
    thorough: bool = False,
    follow_links: bool = False,
    batch: int = 8,
) -> Audit:
    """Test every image of a folder, recursively, for keys and record each verdict in a file.

    Args:
        folder: The folder.
        keys: One key or several, each a `Key`, a key file or a folder of keys.
        results: Where to keep a record for each image: a file of JSON lines, or for Parquet a folder or a name that
            ends in .parquet. An interrupted audit resumes from it; files that have not changed since they were recorded
            are not read again.
        follow_links: Also follow links that lead out of the folder.
        model, device, dtype, method, max_steps, steps, alpha, calibration, search, sizes, thorough, batch: As in
            `verify`.

    Raises:
        ImageError: There is no such folder, or no image in it. Images that cannot be read are recorded instead.
        StoreError: `results` is another file or was made with other settings.
        KeyFileError, CalibrationError, ModelError, SchemeError: Keys, calibration and model do not match.

    Example:
        >>> counts = ringmark.audit("pictures", ["my.key", "old.key"], "results.jsonl")
        >>> counts.present, counts.by_key
    """
    verifier, _ = load_verifier(
        keys,
        model=model,
        device=device,
        dtype=dtype,
        method=method,
        max_steps=max_steps,
        steps=steps,
        alpha=alpha,
        calibration=calibration,
        search=search,
        sizes=sizes,
        thorough=thorough,
    )
    return audit_folder(verifier, Path(folder), Path(results), follow_links=follow_links, batch=batch)


def audit_folder(
    verifier: Verifier, folder: Path, results: Path, *, follow_links: bool = False, batch: int = 8
) -> Audit:
    """Append a record to `results` for each file of `folder`, recursively, that is new or has changed.

    A record holds the verdict on the best key; `carries`, the keys that are present; `keys`, with p and score of each;
    and the file's `size` and `mtime_ns`. A file or folder that cannot be read gets a record with `error`. The next run
    tries it again, and records it again only if something has changed.
    """
    listing = list_images(folder, follow_links=follow_links)
    # Relative, so that the audit of a tree that was moved with its results can be resumed.
    settings = verifier.settings() | {"folder": os.path.relpath(folder, results.parent)}
    with Results(results, settings, fields=NEEDED) as store:
        run = _Run(store, folder, listing)
        run.audit(verifier, batch)
    records = [record for name, record in store.records.items() if name in run.stamps]
    return Audit.of(records, listing)


class _Run:
    """One run over a folder: its files, which of them have an up-to-date record, and a progress bar."""

    def __init__(self, store: Results, folder: Path, listing: Listing) -> None:
        self.store, self.folder, self.listing = store, folder, listing
        files = (*listing.images, *(error.path for error in listing.unlisted))
        self.stamps = {self.name_of(path): stamp_of(path) for path in files}
        self.fresh = {name for name in self.stamps if self._is_fresh(name)}

    def name_of(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def _is_fresh(self, name: str) -> bool:
        return name in self.store.done and self.stamps[name].items() <= self.store.records[name].items()

    def audit(self, verifier: Verifier, batch: int) -> None:
        """Record every file without an up-to-date record."""
        started, todo = time.perf_counter(), [p for p in self.listing.images if self.name_of(p) not in self.fresh]
        LOG.info("audit of %s: %d images, %d recorded already", self.folder, len(self.stamps), len(self.fresh))
        done = [_findings(self.store.records[name]) for name in self.fresh]
        with Progress(len(self.stamps), done=done, task="audit", unit="image") as self.progress:
            for error in self.listing.unlisted:
                self._refuse(error)
            for judged in verifier.scan(self._readable(verifier.sizes_of, todo), batch):
                self._record(judged.sample.id, _record(judged, verifier.recoverer.model.name))
        LOG.info("audited %d images in %.1f s", len(todo), time.perf_counter() - started)

    def _readable(self, sizes_of: SizesOf, paths: list[Path]) -> Iterator[list[Sample]]:
        for path in paths:
            try:
                yield read_samples(path, sizes_of, id=self.name_of(path))
            except ImageError as error:
                self._refuse(error)

    def _refuse(self, error: ImageError) -> None:
        LOG.info("%s", error)
        self._record(self.name_of(error.path), {"error": str(error), "code": error.code})

    def _record(self, name: str, record: Record) -> None:
        record = {"sample_id": name} | record | self.stamps[name]
        if record != self.store.records.get(name):  # otherwise every run would record an unreadable file again
            self.store.append(record)
        self.progress.add(*_findings(record))


def _record(judged: Judged, model: str) -> Record:
    """The record of one image."""
    best, (height, width) = judged.best, judged.sample.size or (None, None)
    return best.record() | {
        "content": judged.sample.content,
        "width": width,
        "height": height,
        "stage": "search" if best.by_search else list(best.stages)[judged.stage],
        "model": model,
        "carries": [v.key for v in judged.present],
        "keys": judged.by_key(),
    }


def _findings(record: Record) -> list[str]:
    """What progress counts: nothing for an image without a key."""
    if "error" in record:
        return ["unreadable"]
    return {True: ["with a key"], None: ["inconclusive"], False: []}[record["present"]]
