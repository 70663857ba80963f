"""Time and memory of `ringmark report` on synthetic results in Parquet: uniform p, one image in a hundred marked.

python scripts/measure_report.py --records 10000000 -o measured
"""

from __future__ import annotations

import json
import platform
import resource
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ringmark.data.parts import HEADER, PART, ROWS
from ringmark.data.schema import arrow_schema

KEYS = ("ca469504d1c23cc7", "3f9a2b10aa51c0de")
ALPHA = 1e-3
MARKED, UNREADABLE, INCONCLUSIVE = 0.01, 0.001, 0.0002
SETTINGS = {"model": {"name": "pocket"}, "keys": list(KEYS), "alpha": ALPHA, "folder": "pictures"}


def part(first: int, rows: int, rng: np.random.Generator) -> pa.Table:
    """A table of `rows` records; the number of the first is `first`."""
    kind = rng.random(rows)
    unreadable, inconclusive = kind < UNREADABLE, kind > 1 - INCONCLUSIVE
    marked = (kind >= UNREADABLE) & (kind < UNREADABLE + MARKED)
    log10_p = np.where(marked, -rng.gamma(4, 8, rows), np.log10(rng.random(rows)))
    key = pa.array(np.array(KEYS)[rng.integers(len(KEYS), size=rows)])
    present = pa.array(log10_p <= np.log10(ALPHA), mask=unreadable | inconclusive)
    ids = [f"batch-{i // 250_000:03d}/{i:08d}.png" for i in range(first, first + rows)]
    ones, gap = np.arange(rows + 1, dtype=np.int32), pa.nulls(rows)
    p = pa.array(10**log10_p)
    stages = pa.MapArray.from_arrays(ones, pa.array(["full"] * rows), p)
    found = np.flatnonzero(np.asarray(present.fill_null(False)))
    carries = pa.ListArray.from_arrays(np.searchsorted(found, np.arange(rows + 1)).astype(np.int32), key.take(found))
    start = 1_750_000_000 * 10**9
    columns: dict[str, Any] = {
        "sample_id": ids,
        "content": [f"{i:032x}" for i in range(first, first + rows)],
        "width": np.full(rows, 512),
        "height": np.full(rows, 512),
        "present": present,
        "key": key,
        "p_value": p,
        "log10_p": log10_p,
        "score": -log10_p / 100,
        "stage": ["full"] * rows,
        "model": ["pocket"] * rows,
        "seconds": rng.gamma(9, 0.05, rows),
        "carries": carries,
        "keys": pa.MapArray.from_arrays(ones, key, stages),
        "stages": stages,
        "notes": pa.array([["the two tests contradict each other"] if x else [] for x in inconclusive]),
        "error": pa.array(["is damaged or cut off" if x else None for x in unreadable]),
        "code": pa.array(["image.damaged" if x else None for x in unreadable]),
        "size": rng.integers(100_000, 900_000, rows),
        "mtime_ns": start + rng.integers(0, 2 * 365 * 86_400, rows) * 10**9,
    }
    header = {HEADER: json.dumps({"ringmark": 1, "settings": SETTINGS}).encode()}
    schema = arrow_schema(header)
    return pa.table([pa.array(columns.get(f.name, gap)).cast(f.type) for f in schema], schema=schema)


def write_results(folder: Path, records: int, seed: int) -> None:
    """Write Parquet parts as an audit does."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number, first in enumerate(range(0, records, ROWS)):
        table = part(first, min(ROWS, records - first), rng)
        pq.write_table(table, folder / PART.format(number), compression="zstd")


@click.command()
@click.option("--records", default=10_000_000, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for results and report.")
def main(records: int, seed: int, output: Path) -> None:
    """Write the results unless they are there, report them, and print time and peak memory as JSON."""
    from ringmark.watermark.tasks.report import write_report

    results = output / f"results-{records}.parquet"
    if not results.exists():
        write_results(results, records, seed)
    started, busy = time.perf_counter(), time.process_time()
    write_report(results, output / "report.html", force=True)
    measured = {
        "records": records,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - busy, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "results_mb": round(sum(path.stat().st_size for path in results.iterdir()) / 1e6, 1),
        "report_mb": round((output / "report.html").stat().st_size / 1e6, 2),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    click.echo(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
