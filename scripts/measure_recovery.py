"""Measure how much of a model's initial noise comes back, per latent channel and ring, and store it with the model.

    python scripts/measure_recovery.py            # pocket; about four minutes on two cores

Images are drawn from known noises, rounded to 8 bits, and inverted as verification does (empty prompt). keygen takes
the default placement of the mark from the table, the detector the null variances.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import click
import torch
from tqdm import tqdm

from ringmark.data.images import from_array, to_array
from ringmark.inversion.models.loading import resolve
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.noise_recovery import NoiseRecovery
from ringmark.watermark.detect.detector import Detector
from ringmark.watermark.embed import generate
from ringmark.watermark.figures import recovery_figure, save_figure
from ringmark.watermark.schemes.tree_ring import recommend
from ringmark.watermark.tasks.audit import prompts_for


@click.command()
@click.option("--model", "source", default="pocket", show_default=True, help='"pocket" or a diffusers folder.')
@click.option("-n", "--number", default=192, show_default=True, help="Images to draw.")
@click.option("--steps", default=25, show_default=True, help="DDIM steps, both ways.")
@click.option("--guidance", default=3.0, show_default=True, help="Guidance when drawing.")
@click.option("--seed", default=900_000, show_default=True, help="Seed of the first image.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the table into this PNG or SVG.")
def main(source: str, number: int, steps: int, guidance: float, seed: int, plot: Path | None) -> None:
    """Measure noise recovery and store it in the model's folder."""
    folder = Path(resolve(source))
    model = LatentModel.from_pretrained(folder)
    detector = Detector(model, [], steps=steps)
    prompts = prompts_for([], number, seed)
    drawn = generate(model, prompts, list(range(seed, seed + number)), steps=steps, guidance=guidance)
    truth, recovered = [], []
    drawn = iter(tqdm(drawn, "recover", number, disable=None))
    while some := list(islice(drawn, 8)):
        seen = [torch.from_numpy(to_array(from_array(one.image.numpy()))) for one in some]
        truth += [one.noise for one in some]
        recovered.append(detector.recover(torch.stack(seen)).noise)
    recovery = NoiseRecovery.measure(torch.cat(recovered), torch.stack(truth))
    recovery.save(folder, images=number, steps=steps, guidance=guidance, seed=seed, model=model.identity["fingerprint"])
    best = recommend(recovery, model.latent_shape)
    click.echo(f"recommended mark: channels {list(best.channels)}, radii {best.radii[0]}-{best.radii[1]}")
    if plot:
        save_figure(recovery_figure(recovery), plot)


if __name__ == "__main__":
    main()
