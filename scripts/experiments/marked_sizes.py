"""How well are marks found in pictures of other sizes than the model's own?

    python -m scripts.experiments marked_sizes -o build/marked-sizes    # 20 minutes of one core
    python -m scripts.experiments marked_sizes -o build/small -n 2 --size 64x64 --steps 4

One key marks pictures of each size, drawn from new seeds, clean and under each `--attack`. Each is read at the size at
which it was drawn, by the default inversion and the null of the model's calibration at that size. Found: p ≤ 0.001 for
one key. How often unmarked pictures of other sizes are called marked is measured by `sizes`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import numpy as np
import torch
from torch import Tensor

from ringmark.inversion.sizes import Size
from ringmark.watermark.attacks.chains import Chain
from ringmark.watermark.embed import generate
from ringmark.watermark.keys.key import Key
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.base import scheme_of
from ringmark.watermark.statistics import ALPHA
from ringmark.watermark.tasks.draw import prompts_for
from scripts.experiments.common import SEED, Bench, attack_option, eight_bit, experiment, line, score_and_p, share
from scripts.experiments.plots import intervals, legend_below, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = ("128x128", "160x96", "192x192", "64x64")
APART = 10_000  # seeds between sizes


def drawn(bench: Bench, key: Key, size: Size, first: int) -> Tensor:
    """Marked images (N, 3, H, W) of this size, rounded to 8 bits."""

    def make(prompts: list[str], seeds: list[int]) -> dict[str, Tensor]:
        settings = {"key": key, "size": size, "steps": bench.steps, "guidance": bench.guidance}
        return {
            "images": eight_bit(torch.stack([one.image for one in generate(bench.model, prompts, seeds, **settings)]))
        }

    prompts, seeds = prompts_for([], bench.number, first), list(range(first, first + bench.number))
    cache = ["drawn at", key.fingerprint, *size, bench.steps, bench.guidance]
    return bench.batches(cache, make, prompts, seeds, name="draw")["images"]


def null_of(bench: Bench, shape: tuple[int, int, int]) -> Null:
    """The calibration's null for latents of this shape, or the model's if there is no calibration."""
    return bench.calibration.null_at(shape) if bench.calibration else Null.of_model(bench.model, shape)


def figure_of(rows: list[dict]) -> Figure:
    """The share found by size, for each attack, with its interval."""
    figure, (ax,) = panels(7, 4)
    sizes, attacks = (list(dict.fromkeys(row[name] for row in rows)) for name in ("size", "attack"))
    for number, attack in enumerate(attacks):
        chosen = [row for row in rows if row["attack"] == attack]
        x = np.arange(len(sizes)) + 0.15 * (number - (len(attacks) - 1) / 2)
        intervals(ax, x, chosen, "share", "low", "high", fmt="o", ms=4, capsize=3, label=attack)
    ax.set_xticks(range(len(sizes)), sizes)
    ax.set(ylim=(-0.03, 1.03), xlabel="size, width x height", ylabel=f"found at p ≤ {ALPHA:g}")
    legend_below(figure, len(attacks))
    return figure


@experiment(32, seed=80_000)
@click.option("--size", "sizes", multiple=True, default=SIZES, help="Width x height, repeated.")
@attack_option("jpeg:25")
def main(bench: Bench, sizes: tuple[str, ...], attacks: dict[str, Chain | None]) -> None:
    """Marked pictures found at other sizes than the model's own."""
    key, rows = bench.key(seed=SEED), []
    for i, name in enumerate(sizes):
        width, height = map(int, name.split("x"))
        shape = bench.model.noise_shape((height, width))
        images, null = drawn(bench, key, (height, width), bench.first + APART * i), null_of(bench, shape)
        for attack, chain in attacks.items():
            noise = bench.noise_of(bench.attacked(images, chain), f"{name}, {attack}")
            p = score_and_p(scheme_of(key, shape), null, noise)[1]
            found = share(int((p <= ALPHA).sum()), len(p))
            spread = {"median p": float(np.median(p)), "largest p": float(p.max())}
            rows.append({"size": name, "attack": attack} | spread | found)
            click.echo(line(rows[-1]))
    bench.write(rows, figure_of(rows), calibration=bench.calibration_used)
