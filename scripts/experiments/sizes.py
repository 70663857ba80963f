"""Does a null that was measured at one size hold at others? False positives in pictures of other sizes.

    python -m scripts.experiments sizes -o build/sizes --steps 3  # 3 minutes of one core
    python -m scripts.experiments sizes -o build/sizes -n 20 --own 20 --keys 2 --size 64x64 --steps 2

Unmarked pictures, here procedural scenes painted at each size, are inverted by the encoder and a few DDIM steps. Those
of the model's own size give a calibration. Those of other sizes are tested for `--keys` keys of the patterns *rand* and
*ring* and for the one key *zeros*, all in the default placement, under two nulls: the calibration's, carried over by
frequency and without its mean (`Null.at`), and white noise. The rows of the own size are the calibration's own
pictures, cross-fitted. Noise is recovered once for each picture, so more keys cost almost nothing.

Rates are means over keys; their intervals are bootstraps over images, since all keys are tested on the same ones.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import click
import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ringmark.data.scenes import scene
from ringmark.inversion.decoder import INVERTERS
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.keys.key import Key
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.base import scheme_of
from scripts.experiments.common import Bench, experiment, line
from scripts.experiments.false_positives import LEVELS, bootstrap
from scripts.experiments.plots import columns, intervals, legend_below, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = ("160x96", "192x192", "64x64")
APART = 10_000  # seeds between sizes


def painted(seed: int, size: tuple[int, int]) -> Tensor:
    """The middle (3, H, W) of a square scene, in [-1, 1]."""
    side, (height, width) = max(size), size
    top, left = (side - height) // 2, (side - width) // 2
    pixels = scene(seed, side).pixels[top : top + height, left : left + width]
    return torch.from_numpy(pixels).movedim(-1, 0) / 127.5 - 1


def noise_of(bench: Bench, size: tuple[int, int], offset: int, number: int) -> Tensor:
    """Noise (N, C, h, w) recovered from unmarked pictures (H, W)."""
    first, name = bench.first + APART * offset, "{1}x{0}".format(*size)
    images = torch.stack([painted(first + i, size) for i in range(number)])
    return bench.recover(bench.invert(INVERTERS["encoder"], images, name).latents, name)


def families(bench: Bench, number: int) -> dict[str, list[Key]]:
    """Keys of each pattern in the default placement. All keys *zeros* are the same."""
    numbers = {"rand": number, "ring": number, "zeros": 1}
    return {
        pattern: [bench.key(seed=[bench.seed, i], pattern=pattern) for i in range(count)]
        for pattern, count in numbers.items()
    }


def p_values(key: Key, null: Null, noise: Tensor) -> np.ndarray:
    """p (N,) of recovered noise (N, C, h, w) for a key under a null."""
    test = scheme_of(key, tuple(noise.shape[1:])).on(null)
    return 10 ** test.log10_p(test.score(test.observe(noise)))


def own_p_values(key: Key, calibration: Calibration) -> np.ndarray:
    """p (N,) of the calibration's own pictures, each under the null of the others."""
    scheme = scheme_of(key, calibration.latent_shape)
    scores = calibration.reference_scores(scheme)
    return 10 ** scheme.on(calibration.null).log10_p(scores, scores)


def row_of(about: dict, p: np.ndarray, seed: int) -> dict:
    """The rates of p (keys, N) at LEVELS with their intervals, and the least of the keys' p-values of uniformity."""
    row = about | {"keys": len(p), "images": p.shape[1]}
    for level in LEVELS:
        low, high = bootstrap((p <= level).mean(0), seed)
        row |= {f"{level:g}": float((p <= level).mean()), f"{level:g} low": low, f"{level:g} high": high}
        row |= {f"{level:g} worst": float((p <= level).mean(1).max())}
    return row | {"KS p least": min(float(stats.kstest(x, "uniform").pvalue) for x in p)}


def figure_of(rows: list[dict]) -> Figure:
    """The rates of *rand* and *ring* at each level by size and null, with their intervals; dashed: the level."""
    figure, axes = panels(4 * len(LEVELS), 3.6, across=len(LEVELS))
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    series = product(("rand", "ring"), ("calibrated", "white"))
    for number, (pattern, null) in enumerate(series):
        of_null = [row | {"x": sizes.index(row["size"]) + 0.12 * number - 0.18} for row in rows]
        of_null = [row for row in of_null if (row["pattern"], row["null"]) == (pattern, null)]
        for ax, level in zip(axes, LEVELS, strict=True):
            (x,), name = columns(of_null, "x"), f"{level:g}"
            intervals(ax, x, of_null, name, f"{name} low", f"{name} high", fmt="o", ms=3, label=f"{pattern}, {null}")
    for ax, level in zip(axes, LEVELS, strict=True):
        ax.axhline(level, color="black", lw=1, ls="--")
        ax.set(xticks=range(len(sizes)), xticklabels=sizes, title=f"p ≤ {level:g}", ylabel="share of unmarked pictures")
    legend_below(figure, 4)
    return figure


@experiment(number=300, drawing=False)
@click.option("--steps", default=4, show_default=True, help="DDIM steps.")
@click.option("--own", default=144, show_default=True, help="Pictures of the model's own size, for the calibration.")
@click.option("--size", "sizes", multiple=True, default=SIZES, help="Width x height, repeated.")
@click.option("--keys", "each", default=10, show_default=True, help="Keys of each pattern.")
def main(bench: Bench, own: int, sizes: tuple[str, ...], each: int) -> None:
    """False positives at other sizes than the calibration's."""
    settings = Recoverer(bench.model, INVERTERS["encoder"], bench.steps).settings.as_dict()
    known = noise_of(bench, bench.model.image_size, 0, own)
    calibration = Calibration.measure(known, settings, {"given": own})
    keys, rows = families(bench, each), []
    for pattern, some in keys.items():
        about = {"size": "{1}x{0}".format(*bench.model.image_size), "pattern": pattern, "null": "calibrated"}
        rows.append(row_of(about, np.stack([own_p_values(key, calibration) for key in some]), bench.seed))
    for i, size in enumerate(sizes, 1):
        width, height = map(int, size.split("x"))
        noise = noise_of(bench, (height, width), i, bench.number)
        shape = bench.model.noise_shape((height, width))
        for name, null in (("calibrated", calibration.null.at(shape)), ("white", Null.white(shape))):
            for pattern, some in keys.items():
                about = {"size": size, "pattern": pattern, "null": name}
                rows.append(row_of(about, np.stack([p_values(key, null, noise) for key in some]), bench.seed))
    for row in rows:
        click.echo(line(row))
    bench.write(rows, figure_of(rows), calibration=calibration.fingerprint)
