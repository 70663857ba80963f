"""How many steps the sampler inversion of the last stage needs.

    ringmark generate --no-mark -n 240 --seed 200000 -o build/unmarked
    python -m scripts.experiments steps build/unmarked -o build/steps                       # half an hour of one core
    python -m scripts.experiments steps build/unmarked -o build/small -n 2 --count 2 --count 10 --attack jpeg:25

`-n` images are drawn, marked with `--keys` keys in turn, and tested by the last stage alone, clean and under each
`--attack`. The decoder is inverted once for each image, then the sampler in each `--count` of steps. The unmarked
images of the folder give the null for each count. Found are the images with p ≤ α; the difference from what the default
number of steps finds is paired, with a 95 % bootstrap interval over images.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from torch import Tensor

from ringmark.data.sources import find_images
from ringmark.inversion.decoder import INVERTERS
from ringmark.inversion.recover import STEPS, Recoverer
from ringmark.watermark.attacks.chains import Chain
from ringmark.watermark.figures import COLOURS
from ringmark.watermark.schemes.base import scheme_of
from ringmark.watermark.statistics import ALPHA
from scripts.experiments.cascade import SIX, calibration_of, p_values
from scripts.experiments.common import Bench, attack_option, experiment, mark_in_turn, read_pictures, share
from scripts.experiments.false_positives import bootstrap
from scripts.experiments.plots import columns, legend_below, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def noises(bench: Bench, recoverers: dict[int, Recoverer], images: Tensor, name: str) -> dict[int, Tensor]:
    """The noise (n, C, h, w) of images (n, 3, H, W), by number of steps."""

    def make(latents: Tensor) -> dict[str, Tensor]:
        return {str(count): recoverer.noise(latents) for count, recoverer in recoverers.items()}

    latents = bench.invert(INVERTERS["operator"], images, name).latents
    found = bench.batches(["steps", *recoverers], make, latents, name=f"{name}: noise")
    return {count: found[str(count)] for count in recoverers}


def rows_of(condition: str, p: dict[int, np.ndarray], seed: int) -> list[dict]:
    """A row for each number of steps, from the p-values (n,) of marked images; one is the default number."""
    usual = (p[STEPS] <= ALPHA).astype(float)
    rows = []
    for count, values in p.items():
        difference = (values <= ALPHA) - usual
        low, high = bootstrap(difference, seed) if np.ptp(difference) else (float(difference[0]),) * 2
        row = {"condition": condition, "steps": count, "median log10 p": float(np.median(np.log10(values)))}
        row |= share((values <= ALPHA).sum(), len(values))
        rows.append(row | {"difference": difference.mean(), "difference low": low, "difference high": high})
    return rows


def figure_of(rows: list[dict]) -> Figure:
    """Median p and the share found against the number of steps."""
    figure, axes = panels(10, 3.8, across=2)
    for i, condition in enumerate(dict.fromkeys(row["condition"] for row in rows)):
        own = [row for row in rows if row["condition"] == condition]
        for ax, column in zip(axes, ("median log10 p", "share"), strict=True):
            style = "o-" if i < len(COLOURS) else "s--"
            ax.plot(*columns(own, "steps", column), style, color=COLOURS[i % len(COLOURS)], label=condition)
            ax.set(xlabel="steps", ylabel=column if column != "share" else f"share with p ≤ {ALPHA:g}")
            ax.set_xticks([row["steps"] for row in own])
    legend_below(figure, 4)
    return figure


@experiment(100)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--keys", "key_count", default=5, show_default=True, help="Keys of the marked images.")
@click.option(
    "--count", "counts", multiple=True, type=click.IntRange(1), default=(5, 8, STEPS, 15, 25), show_default=True,
    help="Steps of the sampler inversion; may be repeated.",
)  # fmt: skip
@attack_option(*SIX)
def main(bench: Bench, folder: Path, key_count: int, counts: tuple[int, ...], attacks: dict[str, Chain | None]) -> None:
    """What the last stage finds by its number of steps."""
    recoverers = {count: Recoverer(bench.model, steps=count) for count in sorted({*counts, STEPS})}
    paths = find_images(folder)
    nulls = {
        count: calibration_of(recoverers[count], noise)
        for count, noise in noises(bench, recoverers, read_pictures(paths, bench.model.image_size), "unmarked").items()
    }
    keys = [bench.key(seed=[bench.seed, i]) for i in range(key_count)]
    start, prompts = bench.fresh(bench.number)
    marked = bench.draw(mark_in_turn([scheme_of(key) for key in keys], start), prompts).images
    each, rows = np.arange(bench.number), []
    for name, chain in attacks.items():
        found = noises(bench, recoverers, bench.attacked(marked, chain), name)
        p = {count: p_values(nulls[count], keys, noise)[each, each % key_count] for count, noise in found.items()}
        rows += rows_of(name, p, bench.seed)
        click.echo("\n".join(map(summary, rows[-len(p) :])))
    bench.write(rows, figure_of(rows), alpha=ALPHA, unmarked=len(paths))


def summary(row: dict) -> str:
    """A row as text."""
    return (
        f"{row['condition']:14} {row['steps']:3} steps: log10 p {row['median log10 p']:6.1f}, "
        f"{row['count']} of {row['of']} found [{row['low']:.3f}, {row['high']:.3f}]"
    )
