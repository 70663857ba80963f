"""Measure how well a model's initial noise is recovered, per latent channel and ring, and store it with the model.

    python -m scripts.measure_recovery            # pocket; about four minutes on two cores
    python -m scripts.measure_recovery --model pocket_flow --steps 1 --inversion-steps 4 --guidance 1

Images are drawn from known noise, rounded to 8 bits, and inverted as in verification (with the empty prompt). keygen
uses the table for the default placement of a mark, and the detector uses its null variances.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from ringmark.data.batches import chunks
from ringmark.data.images import from_array, to_array
from ringmark.inversion.models.loading import resolve
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.noise_recovery import NoiseRecovery
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.embed import generate
from ringmark.watermark.figures import recovery_figure, save_figure
from ringmark.watermark.schemes.base import DEFAULT, parameters_text, recommended
from ringmark.watermark.tasks.draw import prompts_for


@click.command()
@click.option("--model", "source", default="pocket", show_default=True, help='"pocket", "pocket_flow" or a folder.')
@click.option("-n", "--number", default=192, show_default=True, help="Images to draw.")
@click.option("--steps", default=25, show_default=True, help="Steps for drawing.")
@click.option("--inversion-steps", type=int, help="Steps for inversion.  [default: those for drawing]")
@click.option("--guidance", default=3.0, show_default=True, help="Guidance for drawing.")
@click.option("--seed", default=900_000, show_default=True, help="Seed of the first image.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the table into this PNG or SVG.")
def main(
    source: str,
    number: int,
    steps: int,
    inversion_steps: int | None,
    guidance: float,
    seed: int,
    plot: Path | None,
) -> None:
    """Measure noise recovery and store it in the model's folder."""
    folder = Path(resolve(source))
    model = LatentModel.from_pretrained(folder)
    recoverer = Recoverer(model, steps=inversion_steps or steps)
    settings = {"steps": steps, "guidance": guidance}
    recovery = measure(recoverer, model, number, seed, **settings)
    settings |= {"inversion_steps": recoverer.steps, "images": number, "seed": seed}
    recovery.save(folder, **settings, model=model.identity["fingerprint"])
    click.echo(f"recommended mark: {parameters_text(DEFAULT, recommended(DEFAULT, recovery, model.latent_shape))}")
    if plot:
        save_figure(recovery_figure(recovery), plot, force=True)


def measure(recoverer: Recoverer, model: LatentModel, number: int, seed: int, **drawing: Any) -> NoiseRecovery:
    """Noise recovery of `number` images, drawn for this purpose with these settings and rounded to 8 bits."""
    drawn = generate(model, prompts_for([], number, seed), list(range(seed, seed + number)), **drawing)
    truth, recovered = [], []
    for group in chunks(tqdm(drawn, "recover", number, disable=None), 8):
        images = [torch.from_numpy(to_array(from_array(one.image.numpy()))) for one in group]
        truth += [one.noise for one in group]
        recovered.append(recoverer(torch.stack(images)).noise)
    return NoiseRecovery.measure(torch.cat(recovered), torch.stack(truth))


if __name__ == "__main__":
    main()
