"""Time to test kept noise for new keys, from the files to the new records.

    python -m scripts.experiments kept -o build/kept                   # 3 minutes
    python -m scripts.experiments kept -o build/small -n 16 --keys 1 --keys 10 --rounds 1

The store holds white noise for `-n` pictures, in all stages of the model's own calibration, in blocks of eight. For
several keys, the table of keys and pictures is written too; its rows are counted. Times are medians of rounds that take
all numbers of keys in turn, processor time of this process; the first round, which also expands the keys and tests the
unmarked images for them, is left out if there are others.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from ringmark.data.images import Sample
from ringmark.data.results import Results
from ringmark.watermark.detect.kept import tensors_of
from ringmark.watermark.detect.verdict import Judged, Tried, Verdicts
from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.tasks.keep import keep_context
from ringmark.watermark.tasks.reaudit import reaudit
from scripts.experiments.common import Bench, experiment, line
from scripts.experiments.keys import keys_of

BATCH = 8


def store(bench: Bench, results: Path) -> float:
    """Results that keep white noise, as an audit writes them; bytes of noise a picture."""
    verifier = Verifier(bench.recoverer, keys_of(bench, 1), calibration=bench.calibration)
    random, (height, width) = torch.Generator().manual_seed(bench.seed), bench.model.image_size
    stages = len(verifier.settings().get("stages", ("full",)))
    image = Image.new("RGB", (width, height))
    with Results(results, verifier.settings() | {"noise": "kept"}) as kept:
        keep_context(results, verifier)
        for start in range(0, bench.number, BATCH):
            noise = torch.randn(BATCH, stages, *bench.model.latent_shape, generator=random)
            samples = [Sample(str(start + i), image, content=str(start + i)) for i in range(BATCH)]
            trails = [(Tried(notes=(), noise=tuple(each)),) for each in noise]
            judged = [
                Judged(sample, Verdicts.of([]), each[-1], trail=trail)
                for sample, each, trail in zip(samples, noise, trails, strict=True)
            ]
            sizes = {"width": width, "height": height, "size": 0, "mtime_ns": 0}
            verdict = {"present": False, "shows": True, "residual": None, "status": "converged"}
            kept.extend(
                [{"sample_id": sample.id, "content": sample.content} | sizes | verdict for sample in samples],
                list(map(tensors_of, judged)),
            )
    files = results.with_name(f"{results.name}.tensors").glob("*.blocks")
    return sum(file.stat().st_size for file in files) / bench.number


@experiment(4000, drawing=False)
@click.option("--keys", "numbers", type=int, multiple=True, default=[1, 1000, 5000], show_default=True)
@click.option("--rounds", default=4, show_default=True)
def main(bench: Bench, numbers: tuple[int, ...], rounds: int) -> None:
    """Time of a further audit against the number of keys."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "kept.jsonl"
        size, rings = store(bench, results), [keys_of(bench, number) for number in numbers]
        taken, tables = [], [Path(folder) / f"{number}.parquet" if number > 1 else None for number in numbers]
        for turn in range(rounds):
            taken.append([])
            for number, ring, table in zip(numbers, rings, tables, strict=True):
                if table:
                    table.unlink(missing_ok=True)
                started = time.process_time()
                counts = reaudit(results, ring, Path(folder) / f"{turn}-{number}.jsonl", table=table)
                taken[-1].append((time.process_time() - started) / counts.images)
        written = [pq.read_metadata(table).num_rows if table else None for table in tables]
    seconds = np.median(taken[1:] or taken, 0)
    rows = [
        {
            "keys": number,
            "ms an image": float(s) * 1000,
            "images a second": 1 / float(s),
            "first ms": first * 1000,
            "rows of the table": count,
        }
        for number, s, first, count in zip(numbers, seconds, taken[0], written, strict=True)
    ]
    for row in rows:
        click.echo(line(row))
    bench.write(rows, rounds=rounds, bytes=size, batch=BATCH, calibration=bench.calibration_used)
