"""A billion pictures, computed: cost, bytes, memory, false accusations, and false discovery rates.

    python -m scripts.experiments scale -o build/scale                 # 1 minute
    python -m scripts.experiments scale -o build/small --pictures 1000000 --runs 2

Costs a picture and shares found come from the results of `benchmark`, sizes of records from those of `measure_report`,
all as they are in the documentation. p-values are simulated: unmarked pictures have uniform ones, those of marked ones
are 1 − Φ(z), z ~ N(μ, 1), where μ gives the measured share found at 0.001; if all were found, the lower end of its
exact 95 % interval. `--runs` simulations a row; only p-values up to 1 % are drawn, because no threshold is higher.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import beta, norm

from scripts.experiments.common import Bench, experiment, line

RESULTS = Path(__file__).parents[2] / "docs" / "measurements" / "results"
ALPHA, LARGEST = 1e-3, 1e-2
CONDITIONS = ("clean", "brightness:6", "crop:0.75")
MEASURED_RECORDS, MEASURED_BYTES = 10_000_000, 0.75e9  # results/report.json
INDEX, NOISE, ROWS, PAGE = 40, 12_400, 10_000, 1000
"""Bytes of memory a picture (indexes of ids and of contents), bytes of kept noise, records a part, names a page."""


def power(found: int, images: int) -> float:
    """A share found, or the lower end of its exact 95 % interval if that is all."""
    return found / images if found < images else float(beta.ppf(0.025, found, 1))


def costs(pictures: float, rate: float, seconds: dict[str, float], bytes_each: float) -> list[dict[str, Any]]:
    """What an audit takes, if a share `rate` of the pictures is marked."""
    mean = rate * seconds["clean"] + (1 - rate) * seconds["unmarked"]
    return [
        {"quantity": "core-hours, all stages", "value": pictures * mean / 3600},
        {"quantity": "core-hours, latents alone", "value": pictures * seconds["clean"] / 3600},
        {"quantity": "core-hours, without stages", "value": pictures * seconds["alone"] / 3600},
        {"quantity": "terabytes read", "value": pictures * bytes_each / 1e12},
        {"quantity": "terabytes of records, Parquet", "value": pictures * MEASURED_BYTES / MEASURED_RECORDS / 1e12},
        {"quantity": "terabytes of kept noise", "value": pictures * NOISE / 1e12},
        {"quantity": "gigabytes of memory for one results folder", "value": pictures * INDEX / 1e9},
        {"quantity": "parts of Parquet", "value": pictures / ROWS},
        {"quantity": "pages of a bucket's listing", "value": pictures / PAGE},
    ]


def discoveries(pictures: int, marked: int, found: float, level: float, random: np.random.Generator) -> np.ndarray:
    """Simulated false and true discoveries at ALPHA, those of Benjamini and Hochberg, and the latter's threshold."""
    nulls = LARGEST * random.random(random.binomial(pictures - marked, LARGEST))
    mean = norm.isf(ALPHA) - norm.isf(found)
    hits = norm.sf(random.normal(mean, 1, marked))
    hits = hits[hits <= LARGEST]
    p = np.sort(np.concatenate([nulls, hits]))
    passing = np.flatnonzero(p <= level * np.arange(1, len(p) + 1) / pictures)
    threshold = p[passing[-1]] if len(passing) else 0.0
    assert threshold < LARGEST
    counts = [np.count_nonzero(each <= limit) for limit in (ALPHA, threshold) for each in (nulls, hits)]
    return np.array([*counts, threshold])


@experiment(model=False, drawing=False)
@click.option("--pictures", default=1_000_000_000, show_default=True)
@click.option("--rate", "rates", multiple=True, default=[1e-6, 1e-4, 1e-2], show_default=True, help="Share marked.")
@click.option("--bytes", "bytes_each", default=200_000.0, show_default=True, help="Bytes of a picture; assumed.")
@click.option("--fdr", default=0.05, show_default=True)
@click.option("--runs", default=5, show_default=True)
def main(bench: Bench, pictures: int, rates: tuple[float, ...], bytes_each: float, fdr: float, runs: int) -> None:
    """Cost and errors of an audit of so many pictures."""
    measured = json.loads((RESULTS / "benchmark.json").read_text())
    by_condition = {row["condition"]: row for row in measured["rows"]}
    seconds = {name: by_condition[name]["mean seconds, stages"] for name in ("clean", "unmarked")}
    seconds["alone"] = by_condition["unmarked"]["mean seconds, alone"]
    cost = costs(pictures, rates[0], seconds, bytes_each)
    random = np.random.default_rng(bench.seed)
    rows = []
    for condition in CONDITIONS:
        images = by_condition[condition]["images"]
        found = power(round(by_condition[condition]["found, stages"] * images), images)
        for rate in rates:
            marked = round(pictures * rate)
            each = [discoveries(pictures, marked, found, fdr, random) for _ in range(runs)]
            false, true, false_bh, true_bh, threshold = np.mean(each, 0)
            rows.append(
                {
                    "condition": condition,
                    "marked": marked,
                    "found at 0.001": true / max(1, marked),
                    "false at 0.001": false,
                    "threshold": threshold,
                    "found": true_bh / max(1, marked),
                    "false": false_bh,
                    "false discoveries": float(np.mean([f / max(1, f + t) for _, _, f, t, _ in each])),
                }
            )
    for row in (*cost, *rows):
        click.echo(line(row))
    bench.write(rows, cost=cost, seconds=seconds, pictures=pictures, runs=runs, fdr=fdr)
