"""Time of an audit with and without threads that read beside the computation.

    python -m scripts.experiments reading -o build/reading             # 10 minutes
    python -m scripts.experiments reading -o build/small -n 2 --rounds 1 --side 256

`-n` pictures of noise, smoothed so that they compress as photographs do, are audited for one key with one thread of
computation and 0, 1 and 2 workers: PNG of the model's size, and PNG and JPEG with a longer side of `--side` pixels. All
pictures are unmarked. Seconds are medians of rounds that take all rows in turn; the clock's, and this process's, which
counts all threads. On a busy machine only the latter mean something.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.tasks.audit import audit_pictures, find_pictures
from scripts.experiments.common import Bench, experiment, line

WORKERS = (0, 1, 2)


def draw(folder: Path, bench: Bench, size: tuple[int, int], suffix: str) -> Path:
    """A folder of smooth pictures (W, H)."""
    folder.mkdir()
    rng = np.random.default_rng(bench.seed)
    for number in range(bench.number):
        coarse = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
        picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.{suffix}", quality=90)
    return folder


@experiment(24, drawing=False)
@click.option("--side", default=2048, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(bench: Bench, side: int, rounds: int) -> None:
    """Time of an audit against the number of workers."""
    torch.set_num_threads(1)
    verifier = Verifier(bench.recoverer, [bench.key(seed=bench.seed)], calibration=bench.calibration)
    native, large = bench.model.image_size[::-1], (side, side * 3 // 4)
    with tempfile.TemporaryDirectory() as folder:
        kinds = {
            f"{size[0]}x{size[1]} {suffix}": draw(Path(folder) / f"{size[0]}-{suffix}", bench, size, suffix)
            for size, suffix in ((native, "png"), (large, "png"), (large, "jpg"))
        }
        settings = [(name, workers) for name in kinds for workers in WORKERS]
        taken = np.empty((rounds, len(settings), 2))
        for turn in range(rounds):
            for i, (name, workers) in enumerate(settings):
                results = Path(folder) / f"{turn}-{i}.jsonl"
                started = np.array([time.perf_counter(), time.process_time()])
                audit_pictures(verifier, find_pictures([kinds[name]]), results, workers=workers)
                taken[turn, i] = np.array([time.perf_counter(), time.process_time()]) - started
    seconds = np.median(taken, 0) / bench.number
    rows = [
        {"pictures": name, "workers": workers, "s an image": float(clock), "processor s an image": float(own)}
        for (name, workers), (clock, own) in zip(settings, seconds, strict=True)
    ]
    for row in rows:
        click.echo(line(row))
    bench.write(rows, rounds=rounds, calibration=bench.calibration_used)
