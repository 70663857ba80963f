"""Accuracy against time and memory of each decoder inversion (arXiv 2409.18442).

    python -m scripts.experiments pareto -o build/bench                     # with what `decoder` kept
    python -m scripts.experiments pareto -o build/small -n 2 --shortest 4   # under two minutes

The true latents are known because the model drew the images, which are rounded to 8 bits. On a GPU, the same images are
by default also inverted with the same weights in 16 bits.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import click
import torch

from ringmark.inversion.decoder import Inverter
from ringmark.inversion.metrics import nmse_db
from scripts.experiments.common import Bench, Pictures, experiment, line, mean_and_error
from scripts.experiments.costs import peak_memory, seconds
from scripts.experiments.decoder import budgets, gradients, weak_scheme
from scripts.experiments.plots import columns, legend_below, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAMILIES = {
    "gradient 0.1": "C3", "gradient 0.01": "C1", "paper's Adam": "C4",
    "Anderson": "C0", "operator": "C5", "encoder": "C2",
}  # fmt: skip


def contenders(shortest: int) -> dict[str, Inverter]:
    """The paper's iteration counts where `shortest` is 20."""
    adam = {
        f"paper's Adam, {n}": Inverter.named("adam", n) for n in (shortest, *(int(f * shortest) for f in (2.5, 5, 10)))
    }
    descent = [gradients(n) for n in (shortest, *(int(f * shortest) for f in (1.5, 2.5, 5)))]
    return {"encoder": Inverter.named("encoder")} | adam | {n: i for d in descent for n, i in d.items()} | budgets()


def family(method: str) -> str:
    return next(name for name in FAMILIES if method.startswith(name))


def figure_of(rows: list[dict]) -> Figure:
    """Two fronts, with a line for each family and precision."""
    figure, (time, memory) = panels(11, 4.5, across=2, sharey=True)
    plot_front(time, rows, "seconds", "seconds per image")
    plot_front(memory, rows, "MB", "peak memory above the model's, MB")
    time.set_ylabel("NMSE of the latent, dB (mean ± standard error)")
    legend_below(figure, 5, fontsize=8)
    return figure


def plot_front(ax: Axes, rows: list[dict], measure: str, label: str) -> None:
    """NMSE against a cost."""
    from matplotlib.ticker import NullFormatter

    for (name, colour), dtype in product(FAMILIES.items(), dict.fromkeys(r["dtype"] for r in rows)):
        members = [r for r in rows if family(r["method"]) == name and r["dtype"] == dtype]
        style = {"color": colour, "marker": "o", "ls": "-" if dtype == "float32" else ":"}
        ax.errorbar(*columns(members, measure, "NMSE dB", "standard error"), **style, label=f"{name}, {dtype}")
    ax.set(xscale="log", xlabel=label)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())  # avoids crowded labels on a range of less than a decade
    ax.grid(alpha=0.3)


def measure(bench: Bench, seen: Pictures, inverters: dict[str, Inverter], timed: int, rounds: int) -> list[dict]:
    """A row for each inverter, in the precision of this bench."""
    rows, memory, few = [], {}, seen.images[:timed]
    taken = seconds(bench.model, inverters, few, rounds)
    for name, inverter in inverters.items():
        latents = bench.invert(inverter, seen.images, name).latents
        mean, error = mean_and_error(nmse_db(latents, seen.latents))
        kind = family(name)
        memory[kind] = memory.get(kind) or peak_memory(bench.source, inverter, few, bench.dtype)
        row = {"method": name, "dtype": bench.dtype, "NMSE dB": mean, "standard error": error}
        rows.append(row | {"seconds": taken[name], "MB": memory[kind]})
        click.echo(line(rows[-1]))
    return rows


@experiment(64, photographs=True)
@click.option("--shortest", default=20, show_default=True, help="Iterations of the shortest runs; 20 is the paper's.")
@click.option("--timed", default=4, show_default=True, help="Images on which time and memory are measured.")
@click.option("--rounds", default=3, show_default=True, help="Rounds of time measurements.")
@click.option("--dtype", "dtypes", multiple=True, help="Precisions.  [default: float32, and float16 on a GPU]")
def main(bench: Bench, shortest: int, timed: int, rounds: int, dtypes: tuple[str, ...]) -> None:
    """Fronts of accuracy against time and memory."""
    exact = replace(bench, dtype="float32")
    seen = exact.pictures(weak_scheme(exact))
    benches = [exact if d == "float32" else replace(bench, dtype=d) for d in dtypes or default_dtypes()]
    rows = [row for each in benches for row in measure(each, seen, contenders(shortest), timed, rounds)]
    exact.write(rows, figure_of(rows))


def default_dtypes() -> tuple[str, ...]:
    return ("float32", "float16") if torch.cuda.is_available() else ("float32",)
