"""Time to test recovered noise for many keys.

    python -m scripts.experiments keys -o build/keys                   # 10 minutes
    python -m scripts.experiments keys -o build/small -n 2 --keys 1 --keys 10 --rounds 1

For each number of keys, one stage's detector with the model's own calibration judges white noise: `-n` images at once,
and one. A judgement ends with the best verdict. Times are medians of rounds that take all numbers of keys in turn,
processor time of this process. The first judgement, which also expands the keys and tests the unmarked images for them,
is timed by itself, and so are opening a folder of these keys, if there are at most 1000, and a search of one image for
them, if there are at most 100. Memory is what the process has grown by.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch

from ringmark.data.images import Sample, from_array
from ringmark.inversion.decoder import INVERTERS
from ringmark.inversion.memory import memory_kilobytes
from ringmark.inversion.recover import Recovered
from ringmark.watermark.detect.detector import Detector, Seen
from ringmark.watermark.detect.search import Search
from ringmark.watermark.detect.verdict import Judged
from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.keys.folder import load_folder
from ringmark.watermark.keys.key import SECRET_BYTES, Key
from ringmark.watermark.null import Null
from scripts.experiments.common import Bench, experiment, line

FILES = 1000  # the largest folder that is written and opened
SEARCHED = 100  # the most keys that are searched for


def keys_of(bench: Bench, number: int) -> list[Key]:
    """Keys of the default placement, with secrets from the seed."""
    rng, first = np.random.default_rng(bench.seed), bench.key(seed=bench.seed)
    return [Key(first.metadata, rng.bytes(SECRET_BYTES)) for _ in range(number)]


def recovered(bench: Bench, number: int) -> tuple[list[Sample], Recovered]:
    """Samples of noise as their pixels, with white noise as what is recovered of them."""
    random = torch.Generator().manual_seed(bench.seed)
    images = torch.rand(number, 3, *bench.model.image_size, generator=random) * 2 - 1
    noise = torch.randn(number, *bench.model.latent_shape, generator=random)
    solution = INVERTERS["encoder"](bench.model, images)
    samples = [Sample(str(i), from_array(image.numpy())) for i, image in enumerate(images)]
    return samples, Recovered(images=images, solution=solution, noise=noise, seconds=0.0)


def seconds(detector: Detector, samples: Sequence[Sample], found: Recovered) -> float:
    """Processor time of a judgement, up to the best verdict on each image."""
    started = time.process_time()
    for sample, verdicts, noise in zip(samples, detector.judge(samples, Seen.of(found)), found.noise, strict=True):
        assert Judged(sample, verdicts, noise).best.key
    return time.process_time() - started


def opening(bench: Bench, keys: Sequence[Key]) -> float | None:
    """Processor time to read a folder of these keys and make a verifier; None if there are too many."""
    if len(keys) > FILES:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for key in keys:
            key.save(Path(folder) / f"{key.fingerprint}.key")
        started = time.process_time()
        Verifier(bench.recoverer, list(load_folder(Path(folder)).values()), calibration=bench.calibration)
        return time.process_time() - started


def searching(bench: Bench, detector: Detector, samples: Sequence[Sample]) -> float | None:
    """Processor time of a search; None if there are too many keys."""
    if len(detector.schemes) > SEARCHED:
        return None
    started = time.process_time()
    Search()(bench.model, detector.schemes, samples)
    return time.process_time() - started


@experiment(8, drawing=False)
@click.option("--keys", "numbers", type=int, multiple=True, default=[10**k for k in range(6)], show_default=True)
@click.option("--rounds", default=9, show_default=True)
def main(bench: Bench, numbers: tuple[int, ...], rounds: int) -> None:
    """Time an image against the number of keys."""
    batch, single = recovered(bench, bench.number), recovered(bench, 1)
    null, rows, detectors = Null.of_model(bench.model), [], []
    for number in numbers:
        keys = keys_of(bench, number)
        before, opened = memory_kilobytes("VmRSS"), opening(bench, keys)
        detector = Detector(keys, null=null, calibration=bench.calibration)
        first = seconds(detector, *single)
        grown = (memory_kilobytes("VmRSS") - before) / 1024
        detectors.append(detector)
        searched = searching(bench, detector, single[0])
        rows.append({"keys": number, "open s": opened, "first s": first, "memory MB": grown, "search s": searched})
    taken = [
        [(seconds(each, *batch) / bench.number, seconds(each, *single)) for each in detectors] for _ in range(rounds)
    ]
    for row, (of_batch, of_single) in zip(rows, np.median(taken, 0) * 1000, strict=True):
        row |= {f"ms an image, {bench.number} at once": float(of_batch), "ms an image, alone": float(of_single)}
        click.echo(line(row))
    references = bench.calibration.n if bench.calibration else 0
    bench.write(rows, rounds=rounds, references=references, calibration=bench.calibration_used)
