"""How much of the initial noise comes back, by latents, number of steps and inversion of the sampler?

    python -m scripts.experiments noise --model pocket_flow --guidance 1 -o build/noise-flow
    python -m scripts.experiments noise --drawn 4 --drawn 25 -o build/noise
    python -m scripts.experiments noise --drawn 4 -n 2 --its 2 -o build/small

The same noise is drawn in each number of steps and rounded to 8 bits. It is recovered from the true latents and from
those of each decoder inversion, with the empty prompt, as in verification, and from the true latents also with the
prompt and guidance of the drawing:
- naive: in the steps of the drawing, with the network called at the cleaner end of each;
- exact: in the same steps, each solved by Anderson's method with at most `--its` iterations;
- naive in `--inversion-steps` steps, whatever the drawing: if paths are straight, the number of steps does not matter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from ringmark.inversion.condition import Condition
from ringmark.inversion.decoder import Inverter
from ringmark.inversion.diffusion import invert
from ringmark.inversion.methods import Anderson
from ringmark.inversion.metrics import correlation, nmse_db
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.schedule import Schedule
from scripts.experiments.common import Bench, Pictures, experiment, line, mean_and_error
from scripts.experiments.plots import columns, legend_below, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRUE = "true"
INVERTERS = {
    "encoder": Inverter.named("encoder"),
    "gradient, 50": Inverter.named("gradient"),
    "gradient-free": Inverter.named("anderson"),
    "operator": Inverter.named("operator"),
}


class Counting:
    """The model, with a count of the latents on which its network was called."""

    def __init__(self, model: LatentModel) -> None:
        self.model, self.calls = model, 0

    def predict(self, latents: Tensor, level: int, schedule: Schedule, cond: Condition) -> tuple[Tensor, Tensor]:
        self.calls += len(latents)
        return self.model.predict(latents, level, schedule, cond)


def inversions(drawn: int, many: int, its: int) -> dict[str, tuple[int, dict[str, Any]]]:
    """The number of steps and the settings of `invert`, by name."""
    ways: dict[str, tuple[int, dict[str, Any]]] = {
        "naive": (drawn, {}),
        "exact": (drawn, {"method": Anderson(), "max_steps": its}),
    }
    return ways if drawn == many else ways | {f"naive, {many} steps": (many, {})}


def recovered(
    bench: Bench, latents: Tensor, prompts: list[str], steps: int, settings: dict[str, Any], true_prompt: bool
) -> dict[str, Tensor]:
    """`noise` (N, C, h, w) and the `calls` (N,) of the network, a mean over each batch."""
    model = bench.model

    def make(z: Tensor, texts: list[str]) -> dict[str, Tensor]:
        cond = model.condition(texts, guidance=bench.guidance) if true_prompt else model.nothing.expand(len(z))
        counting = Counting(model)
        noise = invert(counting, z.to(model.device), cond, model.schedule(steps), **settings).float().cpu()
        return {"noise": noise, "calls": torch.full((len(z),), counting.calls / len(z))}

    key = ["noise", steps, repr(settings), true_prompt and bench.guidance]
    return bench.batches(key, make, latents, prompts, name=f"{steps} steps")


def rows_of(bench: Bench, seen: Pictures, drawn: int, its: int) -> list[dict[str, Any]]:
    """A row for each kind of latents, prompt and inversion of the images of one number of steps."""
    found = {name: bench.invert(inverter, seen.images, name).latents for name, inverter in INVERTERS.items()}
    cases = [(TRUE, TRUE, seen.latents), *((name, "empty", z) for name, z in ({TRUE: seen.latents} | found).items())]
    rows = []
    for name, prompt, latents in tqdm(cases, f"drawn in {drawn}", disable=None):
        for inversion, (steps, settings) in inversions(drawn, bench.recoverer.steps, its).items():
            back = recovered(bench, latents, seen.names, steps, settings, prompt == TRUE)
            alike, spread = mean_and_error(correlation(back["noise"], seen.noise))
            error, error_spread = mean_and_error(nmse_db(back["noise"], seen.noise))
            row = {"drawn in": drawn, "latents": name, "prompt": prompt, "inversion": inversion}
            row |= {"calls": float(back["calls"].mean()), "correlation": alike, "its error": spread}
            rows.append(row | {"noise NMSE dB": error, "standard error": error_spread})
            click.echo(line(rows[-1]))
    return rows


def figure_of(rows: list[dict[str, Any]]) -> Figure:
    """Correlation by latents: a panel for each number of steps, a line for each inversion; the empty prompt."""
    counts = list(dict.fromkeys(row["drawn in"] for row in rows))
    figure, axes = panels(4.2 * len(counts), 4.2, across=len(counts), sharey=True)
    for ax, drawn in zip(axes, counts, strict=True):
        shown = [row for row in rows if row["drawn in"] == drawn and row["prompt"] == "empty"]
        for inversion in dict.fromkeys(row["inversion"] for row in shown):
            chosen = [row for row in shown if row["inversion"] == inversion]
            names = [row["latents"] for row in chosen]
            ax.errorbar(names, *columns(chosen, "correlation", "its error"), marker="o", capsize=3, label=inversion)
        ax.set_title(f"drawn in {drawn} step{'s' if drawn > 1 else ''}")
        ax.tick_params(axis="x", rotation=30)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("correlation of true and recovered noise")
    legend_below(figure, 3)
    return figure


@experiment(16, drawing=False)
@click.option("--guidance", default=3.0, show_default=True, help="Guidance for drawing.")
@click.option("--inversion-steps", default=25, show_default=True, help="Steps for naive inversion of any drawing.")
@click.option("--drawn", multiple=True, type=int, default=(1, 4, 25), show_default=True, help="Steps for drawing.")
@click.option("--its", default=12, show_default=True, help="Most iterations for each exact step.")
def main(bench: Bench, drawn: tuple[int, ...], its: int) -> None:
    """Correlation and NMSE of recovered noise, naive and exact, from true and inverted latents."""
    noise, prompts = bench.fresh(bench.number)
    rows = []
    for steps in drawn:
        rows += rows_of(bench, bench.draw(noise, prompts, steps=steps), steps, its)
    bench.write(rows, figure_of(rows))
