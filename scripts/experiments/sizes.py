"""Does a null that was measured at one size hold at others? False positives in pictures of other sizes.

    python -m scripts.experiments sizes -o build/sizes --steps 4 --guidance 1                   # 7 minutes of one core
    python -m scripts.experiments sizes -o build/sizes -n 20 --own 20 --keys 2 --size 64x64 --steps 2

Unmarked pictures of the model's own size give a calibration, from the encoder's latents and as many steps as they were
drawn in. Pictures of each other size are tested for `--keys` keys of the patterns *rand* and *ring* and for the one key
*zeros*, all in the default placement, under two nulls: the calibration's, carried over by frequency and without its
mean (`Null.at`), and white noise. The rows of the own size are the calibration's own pictures, cross-fitted. Noise is
recovered once for each picture, so more keys cost almost nothing.

Rates are means over keys; their intervals are bootstraps over images, since all keys are tested on the same ones.
"""

from __future__ import annotations

import click
import numpy as np
from scipy import stats
from torch import Tensor

from ringmark.inversion.decoder import INVERTERS
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.keys.key import Key
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.base import scheme_of
from ringmark.watermark.tasks.draw import prompts_for
from scripts.experiments.common import Bench, experiment, line
from scripts.experiments.false_positives import LEVELS, bootstrap

APART = 10_000  # seeds between sizes


def noise_of(bench: Bench, size: tuple[int, int], offset: int, number: int) -> Tensor:
    """Noise (N, C, h, w) recovered from unmarked pictures (H, W)."""
    first, name = bench.first + APART * offset, "{1}x{0}".format(*size)
    start = initial_noise(list(range(first, first + number)), bench.model.noise_shape(size))
    images = bench.draw(start, prompts_for([], number, first), name).images
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


@experiment(number=300)
@click.option("--own", default=144, show_default=True, help="Pictures of the model's own size, for the calibration.")
@click.option("--size", "sizes", multiple=True, default=("160x96", "192x192"), help="Width x height, repeated.")
@click.option("--keys", "each", default=10, show_default=True, help="Keys of each pattern.")
def main(bench: Bench, own: int, sizes: tuple[str, ...], each: int) -> None:
    """False positives at other sizes than the calibration's."""
    settings = Recoverer(bench.model, INVERTERS["encoder"], bench.steps).settings.as_dict()
    known = noise_of(bench, bench.model.image_size, 0, own)
    calibration = Calibration.measure(known, settings, {"drawn": own})
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
    bench.write(rows, calibration=calibration.fingerprint)
