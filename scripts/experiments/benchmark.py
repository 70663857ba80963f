"""What a verdict costs, and what it finds: by stages, without stages, and by a plain detector.

    ringmark generate --no-mark -n 500 --seed 100000 -o build/calibration-images
    ringmark calibrate build/calibration-images --steps 25 -o build/25-steps.safetensors
    ringmark generate --no-mark -n 200 --seed 200000 -o build/unmarked
    python -m scripts.experiments benchmark build/unmarked build/25-steps.safetensors -n 200 -o build/benchmark
    python -m scripts.experiments benchmark build/unmarked build/25-steps.safetensors -n 2 --attack jpeg:25 -o build/two

It takes an hour and a half of one core.

`-n` marked images are drawn, each with one of `--keys` keys, and judged clean and under each `--attack`; so are the
first `-n` unmarked images of the folder. There are three ways to judge them:

- stages: the verifier as `ringmark verify` uses it;
- alone: decoder inversion and as many steps as the given calibration, 25, without stages, in batches of eight;
- plain: the encoder, as many steps, and the L1 distance of arXiv 2305.20030, image by image.

The ways take turns on every batch. Times are processor seconds an image, or with `--clock` those of the clock: means,
since a walk ends early for some images and not for others, and medians over batches. Found are the images with p ≤ α;
the difference between the first two ways is paired, with a 95 % bootstrap interval over images. Plain detection has no
p-value, so only its time counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import torch
from torch import Tensor

from ringmark.data.images import Sample, from_array
from ringmark.data.sources import find_images
from ringmark.errors import CalibrationError
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.attacks.chains import Chain
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.figures import COLOURS
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.base import scheme_of
from ringmark.watermark.statistics import ALPHA
from scripts.experiments.cascade import SIX
from scripts.experiments.common import Bench, attack_option, experiment, read_pictures
from scripts.experiments.false_positives import bootstrap
from scripts.experiments.plots import legend_below, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Judge = Callable[[Tensor], list[float]]
Timer = Callable[[], float]
WAYS = ("stages", "alone", "plain")
BATCH = 8


def by_verifier(verifier: Verifier) -> Judge:
    """p-values of images (B, 3, H, W), as `ringmark verify` computes them."""

    def judge(images: Tensor) -> list[float]:
        samples = [[Sample(id=str(i), image=from_array(image.numpy()))] for i, image in enumerate(images)]
        return [judged.best.p_value for judged in verifier.scan(samples, BATCH)]

    return judge


def plainly(recoverer: Recoverer, key: Key) -> Judge:
    """L1 distances of images (B, 3, H, W), recovered one after the other."""

    def judge(images: Tensor) -> list[float]:
        noises = [recoverer(image[None]).noise for image in images]
        return [float(scheme_of(key).published(noise)["published_distance"][0]) for noise in noises]

    return judge


def ways_of(bench: Bench, key: Key, former: Calibration) -> dict[str, Judge]:
    """The ways to judge images for a key. Raises CalibrationError without a calibration of the stages."""
    calibration = bench.calibration
    if calibration is None or not calibration.earlier:
        raise CalibrationError("calibration.stages", "no calibration of the stages", subject=bench.source)
    steps = former.settings["steps"]
    long = Recoverer(bench.model, steps=steps)
    return {
        "stages": by_verifier(Verifier(bench.recoverer, [key], calibration=calibration)),
        "alone": by_verifier(Verifier(long, [key], calibration=replace(former, earlier=()))),
        "plain": plainly(Recoverer.named(bench.model, "encoder", steps=steps), key),
    }


def judged_in_turn(
    bench: Bench, key: Key, former: Calibration, images: Tensor, name: str, timer: Timer
) -> dict[str, Tensor]:
    """What each way says of images (n, 3, H, W), and its `seconds` (n, ways) an image."""
    ways = ways_of(bench, key, former)

    def make(some: Tensor) -> dict[str, Tensor]:
        said, seconds = {}, []
        for way, judge in ways.items():
            started = timer()
            said[way] = torch.tensor(judge(some), dtype=torch.float64)
            seconds.append((timer() - started) / len(some))
        return said | {"seconds": torch.tensor(seconds).expand(len(some), -1)}

    used = ["benchmark", timer.__name__, bench.calibration_used, former.fingerprint, key.fingerprint]
    return bench.batches(used, make, images, name=name, batch=BATCH)


def judged_by_key(
    bench: Bench, keys: Sequence[Key], former: Calibration, images: Tensor, name: str, timer: Timer = time.process_time
) -> dict[str, Tensor]:
    """The same, with the images in as many equal parts as there are keys, each judged for its key."""
    parts = zip(keys, images.tensor_split(len(keys)), strict=True)
    tables = [judged_in_turn(bench, key, former, part, name, timer) for key, part in parts]
    return {column: torch.cat([table[column] for table in tables]) for column in tables[0]}


def row_of(name: str, table: dict[str, Tensor], seed: int) -> dict:
    """Times, their ratios and the shares found under one condition."""
    seconds = dict(zip(WAYS, table["seconds"].double().median(0).values.tolist(), strict=True))
    mean = dict(zip(WAYS, table["seconds"].double().mean(0).tolist(), strict=True))
    found = {way: (table[way] <= ALPHA).double().numpy() for way in WAYS[:2]}
    difference = found["stages"] - found["alone"]
    low, high = bootstrap(difference, seed) if np.ptp(difference) else (float(difference[0]),) * 2
    return (
        {"condition": name, "images": len(difference)}
        | {f"seconds, {way}": value for way, value in seconds.items()}
        | {f"mean seconds, {way}": value for way, value in mean.items()}
        | {"stages / alone": mean["stages"] / mean["alone"], "plain / stages": mean["plain"] / mean["stages"]}
        | {f"found, {way}": float(hits.mean()) for way, hits in found.items()}
        | {"difference": float(difference.mean()), "difference low": low, "difference high": high}
    )


def marked_images(bench: Bench, keys: Sequence[Key]) -> Tensor:
    """`-n` images in as many equal parts as there are keys, each drawn with its key."""
    noise, prompts = bench.fresh(bench.number)
    parts = [scheme_of(key).embed(part) for key, part in zip(keys, noise.tensor_split(len(keys)), strict=True)]
    return bench.draw(torch.cat(parts), prompts).images


def figure_of(rows: list[dict]) -> Figure:
    """Times and shares found, by condition."""
    figure, (left, right) = panels(10, 4, across=2)
    x, names = np.arange(len(rows)), [row["condition"] for row in rows]
    for k, way in enumerate(WAYS):
        left.bar(x + 0.27 * (k - 1), [row[f"mean seconds, {way}"] for row in rows], 0.25, color=COLOURS[k], label=way)
    for k, way in enumerate(WAYS[:2]):
        right.bar(x + 0.4 * k - 0.2, [row[f"found, {way}"] for row in rows], 0.38, color=COLOURS[k])
    left.set(ylabel="seconds an image")
    right.set(ylabel=f"share with p ≤ {ALPHA:g}", ylim=(0, 1.03))
    for ax in (left, right):
        ax.set_xticks(x, names, fontsize=8, rotation=30)
    legend_below(figure, len(WAYS))
    return figure


@experiment(200)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("former", type=click.Path(path_type=Path))
@click.option("--keys", "key_count", default=5, show_default=True, help="Keys of the marked images.")
@click.option("--clock", is_flag=True, help="Time by the clock instead of the processor, on an idle machine.")
@attack_option(*SIX)
def main(
    bench: Bench, folder: Path, former: Path, key_count: int, clock: bool, attacks: dict[str, Chain | None]
) -> None:
    """What a verdict costs and finds: by stages, without stages under the calibration FORMER, and plainly."""
    calibration = Calibration.load(former)
    keys = [bench.key(seed=[bench.seed, i]) for i in range(min(key_count, bench.number))]
    marked = marked_images(bench, keys)
    conditions = {"unmarked": read_pictures(find_images(folder)[: bench.number], bench.model.image_size)}
    conditions |= {name: bench.attacked(marked, chain) for name, chain in attacks.items()}
    rows, timer = [], time.perf_counter if clock else time.process_time
    for name, images in conditions.items():
        rows.append(row_of(name, judged_by_key(bench, keys, calibration, images, name, timer), bench.seed))
        click.echo(summary(rows[-1]))
    bench.write(rows, figure_of(rows), alpha=ALPHA, calibration=bench.calibration_used)


def summary(row: dict) -> str:
    """A row as text."""
    return (
        f"{row['condition']:14} stages / alone {row['stages / alone']:.2f}, "
        f"plain / stages {row['plain / stages']:.1f}, "
        f"found {row['found, stages']:.3f} and {row['found, alone']:.3f}, difference {row['difference']:+.3f} "
        f"[{row['difference low']:+.3f}, {row['difference high']:+.3f}]"
    )
