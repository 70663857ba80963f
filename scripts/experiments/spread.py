"""Do p-values hold for every key, deep into the tail, and not only on average over keys?

    python -m scripts.experiments spread -o build/spread                    # 2 minutes of one core
    python -m scripts.experiments spread -o build/small --keys 40

`--keys` default keys are tested on the unmarked images of the model's own calibration, at each stage of a verdict: each
image under the null of the nine tenths of the images to which it does not belong. For early stages, the images are also
split into halves (every second one), and the p-values of one half are widened by the spread of the other, as a verdict
widens them by that of all references (`statistics.inflation`). The walk is the smallest pᵢ/wᵢ over the stages.

For each level, the ratio is the share of p-values at or below the level, over all images and keys, divided by the
level, with a 95 % bootstrap interval over images. The worst keys are the hundredth of the keys with the most images at
or below the level in one half; their share is that in the other half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
import numpy as np

from ringmark.errors import CalibrationError
from ringmark.watermark.detect.cascade import calibrated_stages
from ringmark.watermark.figures import COLOURS
from ringmark.watermark.schemes.base import scheme_of
from ringmark.watermark.statistics import inflation, widened
from scripts.experiments.cascade import names_of, weights_of
from scripts.experiments.common import Bench, experiment
from scripts.experiments.false_positives import bootstrap
from scripts.experiments.plots import legend_below, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray
LEVELS = (1e-2, 1e-3, 1e-4, 1e-5)
WORST = 0.01  # the share of keys
RATED = LEVELS[:2]  # at which so few keys have enough hits
HALVES = (slice(0, None, 2), slice(1, None, 2))


def by_halves(log10_p: Array) -> Array:
    """log₁₀ p (n, K) with each half of the images widened by the spread of the other."""
    wide = np.empty_like(log10_p)
    for one, other in (HALVES, HALVES[::-1]):
        wide[one] = widened(log10_p[one], inflation(log10_p[other]))
    return wide


def walked(stages: Sequence[Array], weights: Sequence[float]) -> Array:
    """log₁₀ of the smallest p/w (n, K) over all stages, wherever the walk ends."""
    return np.min([each - np.log10(weight) for each, weight in zip(stages, weights, strict=True)], 0)


def worst_share(log10_p: Array, level: float) -> float:
    """The share at or below the level of the keys that are worst in the other half, the mean of both ways."""
    hits = log10_p <= np.log10(level)
    number = max(1, round(WORST * hits.shape[1]))
    chosen = [(np.argsort(hits[one].mean(0), kind="stable")[-number:], other) for one, other in (HALVES, HALVES[::-1])]
    return float(np.mean([hits[other][:, keys].mean() for keys, other in chosen]))


def row_of(stage: str, way: str, log10_p: Array, seed: int) -> dict:
    """Ratios and worst keys by level, from log₁₀ p (n, K)."""
    row: dict = {"stage": stage, "p": way, "images": len(log10_p), "keys": log10_p.shape[1]}
    for level in LEVELS:
        shares = (log10_p <= np.log10(level)).mean(1)
        low, high = bootstrap(shares, seed)
        row |= {f"{level:g}": shares.mean() / level, f"{level:g} low": low / level, f"{level:g} high": high / level}
    return row | {f"{level:g} worst": worst_share(log10_p, level) / level for level in RATED}


def rows_of(stages: Sequence[Array], names: Sequence[str], weights: Sequence[float], seed: int) -> list[dict]:
    """A row for each stage and the walk, with p as the null gives it and, of early stages, widened."""
    wide = [*(by_halves(each) for each in stages[:-1]), stages[-1]]
    rows = [row_of(name, "by the null", each, seed) for name, each in zip(names, stages, strict=True)]
    rows += [row_of(name, "widened", each, seed) for name, each in zip(names[:-1], wide[:-1], strict=True)]
    for way, each in (("by the null", stages), ("widened", wide)):
        rows.append(row_of("walk", way, walked(each, weights), seed))
    return rows


def figure_of(rows: list[dict]) -> Figure:
    """The ratio of all keys and of the worst, by level."""
    figure, axes = panels(10, 4, across=2)
    colours = dict(zip(dict.fromkeys(row["stage"] for row in rows), COLOURS, strict=False))
    for ax, levels, suffix in zip(axes, (LEVELS, RATED), ("", " worst"), strict=True):
        for row in rows:
            style = {
                "color": colours[row["stage"]],
                "ls": "--" if row["p"] == "widened" else "-",
                "marker": "o",
                "ms": 3,
            }
            label = f"{row['stage']}, {row['p']}" if levels is LEVELS else None
            ax.plot(levels, [row[f"{level:g}{suffix}"] for level in levels], label=label, **style)
        ax.axhline(1, color="grey", lw=0.8)
        ax.set(xscale="log", xticks=levels, ylim=(0, None), xlabel="level", ylabel="share of p ≤ level / level")
        ax.minorticks_off()
        ax.invert_xaxis()
    axes[0].set_title("all keys")
    axes[1].set_title("the worst hundredth of the keys")
    legend_below(figure, 4)
    return figure


@experiment()
@click.option("--keys", "key_count", default=4000, show_default=True, help="Keys that are tested.")
def main(bench: Bench, key_count: int) -> None:
    """The rates of each key at each stage, on the unmarked images of the model's calibration."""
    last = bench.calibration
    if last is None or not last.earlier:
        raise CalibrationError("calibration.stages", "no calibration of the stages", subject=bench.source)
    schemes = [scheme_of(bench.key(seed=[bench.seed, i])) for i in range(key_count)]
    recoverers, nulls = zip(*calibrated_stages(bench.recoverer, last), (bench.recoverer, last), strict=True)
    names, test = names_of(recoverers), schemes[0].on(last.null)  # p depends on the score alone, whatever the null
    stages = [test.log10_p(each.reference_table(schemes)) for each in nulls]
    rows = rows_of(stages, names, weights_of(recoverers), bench.seed)
    for row in rows:
        click.echo(summary(row))
    spreads = {name: np.quantile(inflation(each), (0.5, 0.95, 1)) for name, each in zip(names, stages, strict=True)}
    quantiles = {
        name: dict(zip(("median", "95 %", "largest"), map(float, q), strict=True)) for name, q in spreads.items()
    }
    bench.write(rows, figure_of(rows), inflation=quantiles, calibration=bench.calibration_used)


def summary(row: dict) -> str:
    """A row as text."""
    levels = [f"{row[f'{n:g}']:.2f} [{row[f'{n:g} low']:.2f}, {row[f'{n:g} high']:.2f}]" for n in LEVELS]
    worst = [f"{row[f'{n:g} worst']:.1f}" for n in RATED]
    return f"{row['stage']:8} {row['p']:12} {', '.join(levels)}; worst {', '.join(worst)}"
