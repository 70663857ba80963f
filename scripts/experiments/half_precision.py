"""Whether noise recovered in half precision has the null of float32.

    python -m scripts.experiments half_precision -o build/half                         # 5 minutes of one core
    python -m scripts.experiments half_precision -o build/small -n 20 --keys 3 --steps 4

Noise of `-n` unmarked drawn images is recovered in float32 and in `--half`, for each stage of a verdict. The null of a
stage is measured on its float32 noise. The power of each channel and ring up to the calibration's reach is compared,
and log₁₀ p of `--keys` keys: its mean change with a 95 % bootstrap interval over images, the largest mean change of an
image, and the largest change of an image and key.
"""

from __future__ import annotations

from dataclasses import replace

import click
import numpy as np

from ringmark.inversion.recover import Recoverer
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.cascade import early_stages
from scripts.experiments.cascade import calibration_of, p_values, recovered
from scripts.experiments.common import Bench, experiment, line
from scripts.experiments.false_positives import bootstrap


def stages_of(bench: Bench) -> list[Recoverer]:
    """The stages of a verdict by this bench's model, the cheapest first."""
    return [*early_stages(bench.recoverer), bench.recoverer]


def power_ratio(half: Calibration, full: Calibration) -> np.ndarray:
    """Power of noise in half precision by that in float32 (R, C), on the rings up to the calibration's reach."""
    powers = [np.diagonal(each.power.mean(0), axis1=1, axis2=2)[: full.reach + 1] for each in (half, full)]
    return powers[0] / powers[1]


def row_of(steps: int, change: np.ndarray, ratio: np.ndarray, seed: int) -> dict:
    """A row from the changes of log₁₀ p (n, K) and the ratios of power (R, C)."""
    of_images = change.mean(1)
    low, high = bootstrap(of_images, seed)
    return {
        "steps": steps,
        "images": change.shape[0],
        "keys": change.shape[1],
        "power, largest change": float(np.abs(ratio - 1).max()),
        "log10 p, mean change": float(change.mean()),
        "low": low,
        "high": high,
        "largest of an image": float(np.abs(of_images).max()),
        "largest of an image and key": float(np.abs(change).max()),
    }


@experiment(24)
@click.option("--keys", "key_count", default=200, show_default=True)
@click.option("--half", default="bfloat16", show_default=True, type=click.Choice(["bfloat16", "float16"]))
def main(bench: Bench, key_count: int, half: str) -> None:
    """Power and p of noise recovered in half precision, against float32."""
    images = bench.draw(*bench.fresh(bench.number)).images
    keys = [bench.key(seed=[bench.seed, i]) for i in range(key_count)]
    benches = [replace(bench, dtype=dtype) for dtype in ("float32", half)]
    (full, noises), (_, rounded) = (
        (stages, recovered(each, stages, images, str(each.model.dtype))[0])
        for each in benches
        for stages in [stages_of(each)]
    )
    rows = []
    for stage, noise, noise_half in zip(full, noises, rounded, strict=True):
        null = calibration_of(stage, noise)
        ratio = power_ratio(calibration_of(stage, noise_half), null)
        change = np.log10(p_values(null, keys, noise_half)) - np.log10(p_values(null, keys, noise))
        rows.append(row_of(stage.steps, change, ratio, bench.seed))
        click.echo(line(rows[-1], 4))
    bench.write(rows, half=half)
