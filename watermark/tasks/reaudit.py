"""Audit pictures again for other keys, by the noise that an audit has kept: without images and without a model."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from ringmark.data.batches import chunks
from ringmark.data.reader import newest_records, read_settings
from ringmark.data.results import Results
from ringmark.data.tensor_files import Rows, TensorFiles, TensorRow
from ringmark.errors import StoreError
from ringmark.watermark.detect.kept import KeptPicture, KeptVerifier
from ringmark.watermark.statistics import ALPHA
from ringmark.watermark.tasks.audit import NEEDED, Audit, Record, findings, record_of
from ringmark.watermark.tasks.keep import load_context
from ringmark.watermark.tasks.key_table import KeyTable
from ringmark.watermark.tasks.load import Keys, StrPath, check_alpha, load_keys
from ringmark.watermark.tasks.progress import Progress

__all__ = ["reaudit"]

LOG = logging.getLogger(__name__)

BATCH = 256  # pictures judged at a time
KEPT = ("sample_id", "size", "mtime_ns", "same_as")
"""Fields of a record that are not of the verdict."""
OF_KEYS = ("keys", "alpha", "search", "noise")
"""Settings of an audit that those of a further one replace."""


def reaudit(
    audited: StrPath, keys: Keys, results: StrPath, *, alpha: float = ALPHA, table: StrPath | None = None
) -> Audit:
    """Test the pictures of an audit for other keys, by the noise that it has kept.

    Args:
        audited: The results of an audit that kept its noise.
        keys: One key or several, each a `Key`, a key file or a folder of keys.
        results: Where to keep the new records, as in `audit`. An interrupted run resumes from it.
        alpha: Significance level in (0, 1).
        table: Also write a Parquet file with a row for each picture and key whose corrected p is below 1: `sample_id`,
            `key`, `present`, `log10_p` and `score`. It holds all pictures, also those that an earlier run recorded.

    Raises:
        StoreError: The audit kept no noise (noise.none), or its files are damaged; `results` are others; `table` exists
            (table.exists) or is a folder (table.folder).
        KeyFileError: A key was made for other latents, or uses frequencies that are not kept (key.reach).
    """
    check_alpha(alpha)
    source, counts = Path(audited), Audit()
    context, settings = load_context(source), read_settings(source)
    verifier = KeptVerifier(load_keys(keys), context, alpha=alpha)
    others = {name: value for name, value in settings.items() if name not in OF_KEYS}
    started = time.perf_counter()
    with ExitStack() as stack:
        store = stack.enter_context(Results(results, others | verifier.settings(), fields=NEEDED))
        rows = stack.enter_context(KeyTable(Path(table), [key.fingerprint for key in verifier.keys])) if table else None
        progress = stack.enter_context(Progress(None, task="reaudit", unit="image"))
        pictures = _pictures(source, searched="search" in settings)
        for group in chunks(pictures, BATCH):
            earlier = {record["sample_id"] for record, _ in group} & store.done
            todo = [pair for pair in group if rows or pair[0]["sample_id"] not in earlier]
            judged = {record["sample_id"]: record for record in _judged(verifier, todo, rows)}
            store.extend(record for id, record in judged.items() if id not in earlier)
            for id in (record["sample_id"] for record, _ in group):
                record = judged[id] if id in judged else store.records[id]
                counts.count(record)
                progress.add(*findings(record), earlier=id in earlier)
    LOG.info("reaudited %s: %d images in %.1f s", source, counts.images, time.perf_counter() - started)
    return counts


def _pictures(source: Path, *, searched: bool) -> Iterator[tuple[Record, KeptPicture | None]]:
    """The records of an audit, each with what is kept of its picture, if anything is."""
    files, block, rows = TensorFiles(source), None, Rows()
    for record in newest_records(source):
        at = TensorRow.of(record)
        if at and at.block != block:
            block, rows = at.block, files.read(at.block)
        tensors = rows.get(at.row) if at else None
        yield record, KeptPicture.of(record, tensors, searched=searched) if tensors else None


def _judged(
    verifier: KeptVerifier, pairs: list[tuple[Record, KeptPicture | None]], rows: KeyTable | None
) -> list[Record]:
    """The new records: of verdicts, which are added to `rows`, and of pictures that could not be read or whose noise is
    gone."""
    started = time.perf_counter()
    judged = verifier.judge([picture for _, picture in pairs if picture])
    seconds = (time.perf_counter() - started) / max(1, len(judged))
    if rows:
        rows.add(judged)
    old = [record for record, picture in pairs if picture]
    verdicts = [
        record_of(one, verifier.context.name) | {"seconds": seconds} | {n: was[n] for n in KEPT if n in was}
        for was, one in zip(old, judged, strict=True)
    ]
    return verdicts + [_failed(record) for record, picture in pairs if not picture]


def _failed(record: Record) -> Record:
    if "error" in record:
        return record
    error = StoreError("noise.missing", "its noise is missing or damaged", subject=record["sample_id"])
    return {n: record[n] for n in KEPT if n in record} | {"error": str(error), "code": error.code}
