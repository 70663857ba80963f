"""NMSE against time and against memory: encoder, gradient descent, the paper's Adam and ours (arXiv 2409.18442).

    python scripts/reproduce_pareto.py -o build/bench                       # with bench_decoder.py's images and cache
    python scripts/reproduce_pareto.py -o build/small -n 2 --shortest 4     # under two minutes

The true latents are known because the model drew the images, which pass through 8 bits. In 16 bit, which is the
default beside 32 bit where there is a GPU, the same images are inverted by the same weights in that precision.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import click
import torch

from ringmark.inversion.decoder import Inverter
from ringmark.inversion.metrics import nmse_db
from ringmark.inversion.models.pipeline import LatentModel
from scripts.experiments.bench_decoder import BUDGETS, ours, weak_key
from scripts.experiments.common import (
    SEED,
    experiment_options,
    gradients,
    invert_all,
    mean_and_error,
    peak_memory,
    pictures,
    seconds,
    write_results,
)

FAMILIES = {"gradient 0.1": "C3", "gradient 0.01": "C1", "paper's Adam": "C4", "ours": "C0", "encoder": "C2"}


def contenders(shortest: int) -> dict[str, Inverter]:
    """The paper's iteration counts where `shortest` is 20."""
    adam = {
        f"paper's Adam, {n}": Inverter.named("adam", n) for n in (shortest, *(int(f * shortest) for f in (2.5, 5, 10)))
    }
    descent = [gradients(n) for n in (shortest, *(int(f * shortest) for f in (1.5, 2.5, 5)))]
    budgets = {ours(k): Inverter(max_steps=k, early=False) for k in BUDGETS}
    return {"encoder": Inverter.named("encoder")} | adam | {n: i for d in descent for n, i in d.items()} | budgets


def family(method: str) -> str:
    return next(name for name in FAMILIES if method.startswith(name))


def figure_of(rows: list[dict]):
    """Two fronts, a line for each family and precision."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = zip(
        figure.subplots(1, 2, sharey=True),
        ("seconds", "MB"),
        ("seconds an image", "peak memory above the model, MB"),
        strict=True,
    )
    for ax, measure, label in panels:
        for (name, colour), dtype in product(FAMILIES.items(), dict.fromkeys(r["dtype"] for r in rows)):
            some = [r for r in rows if family(r["method"]) == name and r["dtype"] == dtype]
            style = {"color": colour, "marker": "o", "ls": "-" if dtype == "float32" else ":"}
            values = [r["NMSE dB"] for r in some], [r["standard error"] for r in some]
            ax.errorbar([r[measure] for r in some], values[0], values[1], **style, label=f"{name}, {dtype}")
        ax.set(xscale="log", xlabel=label)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())  # or a range of less than a decade is a crowd of labels
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("NMSE of the latent, dB (mean ± standard error)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return figure


@click.command()
@experiment_options(64)
@click.option("--shortest", default=20, show_default=True, help="Iterations of the shortest runs; 20 is the paper's.")
@click.option("--timed", default=4, show_default=True, help="Images on which time and memory are measured.")
@click.option("--rounds", default=3, show_default=True, help="Turns of each when time is taken.")
@click.option("--dtype", "dtypes", multiple=True, help="Precisions.  [default: float32, and float16 on a GPU]")
def main(
    source: str,
    images: Path | None,
    number: int,
    output: Path,
    shortest: int,
    timed: int,
    rounds: int,
    dtypes: tuple[str, ...],
) -> None:
    """Fronts of accuracy against time and memory."""
    dtypes = dtypes or (("float32", "float16") if torch.cuda.is_available() else ("float32",))
    model, rows = LatentModel.from_pretrained(source, dtype=torch.float32), []
    seen = pictures(model, number, images, scheme=weak_key(model), cache=output / "cache")
    for dtype in dtypes:
        model = LatentModel.from_pretrained(source, dtype=getattr(torch, dtype))
        all_of = contenders(shortest)
        memory: dict[str, float] = {}
        taken = seconds(model, all_of, seen.images[:timed], rounds)
        for name, inverter in all_of.items():
            found = invert_all(model, inverter, seen.images, name=name, cache=output / "cache")
            mean, error = mean_and_error(nmse_db(found.latents, seen.latents))
            kind = family(name)
            memory[kind] = memory.get(kind) or peak_memory(source, inverter, seen.images[:timed], dtype)
            rows.append({
                "method": name, "dtype": dtype, "NMSE dB": mean, "standard error": error,
                "seconds": taken[name], "MB": memory[kind],
            })  # fmt: skip
            click.echo("  ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in rows[-1].values()))
    write_results(
        output, "reproduce_pareto", rows, figure_of(rows), model=model.identity, images=len(seen.names), seed=SEED,
        timed=timed, rounds=rounds, threads=torch.get_num_threads(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
