"""Decoder inversion beyond latent diffusion: plain autoencoders, trained here in seconds on procedural scenes.

    python scripts/study_autoencoders.py -o build/autoencoders                      # 64 images, about two minutes
    python scripts/study_autoencoders.py -o build/autoencoders -n 8 --updates 60    # seconds

Three pairs (E, D): one autoencoder; one trained to remove noise; and the encoder of one with the decoder of another,
which were never trained together. Latents are those of held-out scenes, images D(z) rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ringmark.data.images import to_array
from ringmark.data.scenes import scene
from ringmark.inversion.decoder import INVERTERS, Inverter
from ringmark.inversion.metrics import nmse_db
from scripts.experiments.common import eight_bit, mean_and_error, write_results

SIDE, TRAINING_SCENES, HELD_OUT = 32, 256, 5_000_000

METHODS = [name for name in INVERTERS if name != "gradient-lean"]  # these decoders are small, and none is diffusers'


class Pair(NamedTuple):
    """What an Inverter needs of a model."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def scenes(first: int, number: int) -> Tensor:
    """(N, 3, SIDE, SIDE) in [-1, 1]."""
    from PIL import Image

    return torch.stack(
        [torch.from_numpy(to_array(Image.fromarray(scene(first + i, SIDE).pixels))) for i in range(number)]
    )


def train(images: Tensor, updates: int, *, seed: int, noise: float = 0.0, width: int = 32, channels: int = 8) -> Pair:
    """A convolutional autoencoder (3, 32, 32) ↔ (8, 8, 8) that minimises the mean squared error."""
    torch.manual_seed(seed)
    down = lambda a, b: nn.Conv2d(a, b, 4, 2, 1)
    up = lambda a, b: nn.ConvTranspose2d(a, b, 4, 2, 1)
    encoder = nn.Sequential(
        down(3, width), nn.SiLU(), down(width, 2 * width), nn.SiLU(), nn.Conv2d(2 * width, channels, 1)
    )
    decoder = nn.Sequential(
        nn.Conv2d(channels, 2 * width, 1), nn.SiLU(), up(2 * width, width), nn.SiLU(), up(width, 3), nn.Tanh()
    )
    adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(updates), "train", leave=False, disable=None):
        x = images[torch.randint(len(images), (32,), generator=generator)]
        seen = x + noise * torch.randn(x.shape, generator=generator)
        loss = (decoder(encoder(seen)) - x).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return Pair(encoder.requires_grad_(False), decoder.requires_grad_(False))


def pairs(updates: int) -> dict[str, Pair]:
    """The encoders and decoders to be inverted."""
    images = scenes(0, TRAINING_SCENES)
    plain, other = train(images, updates, seed=0), train(images, updates, seed=1)
    denoising = train(images, updates, seed=2, noise=0.2)
    return {"plain": plain, "denoising": denoising, "strangers": Pair(plain.encode, other.decode)}


def measure(name: str, pair: Pair, number: int) -> list[dict]:
    """NMSE of each inverter on the images that D makes of E's latents of held-out scenes."""
    with torch.inference_mode():
        latents = pair.encode(scenes(HELD_OUT, number))
        images = eight_bit(pair.decode(latents))
    rows, start = [], None
    for method in METHODS:
        solution = Inverter.named(method)(pair, images.clone())
        nmse = nmse_db(solution.value, latents)
        start = nmse if method == "encoder" else start
        mean, error = mean_and_error(nmse)
        rows.append({
            "autoencoder": name, "method": method, "NMSE dB": mean, "standard error": error,
            "worst change dB": float((nmse - start).max()), "evaluations": float(solution.steps.float().mean()),
        })  # fmt: skip
    return rows


def figure_of(rows: list[dict]):
    """NMSE of each method, a group for each autoencoder."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    ax, names = figure.subplots(), list(dict.fromkeys(r["autoencoder"] for r in rows))
    for i, method in enumerate(METHODS):
        some = [r for r in rows if r["method"] == method]
        places = [j + (i - 2.5) * 0.13 for j in range(len(names))]
        ax.bar(places, [r["NMSE dB"] for r in some], 0.12, yerr=[r["standard error"] for r in some], label=method)
    ax.set_xticks(range(len(names)), names)
    ax.set_ylabel("NMSE of the latent, dB")
    ax.legend(ncols=3, fontsize=8)
    return figure


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
@click.option("-n", "--number", default=64, show_default=True, help="Held-out images.")
@click.option("--updates", default=1500, show_default=True, help="Training steps of each autoencoder.")
def main(output: Path, number: int, updates: int) -> None:
    """Every method on autoencoders that are no latent diffusion model's."""
    rows = [row for name, pair in pairs(updates).items() for row in measure(name, pair, number)]
    for row in rows:
        click.echo("  ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    write_results(output, "study_autoencoders", rows, figure_of(rows), images=number, updates=updates)


if __name__ == "__main__":
    main()
