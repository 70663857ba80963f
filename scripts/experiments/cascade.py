"""What the early stages of a verdict save, and whether p stays valid with them.

    ringmark generate --no-mark -n 1000 --seed 200000 -o build/unmarked
    python -m scripts.experiments cascade build/unmarked -o build/cascade                   # 2 hours of one core
    python -m scripts.experiments cascade build/unmarked -o build/small -n 2 --keys 2 --steps 4 --attack jpeg:25

The unmarked images of the folder are tested for `--keys` keys by halves: each half (every second image) gives the nulls
of all stages under which the other is tested. `-n` marked images, each with one of the keys, are drawn and tested under
the null of all unmarked images, clean and under each `--attack`. Noise is recovered once for each stage.

Rates are shares with p ≤ α for the walk of `detect.cascade` and for the last stage alone, which has the whole level.
Their difference is paired, with a 95 % bootstrap interval over images. For unmarked images there is a row per level:
the mean rate over the keys with a bootstrap interval over images, and the worst key. The time is the sum of the median
times of the stages that an image goes through, compared with that of the last stage alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import torch
from torch import Tensor

from ringmark.data.sources import find_images
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.attacks.chains import Chain
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.cascade import EARLY, early_stages, stage_name
from ringmark.watermark.detect.detector import Detector
from ringmark.watermark.figures import COLOURS
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.base import scheme_of
from ringmark.watermark.statistics import ALPHA
from scripts.experiments.common import Bench, attack_option, experiment, mark_in_turn, read_pictures
from scripts.experiments.false_positives import LEVELS, bootstrap
from scripts.experiments.plots import legend_below, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray
SIX = ("jpeg:25", "blur:4", "noise:0.1", "brightness:6", "crop:0.75", "rotation:75")


def walked(p: Sequence[Array], weights: Sequence[float], alpha: float = ALPHA) -> tuple[Array, Array]:
    """p of the walk and the number of stages gone through, from the p of each stage, arrays of one shape."""
    joint, stages, going = np.ones_like(p[0]), np.zeros(np.shape(p[0]), int), np.ones(np.shape(p[0]), bool)
    for number, (each, weight) in enumerate(zip(p, weights, strict=True)):
        here = np.minimum(1, each / weight)
        joint, stages = np.where(going, np.minimum(joint, here), joint), stages + going
        going = going & (joint > alpha) & ((here < 1) | (number != len(p) - 2))
    return joint, stages


def weights_of(stages: Sequence[Recoverer]) -> list[float]:
    """The weights of these stages, the last of which has what the others leave."""
    early = [EARLY[stage.steps] for stage in stages[:-1]]
    return [*early, 1 - sum(early)]


def names_of(stages: Sequence[Recoverer]) -> list[str]:
    """The names of these stages, as verdicts have them."""
    return [*(stage_name(stage.steps) for stage in stages[:-1]), "full"]


def recovered(bench: Bench, stages: Sequence[Recoverer], images: Tensor, name: str) -> tuple[list[Tensor], Tensor]:
    """Noise (n, C, h, w) of images (n, 3, H, W) at each stage, and seconds an image (n, stages)."""

    def make(some: Tensor) -> dict[str, Tensor]:
        columns, seconds = {}, []
        started = time.perf_counter()
        encoded = stages[0].encode(some)
        for number, stage in enumerate(stages):
            columns[str(number)] = stage(some, encoded).noise
            seconds.append((time.perf_counter() - started) / len(some))
            started = time.perf_counter()
        return columns | {"seconds": torch.tensor(seconds).expand(len(some), -1)}

    key = ["cascade", *(stage.settings for stage in stages)]
    columns = bench.batches(key, make, images, name=name)
    return [columns[str(number)] for number in range(len(stages))], columns["seconds"]


def p_values(calibration: Calibration, keys: Sequence[Key], noise: Tensor, *, early: bool = False) -> Array:
    """p-values (n, K) of noise (n, C, h, w) under the null of a calibration, of an `early` stage or the last."""
    detector = Detector(keys, null=calibration.null, calibration=calibration)
    detector = detector.early(calibration) if early else detector
    return np.stack([10 ** detector.statistic(key.fingerprint, noise)[1] for key in keys], 1)


def by_halves(stage: Recoverer, keys: Sequence[Key], noise: Tensor, *, early: bool = False) -> Array:
    """The same (n, K), with each half of the noise under the null of the other."""
    p = np.empty((len(noise), len(keys)))
    for half in (0, 1):
        p[half::2] = p_values(calibration_of(stage, noise[1 - half :: 2]), keys, noise[half::2], early=early)
    return p


def calibration_of(stage: Recoverer, noise: Tensor) -> Calibration:
    return Calibration.measure(noise, stage.settings.as_dict(), {"given": len(noise)})


def false_rows(p: Sequence[Array], weights: Sequence[float], names: Sequence[str], seed: int) -> list[dict]:
    """A row per stage, and one for the walk, from p (n, K) of each stage under unmarked images."""
    rows = []
    for name, values in {**dict(zip(names, p, strict=True)), "walk": walked(p, weights)[0]}.items():
        row: dict = {"attack": "unmarked", "p of": name, "images": len(values), "keys": values.shape[1]}
        for level in LEVELS:
            low, high = bootstrap((values <= level).mean(1), seed)
            row |= {f"{level:g}": float((values <= level).mean()), f"{level:g} low": low, f"{level:g} high": high}
            row |= {f"{level:g} worst": float((values <= level).mean(0).max())}
        rows.append(row)
    return rows


def found_row(attack: str, p: Sequence[Array], weights: Sequence[float], costs: Array, seed: int) -> dict:
    """The shares found (p ≤ α) by the walk and by the last stage alone, from p (n,) of each stage, and the time."""
    joint, stages = walked(p, weights)
    walk, alone = joint <= ALPHA, p[-1] <= ALPHA
    difference = walk.astype(float) - alone
    low, high = bootstrap(difference, seed) if np.ptp(difference) else (float(difference[0]),) * 2
    share = np.cumsum(costs)[stages - 1].mean() / (costs[0] + costs[-1])
    ends = {f"ends at {number}": float((stages == number).mean()) for number in range(1, len(p) + 1)}
    return {
        "attack": attack, "images": len(joint), "walk": walk.mean(), "alone": alone.mean(),
        "difference": difference.mean(), "difference low": low, "difference high": high, "time": share,
    } | ends  # fmt: skip


def figure_of(rows: list[dict]) -> Figure:
    """The shares found, and the time, by condition."""
    figure, (left, right) = panels(10, 4, across=2)
    x = np.arange(len(rows))
    for k, way in enumerate(("alone", "walk")):
        left.bar(x + 0.4 * k - 0.2, [row[way] for row in rows], 0.38, color=COLOURS[k], label=way)
    right.bar(x, [row["time"] for row in rows], 0.6, color=COLOURS[1])
    left.set(ylabel=f"share with p ≤ {ALPHA:g}", ylim=(0, 1.03))
    right.set(ylabel="time / time of the last stage alone")
    for ax in (left, right):
        ax.set_xticks(x, [row["attack"] for row in rows], fontsize=8, rotation=30)
    legend_below(figure, 2)
    return figure


@experiment(64)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--keys", "key_count", default=10, show_default=True, help="Keys that unmarked images are tested for.")
@attack_option(*SIX)
def main(bench: Bench, folder: Path, key_count: int, attacks: dict[str, Chain | None]) -> None:
    """The stages of a verdict on marked images and on the unmarked images of FOLDER."""
    stages = [*early_stages(bench.recoverer), bench.recoverer]
    weights, names = weights_of(stages), [f"{stage.steps} steps" for stage in stages]
    keys = [bench.key(seed=[bench.seed, i]) for i in range(key_count)]
    noise, seconds = recovered(bench, stages, read_pictures(find_images(folder), bench.model.image_size), "unmarked")
    costs = seconds.double().median(0).values.numpy()
    p = [
        by_halves(stage, keys, each, early=stage is not bench.recoverer)
        for stage, each in zip(stages, noise, strict=True)
    ]
    false = false_rows(p, weights, names, bench.seed)
    rows = [found_row("unmarked", [each.ravel() for each in p], weights, costs, bench.seed)]
    nulls = [calibration_of(stage, each) for stage, each in zip(stages, noise, strict=True)]
    start, prompts = bench.fresh(bench.number)
    marked = bench.draw(mark_in_turn([scheme_of(key) for key in keys], start), prompts).images
    own = np.arange(bench.number) % key_count
    for name, chain in attacks.items():
        noise, _ = recovered(bench, stages, bench.attacked(marked, chain), name)
        p = [
            p_values(null, keys, each, early=null is not nulls[-1])[np.arange(len(own)), own]
            for null, each in zip(nulls, noise, strict=True)
        ]
        rows.append(found_row(name, p, weights, costs, bench.seed))
    for row in rows:
        click.echo(summary(row))
    bench.write(rows, figure_of(rows), false=false, weights=weights, seconds=costs.tolist(), alpha=ALPHA)


def summary(row: dict) -> str:
    """A row as text."""
    return (
        f"{row['attack']:14} found {row['walk']:.3f}, alone {row['alone']:.3f}, difference {row['difference']:+.3f} "
        f"[{row['difference low']:+.3f}, {row['difference high']:+.3f}], time {row['time']:.2f}"
    )
