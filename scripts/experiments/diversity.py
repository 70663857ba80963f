"""How much more alike are two pictures that carry the same key?

    python -m scripts.experiments diversity -o build/diversity      # 25 minutes of one core
    python -m scripts.experiments diversity -n 4 --keys 2 --steps 4 -o build/small

For each of n prompts, two pictures are drawn from different noise, unmarked and with the same key in each of several
placements. Low rings of the noise fix a picture's layout, so pictures that share them are more alike. The distance of
two pictures is the root mean square difference of their pixels in grey levels, after both are reduced to 16x16 pixels.

A row per placement: the mean distance of two pictures of the same prompt and key, and its ratio to that of the unmarked
pictures drawn from the same noise; the same for two pictures of the same key and different prompts. Intervals are 95 %
bootstrap intervals over pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import numpy as np
from torch import Tensor
from torch.nn import functional

from scripts.experiments.common import Bench, experiment, mark_in_turn
from scripts.experiments.placement import RESAMPLES, limited, setting
from scripts.experiments.plots import intervals, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REDUCED = 16
UNMARKED = "unmarked"


def distances(first: Tensor, second: Tensor) -> np.ndarray:
    """The distance (n,) of each pair of images (n, 3, H, W) in [-1, 1], in grey levels."""
    small = (functional.interpolate(images, size=REDUCED, mode="area") for images in (first, second))
    difference: Tensor = next(small) - next(small)
    return difference.square().mean((1, 2, 3)).sqrt().numpy() * 127.5


def compared(found: np.ndarray, unmarked: np.ndarray, name: str, seed: int) -> dict[str, float]:
    """The mean of distances (n,), and the ratio of the means to that of the same pairs `unmarked`."""
    draws = np.random.default_rng(seed).integers(len(found), size=(RESAMPLES, len(found)))
    low, high = np.quantile(found[draws].mean(1) / unmarked[draws].mean(1), (0.025, 0.975))
    ratio = found.mean() / unmarked.mean()
    columns = {"distance": found.mean(), "ratio": ratio, "low": low, "high": high}
    return {f"{name} {column}": float(value) for column, value in columns.items()}


def rows_of(images: dict[str, Tensor], shares: dict[str, float], keys: int, seed: int) -> list[dict]:
    """A row per placement, from its images (2n, 3, H, W): n prompts, then the same prompts again."""
    rows, bases = [], {}
    for name, both in images.items():
        first, second = both.chunk(2)
        row: dict = {"mark": name, "pairs": len(first), "altered": shares.get(name, 0.0)}
        for column, other in (("same prompt", second), ("another prompt", second.roll(-keys, 0))):
            found = distances(first, other)
            row |= compared(found, bases.setdefault(column, found), column, seed)
        rows.append(row)
    return rows


def figure_of(rows: list[dict]) -> Figure:
    """The ratio by placement."""
    figure, (ax,) = panels(7, 4)
    for k, name in enumerate(("same prompt", "another prompt")):
        at = np.arange(len(rows)) + 0.15 * (k - 0.5)
        intervals(ax, at, rows, f"{name} ratio", f"{name} low", f"{name} high", fmt="o", label=name)
    ax.axhline(1, color="grey", lw=0.8)
    ax.set(ylabel="distance of two pictures, unmarked = 1", ylim=(0, 1.1))
    ax.set_xticks(range(len(rows)), [row["mark"] for row in rows], fontsize=8, rotation=20)
    ax.legend(frameon=False, fontsize=8)
    return figure


@experiment(64)
@click.option("--keys", "key_count", default=8, show_default=True, help="Keys of the images; divides their number.")
def main(bench: Bench, key_count: int) -> None:
    """How much more alike two pictures with the same key are."""
    if bench.number % key_count:
        raise click.BadParameter(f"{key_count} keys do not divide {bench.number} images", param_hint="--keys")
    keys, tried, shares = setting(bench, key_count)
    noise, prompts = bench.fresh(2 * bench.number)
    twice = prompts[: bench.number] * 2
    images = {UNMARKED: bench.draw(noise, twice, UNMARKED).images}
    for name, bands in tried.items():
        images[name] = bench.draw(mark_in_turn([limited(key, bands) for key in keys], noise), twice, name).images
    rows = rows_of(images, shares, key_count, bench.seed)
    for row in rows:
        click.echo(summary(row))
    bench.write(rows, figure_of(rows))


def summary(row: dict) -> str:
    """A row as text."""
    parts = [
        f"{name} {row[f'{name} ratio']:.3f} [{row[f'{name} low']:.3f}, {row[f'{name} high']:.3f}]"
        for name in ("same prompt", "another prompt")
    ]
    return f"{row['mark']:14} {row['altered']:.3f}  " + ", ".join(parts)
