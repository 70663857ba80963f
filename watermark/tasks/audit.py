"""Audit the pictures of any source: find those that carry a key. An interrupted audit can be resumed."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from ringmark.data.engine import Engine, Finding, Local, ReadItem
from ringmark.data.images import Sample
from ringmark.data.items import Item, items_of, listed_items
from ringmark.data.locations import public
from ringmark.data.positions import Positions
from ringmark.data.ray_engine import Cluster, Ray
from ringmark.data.results import Results
from ringmark.data.sources import SUFFIXES, list_images
from ringmark.errors import EngineError, ImageError
from ringmark.inversion.recover import STEPS
from ringmark.inversion.sizes import Size
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.kept import tensors_of
from ringmark.watermark.detect.verdict import Judged
from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.statistics import ALPHA
from ringmark.watermark.tasks.keep import keep_context
from ringmark.watermark.tasks.load import Keys, Model, Setup, StrPath, load_calibration, load_keys, load_verifier
from ringmark.watermark.tasks.progress import Progress

__all__ = [
    "NEEDED",
    "WORKERS",
    "Audit",
    "Pictures",
    "Record",
    "audit",
    "audit_pictures",
    "find_pictures",
    "findings",
    "record_of",
]

LOG = logging.getLogger(__name__)

Record = dict[str, Any]

NEEDED = ("present",)  # in each record of an audit
WORKERS = 2
LISTED_ERRORS = 1000


@dataclass
class Audit:
    """Counts of an audit: images with a key (`present`) and without, inconclusive and unreadable ones.

    `by_key` counts images by the fingerprints of the keys that they carry. `errors` has a line for each of the first
    LISTED_ERRORS unreadable files. `skipped` counts, by suffix, the files that were not opened because their names are
    not those of images. `outside` has a line for each link that leads out of the folder and was not followed.
    """

    images: int = 0
    present: int = 0
    absent: int = 0
    inconclusive: int = 0
    unreadable: int = 0
    by_key: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)

    def count(self, record: Record) -> None:
        """Count one more record."""
        self.images += 1
        if "error" in record:
            self.unreadable += 1
            if len(self.errors) < LISTED_ERRORS:
                self.errors.append(record["error"])
            return
        self.present += record["present"] is True
        self.absent += record["present"] is False
        self.inconclusive += record["present"] is None
        for key in record.get("carries", ()):
            self.by_key[key] = self.by_key.get(key, 0) + 1


@dataclass(frozen=True)
class Pictures:
    """The pictures to audit: their items, how many there are if that is known, and the names of their sources.

    `folder` is the folder that ids are relative to, if they are relative.
    """

    items: Iterable[Item]
    names: str
    total: int | None = None
    folder: Path | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)


def find_pictures(sources: Sequence[StrPath], *, follow_links: bool = False) -> Pictures:
    """The pictures of these sources; see `ringmark.data.items.items_of`.

    Of a single folder on this machine, ids are relative, so that the audit of a tree that was moved with its results
    can be resumed. Raises ImageError for a source that cannot be reached, and for a folder without images.
    """
    given = [os.fspath(source) for source in sources]
    names = ", ".join(map(public, given))
    if len(given) == 1 and os.path.isdir(given[0]):
        folder = Path(given[0])
        listing = list_images(folder, follow_links=follow_links)
        return Pictures(
            items=listed_items(listing, folder),
            names=names,
            total=len(listing.images) + len(listing.unlisted),
            folder=folder,
            skipped=listing.skipped,
            outside=list(map(str, listing.outside)),
        )
    opened = [items_of(source, follow_links=follow_links) for source in given]
    items = chain.from_iterable(opened)
    return Pictures(items=items if len(given) == 1 else _once(items), names=names)


def _once(items: Iterable[Item]) -> Iterator[Item]:
    """The items of sources that may overlap, each once; about 80 bytes of memory each."""
    seen = set[bytes]()
    for item in items:
        digest = hashlib.blake2b(os.fsencode(item.id), digest_size=10).digest()
        if digest not in seen:
            seen.add(digest)
            yield item


def audit(
    sources: StrPath | Iterable[StrPath],
    keys: Keys,
    results: StrPath,
    *,
    model: Model = "pocket",
    device: str = "auto",
    dtype: str = "auto",
    method: str = "operator",
    max_steps: int | None = None,
    steps: int = STEPS,
    alpha: float = ALPHA,
    calibration: StrPath | Calibration | None = None,
    search: bool = False,
    sizes: Sequence[Size] = (),
    thorough: bool = False,
    follow_links: bool = False,
    batch: int | None = None,
    workers: int = WORKERS,
    keep_noise: bool = False,
    cluster: Cluster | None = None,
) -> Audit:
    """Test every image of a source for keys and record each verdict.

    Args:
        sources: One source or several: folders, archives, tables, lists, pictures and patterns that match such, each a
            path or an address (see `ringmark.data.items.items_of`).
        keys: One key or several, each a `Key`, a key file or a folder of keys.
        results: Where to keep a record for each image: a file of JSON lines, or for Parquet a folder or a name that
            ends in .parquet. An interrupted audit resumes from it; files that have not changed since they were recorded
            are not read again.
        follow_links: Also follow links that lead out of the folder.
        workers: Threads that read and decode images beside the computation; 0 is none.
        keep_noise: Also keep the low frequencies of recovered noise next to the results, for `reaudit`.
        cluster: Run on this Ray cluster, or on one that is started here; None is this process.
        model, device, dtype, method, max_steps, steps, alpha, calibration, search, sizes, thorough, batch: As in
            `verify`.

    Raises:
        ImageError: A source cannot be reached, or there is no image. Images that cannot be read are recorded instead.
        StoreError: `results` is another file or was made with other settings.
        KeyFileError, CalibrationError, ModelError, SchemeError: Keys, calibration and model do not match.
        EngineError: The cluster cannot be used.

    Example:
        >>> counts = ringmark.audit("pictures", ["my.key", "old.key"], "results.jsonl")
        >>> counts.present, counts.by_key
    """
    if cluster and not isinstance(model, str):
        fact = "cannot be sent to other processes, which load it by its name"
        raise EngineError("engine.model", fact, subject=f"model {model.name}")
    given = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    pictures = find_pictures(given, follow_links=follow_links)
    load = partial(
        load_verifier,
        load_keys(keys),
        model=model,
        device=device,
        dtype=dtype,
        method=method,
        max_steps=max_steps,
        steps=steps,
        alpha=alpha,
        calibration=load_calibration(calibration),
        search=search,
        sizes=sizes,
        thorough=thorough,
    )
    return audit_pictures(
        load().verifier,
        pictures,
        Path(results),
        batch=batch,
        workers=workers,
        keep_noise=keep_noise,
        load=load,
        cluster=cluster,
    )


def audit_pictures(
    verifier: Verifier,
    pictures: Pictures,
    results: Path,
    *,
    batch: int | None = None,
    workers: int = WORKERS,
    keep_noise: bool = False,
    cluster: Cluster | None = None,
    load: Callable[[], Setup] | None = None,
) -> Audit:
    """Append a record to `results` for each picture that is new or has changed.

    A record holds the verdict on the best key; `carries`, the keys that are present; `keys`, with p and score of each;
    and the file's `size` and `mtime_ns`. Equal pixels are judged once: the record of another picture with them copies
    the verdict and names the first in `same_as`. What cannot be read gets a record with `error`. The next run tries it
    again, and records it again only if something has changed. With `keep_noise`, `reaudit` can test the pictures for
    other keys. On a `cluster`, `load` gives each process the verifier. Raises ImageError (image.none) if there are no
    pictures, EngineError for a cluster that cannot be used.
    """
    folder = {"folder": os.path.relpath(pictures.folder, results.parent)} if pictures.folder else {}
    noise = {"noise": "kept"} if keep_noise else {}
    batch = batch or verifier.batch
    judge = AuditJudge(verifier, batch, keep_noise)
    engine: Engine = Local(judge, batch=batch, workers=workers)
    if cluster and load:
        remake = partial(AuditJudge.loaded, load, batch, keep_noise)
        engine = Ray(judge, remake, cluster=cluster, batch=batch, workers=workers)
    with Results(results, verifier.settings() | folder | noise, fields=NEEDED) as store, engine:
        if keep_noise:
            keep_context(results, verifier)
        counts = Audit(skipped=pictures.skipped, outside=pictures.outside)
        run = _Run(engine, store, keep_noise=keep_noise)
        started = time.perf_counter()
        with Progress(pictures.total, task="audit", unit="image") as progress:
            for record, earlier in run.records(pictures.items):
                counts.count(record)
                progress.add(*findings(record), earlier=earlier)
        LOG.info("audited %s: %d images in %.1f s", pictures.names, run.judged, time.perf_counter() - started)
    if not counts.images:
        raise ImageError("image.none", "holds no images", subject=pictures.names, suffixes=", ".join(SUFFIXES))
    return counts


@dataclass(frozen=True)
class AuditJudge:
    """What an engine does with pictures: the verifier's verdicts as records, with what is kept of the noise."""

    verifier: Verifier
    batch: int
    keep_noise: bool

    @classmethod
    def loaded(cls, load: Callable[[], Setup], batch: int, keep_noise: bool) -> AuditJudge:
        """The judge with the verifier that `load` gives, in another process."""
        return cls(load().verifier, batch, keep_noise)

    def settings(self) -> Record:
        """Everything that verdicts depend on."""
        return self.verifier.settings()

    def sizes_of(self, picture: Size) -> tuple[Size, ...]:
        """The sizes (H, W) at which a picture of this size is tried."""
        return self.verifier.sizes_of(picture)

    def __call__(self, pictures: list[list[Sample]]) -> list[Finding]:
        """The record of each picture."""
        model = self.verifier.recoverer.model.name
        judged = self.verifier.scan(pictures, self.batch)
        return [(record_of(one, model), tensors_of(one) if self.keep_noise else {}) for one in judged]


class _Run:
    """One run over the pictures of a source."""

    def __init__(self, engine: Engine, store: Results, *, keep_noise: bool) -> None:
        self.engine, self.store, self.keep_noise = engine, store, keep_noise
        self.judged = 0
        self._twins: dict[str, list[Item]] = {}
        """Pictures that wait for the verdict on equal pixels, by content."""
        self._known = Positions()
        """Positions of records, by content; twins are copied from them."""
        for position, record in store.newest():
            self._know(position, record)
        self._unasked: list[tuple[Record, bool]] = []
        """Records of pictures that need no judgement, until the engine gives us our turn."""

    def records(self, items: Iterable[Item]) -> Iterator[tuple[Record, bool]]:
        """The record of every picture as soon as it is stored, and whether it is of an earlier run."""
        pictures = self.engine.read(items, self._is_current)
        for group in self.engine.judge(map(self._unless_known, pictures)):
            yield from self._unasked
            self._unasked = []
            for record in self._stored(group):
                yield record, False

    def _is_current(self, item: Item) -> bool:
        """Whether the record of a picture is up to date."""
        return item.id in self.store.done and item.stamp.items() <= self.store.records[item.id].items()

    def _unless_known(self, picture: ReadItem) -> ReadItem | None:
        """The picture, or None if it need not be judged."""
        item = picture.item
        if picture.skipped:
            self._unasked.append((self.store.records[item.id], True))
        elif picture.error:
            self._unasked.append((self._failed(item, picture.error), False))
        elif picture.content in self._twins:
            self._twins[picture.content].append(item)
        elif first := self._judged_earlier(picture.content):
            self._unasked.append((self._store(item, copied(first)), False))
        else:
            self._twins[picture.content] = []
            return picture
        return None

    def _stored(self, group: list[tuple[ReadItem, Finding | ImageError]]) -> Iterator[Record]:
        """Store what was found in these pictures, then the same of equal pictures that wait for it."""
        found = [(picture.item, *finding) for picture, finding in group if not isinstance(finding, ImageError)]
        records = [record | item.stamp for item, record, _ in found]
        self.store.extend(records, [tensors for *_, tensors in found] if self.keep_noise else ())
        self.judged += len(records)
        yield from records
        for record in records:
            self._know(self.store.position(record["sample_id"]), record)
            for twin in self._twins.pop(record["content"]):  # of the stored record, which says where its noise is
                yield self._store(twin, copied(self.store.records[record["sample_id"]]))
        for picture, error in group:
            if isinstance(error, ImageError):
                for item in (picture.item, *self._twins.pop(picture.content)):
                    yield self._failed(item, ImageError(error.code, error.fact, subject=item.id))

    def _failed(self, item: Item, error: ImageError) -> Record:
        LOG.info("%s", error)
        return self._store(item, {"error": str(error), "code": error.code})

    def _know(self, position: int, record: Record) -> None:
        if record.get("content"):
            self._known[record["content"]] = position

    def _judged_earlier(self, content: str) -> Record | None:
        """The record of a picture with these pixels; None if there is none, or if that picture has changed since."""
        if (position := self._known.get(content)) is None:
            return None
        record = self.store.records[self.store.at(position)["sample_id"]]
        return record if record.get("content") == content else None

    def _store(self, item: Item, record: Record) -> Record:
        record = record | {"sample_id": item.id} | item.stamp
        if record != self.store.records.get(item.id):  # otherwise every run would record an unreadable file again
            self.store.append(record)
        return record


def record_of(judged: Judged, model: str) -> Record:
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


def copied(record: Record) -> Record:
    """The verdict on a picture as that on another one with equal pixels."""
    return record | {"same_as": record.get("same_as", record["sample_id"]), "seconds": 0.0}


def findings(record: Record) -> list[str]:
    """What progress counts: nothing for an image without a key."""
    if "error" in record:
        return ["unreadable"]
    return {True: ["with a key"], None: ["inconclusive"]}.get(record["present"], [])
