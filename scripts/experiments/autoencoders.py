"""Decoder inversion of plain autoencoders, trained in seconds on procedural scenes.

    python -m scripts.experiments autoencoders -o build/autoencoders                      # 64 images, two minutes
    python -m scripts.experiments autoencoders -o build/autoencoders -n 8 --updates 60    # seconds

Four pairs (E, D): an autoencoder, one trained to remove noise, the encoder of one autoencoder with the decoder of
another, which were not trained together, and one that was not trained at all. Latents are those of held-out scenes;
images are D(z) rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import click
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ringmark.data.images import to_array
from ringmark.data.scenes import scene
from ringmark.inversion.decoder import INVERTERS, Inverter
from ringmark.inversion.metrics import nmse_db
from scripts.experiments.common import Bench, eight_bit, experiment, line, mean_and_error
from scripts.experiments.plots import columns, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE, TRAINING_SCENES, HELD_OUT = 32, 256, 5_000_000
SEEDS = (0, 1, 2)  # of the three autoencoders

METHODS = [name for name in INVERTERS if name != "gradient-lean"]  # these decoders are small and not from diffusers


class Pair(NamedTuple):
    """What an Inverter needs from a model."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def scenes(first: int, number: int) -> Tensor:
    """(N, 3, SIDE, SIDE) in [-1, 1]."""
    from PIL import Image

    return torch.stack(
        [torch.from_numpy(to_array(Image.fromarray(scene(first + i, SIDE).pixels))) for i in range(number)]
    )


def halve(channels: int, out: int) -> nn.Module:
    return nn.Conv2d(channels, out, 4, 2, 1)


def double(channels: int, out: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, out, 4, 2, 1)


def untrained(width: int = 32, channels: int = 8) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder and decoder (3, 32, 32) ↔ (8, 8, 8)."""
    wide = 2 * width
    encoder = [halve(3, width), nn.SiLU(), halve(width, wide), nn.SiLU(), nn.Conv2d(wide, channels, 1)]
    decoder = [nn.Conv2d(channels, wide, 1), nn.SiLU(), double(wide, width), nn.SiLU(), double(width, 3), nn.Tanh()]
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


def train(images: Tensor, updates: int, *, seed: int, noise: float = 0.0) -> Pair:
    """A convolutional autoencoder that minimises the mean squared error."""
    torch.manual_seed(seed)
    encoder, decoder = untrained()
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
    """The encoders and decoders to invert."""
    images = scenes(0, TRAINING_SCENES)
    plain, other, denoising = (
        train(images, updates, seed=seed, noise=noise) for seed, noise in zip(SEEDS, (0, 0, 0.2), strict=True)
    )
    strangers, random = Pair(plain.encode, other.decode), train(images, 0, seed=SEEDS[0])
    return {"plain": plain, "denoising": denoising, "strangers": strangers, "untrained": random}


def measure(name: str, pair: Pair, number: int) -> list[dict]:
    """NMSE of each inverter on the images that D decodes from E's latents of held-out scenes."""
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


def figure_of(rows: list[dict]) -> Figure:
    """NMSE of each method, grouped by autoencoder."""
    figure, (ax,) = panels(8, 4)
    names = list(dict.fromkeys(r["autoencoder"] for r in rows))
    for i, method in enumerate(METHODS):
        nmse, error = columns([r for r in rows if r["method"] == method], "NMSE dB", "standard error")
        ax.bar(np.arange(len(names)) + (i - 2.5) * 0.13, nmse, 0.12, yerr=error, label=method)
    ax.set_xticks(range(len(names)), names)
    ax.set_ylabel("NMSE of the latent, dB")
    ax.legend(ncols=3, fontsize=8)
    return figure


@experiment(64, model=False, drawing=False)
@click.option("--updates", default=1500, show_default=True, help="Training steps of each autoencoder.")
def main(bench: Bench, updates: int) -> None:
    """Every method on autoencoders that are not part of a latent diffusion model."""
    rows = [row for name, pair in pairs(updates).items() for row in measure(name, pair, bench.number)]
    for row in rows:
        click.echo(line(row, 2))
    bench.write(rows, figure_of(rows), seed=SEEDS, first_seed=HELD_OUT)
