"""Where the error of the recovered noise comes from, and the best use of a budget of network calls.

    python scripts/study_noise.py -o build/noise                            # 24 images
    python scripts/study_noise.py -o build/noise -n 2 --steps 2 --steps 4   # under a minute

Naive and exact DDIM inversion, with the prompt and guidance of the drawing and with the empty prompt, from the true
latents and from those of each decoder inversion: error of the noise against calls of the network an image.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

from ringmark.inversion.decoder import Inverter
from ringmark.inversion.diffusion import invert
from ringmark.inversion.methods import Anderson, ForwardStep
from ringmark.inversion.metrics import correlation, nmse_db
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.schedule import Schedule
from scripts.experiments.common import (
    SEED,
    Pictures,
    cached,
    experiment_options,
    invert_all,
    mean_and_error,
    pictures,
    write_results,
)

DRAWN_STEPS, GUIDANCE = 50, 3.0
LATENTS = {"encoder": Inverter.named("encoder"), "gradient, 50": Inverter.named("gradient"), "ours": Inverter()}
SOLVERS = {
    "naive": {},
    "exact, forward step 3": {"method": ForwardStep(), "max_steps": 3},
    "exact, damped 3": {"method": ForwardStep(0.7), "max_steps": 3},
    "exact, Anderson 3": {"method": Anderson(window=2), "max_steps": 3},
}


class Counting:
    """The model, with a count of the samples that its network was called on."""

    def __init__(self, model: LatentModel) -> None:
        self.model, self.calls = model, 0
        self.embed = model.embed

    def predict(self, latents: Tensor, level: int, schedule: Schedule, cond: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += len(latents)
        return self.model.predict(latents, level, schedule, cond)


@torch.inference_mode()
def recover(
    model: LatentModel, latents: Tensor, prompts: list[str], steps: int, true: bool, solver: dict
) -> dict[str, Tensor]:
    """Noise (N, C, h, w) and network calls an image."""
    counting, schedule = Counting(model), model.schedule(steps)
    cond = model.embed(prompts if true else [""] * len(prompts))
    back = partial(invert, counting, schedule=schedule, guidance=GUIDANCE if true else 1.0, **solver)
    parts = zip(latents.split(8), cond.split(8), strict=True)
    noise = torch.cat([back(z.to(model.device), c).float().cpu() for z, c in parts])
    return {"noise": noise, "calls": torch.tensor(counting.calls / len(latents))}


def measure(
    model: LatentModel, seen: Pictures, latents: dict[str, Tensor], steps: tuple[int, ...], cache: Path
) -> list[dict]:
    """A row for each way back."""
    rows, ways = [], list(product(latents, (True, False), steps, SOLVERS))
    for name, true, count, solver in tqdm(ways, "noise", disable=None):
        make = partial(recover, model, latents[name], seen.names, count, true, SOLVERS[solver])
        found = cached(cache, [model.identity, latents[name], true, count, SOLVERS[solver]], make)
        error, spread = mean_and_error(nmse_db(found["noise"], seen.noise))
        alike, alike_spread = mean_and_error(correlation(found["noise"], seen.noise))
        rows.append({
            "latents": name, "prompt": "true" if true else "empty", "steps": count, "inversion": solver,
            "calls": float(found["calls"]), "noise NMSE dB": error, "standard error": spread,
            "correlation": alike, "its error": alike_spread,
        })  # fmt: skip
    return rows


def figure_of(rows: list[dict]):
    """Correlation against calls: a panel for each latent, naive and exact, true prompt and empty."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r["latents"] for r in rows))
    figure = Figure(figsize=(4 * len(names), 4), layout="constrained")
    for ax, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        for (i, solver), prompt in product(enumerate(SOLVERS), ("true", "empty")):
            some = [r for r in rows if (r["latents"], r["inversion"], r["prompt"]) == (name, solver, prompt)]
            style = {"color": f"C{i}", "ls": "-" if prompt == "true" else ":"}
            ax.plot(
                [r["calls"] for r in some],
                [r["correlation"] for r in some],
                "o",
                **style,
                label=f"{solver}, {prompt} prompt",
            )
        ax.set(title=f"latents: {name}", xscale="log", xlabel="network calls an image")
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("correlation of true and recovered noise")
    figure.axes[0].legend(fontsize=6)
    return figure


@click.command()
@experiment_options(24)
@click.option(
    "--steps",
    multiple=True,
    type=int,
    default=(10, 25, 50, 100),
    show_default=True,
    help="DDIM steps of the inversion.",
)
def main(source: str, images: Path | None, number: int, output: Path, steps: tuple[int, ...]) -> None:
    """Error of the recovered noise against network calls."""
    if images:
        raise click.UsageError("--images: photographs have no known noise; this study needs drawn ones")
    model, cache = LatentModel.from_pretrained(source), output / "cache"
    seen = pictures(model, number, steps=DRAWN_STEPS, guidance=GUIDANCE, cache=cache)
    found = {name: invert_all(model, i, seen.images, name=name, cache=cache).latents for name, i in LATENTS.items()}
    rows = measure(model, seen, {"true": seen.latents} | found, steps, cache)
    for row in rows:
        click.echo("  ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    write_results(
        output, "study_noise", rows, figure_of(rows), model=model.identity, images=number, seed=SEED,
        drawn_steps=DRAWN_STEPS, guidance=GUIDANCE,
    )  # fmt: skip


if __name__ == "__main__":
    main()
