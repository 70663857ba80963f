"""Memory of resumed audits, further audits and reports against the number of records.

    python -m scripts.experiments records -o build/records             # half an hour
    python -m scripts.experiments records -o build/small --records 100 --records 200

Results in JSON lines hold so many records, all of which name the same kept noise of eight pictures. In a process of its
own each, an audit finds all of its pictures done, a further audit tests them for one key, and a report is written.
Memory is the peak of the process, time its processor time. The list of files that an audit of a folder makes is not
part of it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from ringmark.data.items import Item
from ringmark.data.reader import newest_records, read_settings
from ringmark.data.results import Results
from ringmark.inversion.memory import memory_kilobytes
from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.tasks.audit import Pictures, audit_pictures
from ringmark.watermark.tasks.reaudit import reaudit
from ringmark.watermark.tasks.report import write_report
from scripts.experiments.common import Bench, experiment, line
from scripts.experiments.kept import BATCH, store
from scripts.experiments.keys import keys_of
from scripts.experiments.processes import alone

CHUNK = 10_000  # records that are written at a time


def fill(bench: Bench, number: int, folder: Path) -> Path:
    """Results of this number of pictures that keep noise."""
    few, again, results = folder / "few.jsonl", folder / "again.jsonl", folder / "kept.jsonl"
    store(bench, few)
    reaudit(few, keys_of(bench, 1), again)
    pairs = zip(newest_records(few), newest_records(again), strict=True)
    records = [verdict | {"tensors": kept["tensors"], "size": 1, "mtime_ns": 1} for kept, verdict in pairs]
    with Results(results, read_settings(few)) as journal:
        for start in range(0, number, CHUNK):
            numbers = range(start, min(number, start + CHUNK))
            journal.extend(records[i % BATCH] | {"sample_id": name(i), "content": f"{i:064x}"} for i in numbers)
    Path(f"{few}.tensors").rename(f"{results}.tensors")
    return results


def name(number: int) -> str:
    """A path as in a bucket."""
    return f"s3://bucket/2026/{number // 1000:06d}/{number:09d}.png"


def resumed(bench: Bench, number: int, results: Path) -> None:
    """An audit that has nothing left to do."""
    verifier = Verifier(bench.recoverer, keys_of(bench, 1), calibration=bench.calibration)
    items = (Item(id=name(i), read=lambda _: [], size=1, mtime_ns=1) for i in range(number))
    counts = audit_pictures(verifier, Pictures(items=items, names="bucket", total=number), results, keep_noise=True)
    assert counts.images == number


def tested_again(bench: Bench, number: int, results: Path) -> None:
    """A further audit for one key."""
    assert reaudit(results, keys_of(bench, 1), results.with_name("new.jsonl")).images == number


def reported(bench: Bench, number: int, results: Path) -> None:
    """A report."""
    write_report(results, results.with_name("report.html"))


def measured(work: Callable[[Bench, int, Path], None], bench: Bench, number: int, results: Path) -> dict:
    """Peak memory and processor time of this process, which does nothing else."""
    started = time.process_time()
    work(bench, number, results)
    seconds, peak = time.process_time() - started, memory_kilobytes("VmHWM") / 1024
    return {"records": number, "what": work.__name__.replace("_", " "), "peak MB": peak, "seconds": seconds}


@experiment(BATCH, drawing=False)
@click.option("--records", "numbers", type=int, multiple=True, default=[10_000, 1_000_000], show_default=True)
def main(bench: Bench, numbers: tuple[int, ...]) -> None:
    """Memory against the number of records."""
    bench.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in numbers:
        with tempfile.TemporaryDirectory(dir=bench.output) as folder:
            results = fill(bench, number, Path(folder))
            for work in (resumed, reported, tested_again):
                rows.append(alone(measured, work, replace(bench), number, results))  # a copy of the bench has no model
                click.echo(line(rows[-1]))
    bench.write(rows)
