"""Which rings a mark should take, and in which bands it should be tested.

    python -m scripts.experiments placement --inversion-steps 5 -o build/placement      # 20 minutes of one core
    python -m scripts.experiments placement -n 8 --keys 2 --steps 4 --attack jpeg:25 -o build/small

Images are drawn with `--keys` keys whose marks take all rings up to 12 of all channels. Their noise is recovered by the
encoder, clean and under each `--attack`, and tested for every candidate: a set of bands, whose bins alone count. A
candidate that is chosen leaves the other bins alone; marked noise is white, so this does not affect the quality of a
single picture. Negatives are the same images, tested for the other keys.

A row per candidate and condition: the share of the coefficients that it alters, AUC, and the share of images found
(p ≤ α), each with its paired difference from the better of the references `4-10` and `1-5` and that difference's 95 %
bootstrap interval over images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click
import numpy as np
from torch import Tensor

from ringmark.inversion.recover import Recoverer
from ringmark.watermark.attacks.chains import Chain
from ringmark.watermark.keys.key import Key
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.fourier import Placement
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.statistics import ALPHA
from scripts.experiments.cascade import SIX
from scripts.experiments.common import Bench, attack_option, experiment, mark_in_turn
from scripts.experiments.plots import legend_below, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Bands = Sequence[Placement]
Array = np.ndarray

HIGHEST = 12
REFERENCES = ("4-10", "1-5")
RESAMPLES = 1000


def candidates(every: tuple[int, ...], best: tuple[int, ...]) -> dict[str, Bands]:
    """Bands of rings of the channels that are recovered best, or of all channels where the name says so."""
    of_best = {
        "4-10": [(4, 10)],
        "1-5": [(1, 5)],
        "1-9": [(1, 9)],
        "1-4, 5-9": [(1, 4), (5, 9)],
    }
    return {name: [Placement(best, radii) for radii in bands] for name, bands in of_best.items()} | {
        f"all {low}-3, 4-{high}": [Placement(every, (low, 3)), Placement(best, (4, high))]
        for low, high in ((1, 9), (2, 9), (2, 10))
    }


def limited(key: Key, bands: Bands) -> TreeRing:
    """The mark of a key, tested in these bands only."""
    return TreeRing(Key(key.metadata | {"bands": [band.fields for band in bands]}, key.secret))


def setting(bench: Bench, key_count: int) -> tuple[list[Key], dict[str, Bands], dict[str, float]]:
    """Keys in all rings up to HIGHEST, the candidates, and the share of the coefficients that each alters."""
    shape = bench.model.latent_shape
    every = tuple(range(shape[0]))
    tried = candidates(every, bench.bands[-1].channels)
    keys = [bench.key(Placement(every, (0, HIGHEST)), seed=[bench.seed, i]) for i in range(key_count)]
    return keys, tried, {name: sum(band.share(shape) for band in bands) for name, bands in tried.items()}


def log10_p(keys: Sequence[Key], bands: Bands, null: Null, noise: Tensor) -> Array:
    """log₁₀ p (n, K) of noise (n, C, h, w) for each key."""
    tests = [limited(key, bands).on(null) for key in keys]
    observed = tests[0].observe(noise)
    return np.stack([test.log10_p(test.score(observed)) for test in tests], 1)


def of_images(p: Array, own: Array) -> tuple[Array, Array]:
    """For each image, the probability that its own p is below that of another key in any image; and whether p ≤ α.

    The mean of the first over images is the AUC. `p` (n, K) is log₁₀ p, `own` (n,) the number of the own key.
    """
    mine = np.zeros(p.shape, bool)
    mine[np.arange(len(p)), own] = True
    others = np.sort(p[~mine])
    ranks = (np.searchsorted(others, p[mine], "left") + np.searchsorted(others, p[mine], "right")) / 2
    return 1 - ranks / len(others), p[mine] <= np.log10(ALPHA)


def rows_of(attack: str, p: dict[str, Array], own: Array, shares: dict[str, float], seed: int) -> list[dict]:
    """A row per candidate, from its log₁₀ p (n, K)."""
    of = {name: of_images(values, own) for name, values in p.items()}
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(own), size=(RESAMPLES, len(own)))
    rows = []
    for name, values in of.items():
        row: dict = {"attack": attack, "bands": name, "images": len(own), "altered": shares[name]}
        for column, measure in zip(("auc", "found"), range(2), strict=True):
            best = max(REFERENCES, key=lambda each: of[each][measure].mean())
            difference = values[measure].astype(float) - of[best][measure]
            low, high = np.quantile(difference[draws].mean(1), (0.025, 0.975))
            row |= {column: float(values[measure].mean()), f"{column} difference": float(difference.mean())}
            row |= {f"{column} low": float(low), f"{column} high": float(high)}
        rows.append(row)
    return rows


def figure_of(rows: list[dict]) -> Figure:
    """AUC and share found by condition, a marker per candidate."""
    figure, axes = panels(11, 4.5, across=2)
    attacks, names = (list(dict.fromkeys(row[column] for row in rows)) for column in ("attack", "bands"))
    for ax, column in zip(axes, ("auc", "found"), strict=True):
        for k, (marker, name) in enumerate(zip("os^vD*X", names, strict=True)):
            values = [row[column] for row in rows if row["bands"] == name]
            ax.plot(np.arange(len(attacks)) + 0.1 * (k - 3), values, marker, label=name, alpha=0.8)
        ax.set(ylabel="AUC" if column == "auc" else f"share with p ≤ {ALPHA:g}", ylim=(0, 1.03))
        ax.set_xticks(range(len(attacks)), attacks, fontsize=8, rotation=30)
    legend_below(figure, len(names))
    return figure


@experiment(64)
@click.option("--keys", "key_count", default=8, show_default=True, help="Keys of the images.")
@attack_option(*SIX)
def main(bench: Bench, key_count: int, attacks: dict[str, Chain | None]) -> None:
    """Which rings a mark should take, and in which bands it should be tested."""
    keys, tried, shares = setting(bench, key_count)
    noise, prompts = bench.fresh(bench.number)
    images = bench.draw(mark_in_turn(list(map(TreeRing, keys)), noise), prompts).images
    recoverer = Recoverer.named(bench.model, "encoder", steps=bench.recoverer.steps)
    null = replace(Null.of_model(bench.model), layout_known=True)  # so that low bands are tested, as by a calibration
    own, rows = np.arange(bench.number) % key_count, []
    for name, chain in attacks.items():
        noise = recovered(bench, recoverer, bench.attacked(images, chain), name)
        p = {label: log10_p(keys, bands, null, noise) for label, bands in tried.items()}
        rows += rows_of(name, p, own, shares, bench.seed)
        for row in rows[-len(tried) :]:
            click.echo(summary(row))
    bench.write(rows, figure_of(rows), alpha=ALPHA, references=REFERENCES)


def recovered(bench: Bench, recoverer: Recoverer, images: Tensor, name: str) -> Tensor:
    """The noise (n, C, h, w) of images (n, 3, H, W)."""

    def make(some: Tensor) -> dict[str, Tensor]:
        return {"noise": recoverer(some).noise}

    return bench.batches(["placement", recoverer.settings], make, images, name=name)["noise"]


def summary(row: dict) -> str:
    """A row as text."""
    return (
        f"{row['attack']:14} {row['bands']:14} AUC {row['auc']:.3f} ({row['auc difference']:+.3f} "
        f"[{row['auc low']:+.3f}, {row['auc high']:+.3f}]), found {row['found']:.3f} ({row['found difference']:+.3f} "
        f"[{row['found low']:+.3f}, {row['found high']:+.3f}])"
    )
