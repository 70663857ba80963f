"""Decoder inversion with a step learnt from each picture's own rendering, on any autoencoder.

    python -m scripts.experiments operator -o build/operator                        # pictures that pocket draws
    python -m scripts.experiments operator -o build/operator --images FOLDER --side 128
    python -m scripts.experiments operator -o build/operator --images FOLDER --autoencoder FOLDER

Photographs are encoded, decoded and rounded to 8 bits, so that their latents are known. The first pictures of the
folder are skipped: they are for choosing settings, the others for measuring them. The gain is the encoder's NMSE minus
the method's, in dB, with a 95 % interval from Student's t.

The folder of an autoencoder holds `load.py` with `load() -> (encode, decode)`, from (B, 3, H, W) in [-1, 1] to latents
and back. Only run code that you trust.
"""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import torch
from scipy import stats
from torch import Tensor

from ringmark.data.sources import find_images
from ringmark.inversion.decoder import INVERTERS, Autoencoder, Inverter, decoder_residual, in_slices
from ringmark.inversion.methods import Anderson, ForwardStep, Operator
from ringmark.inversion.metrics import cocoercivity, nmse_db, trace
from ringmark.inversion.solve import State
from scripts.experiments.autoencoders import Pair
from scripts.experiments.common import Bench, eight_bit, experiment, line, read_pictures, share
from scripts.experiments.plots import columns, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = 5
FORWARD = (0.3, 1.0)  # ρ of the plain steps
ANDERSON = {
    "Anderson, 2 steps": Inverter(Anderson()),
    "Anderson, default": INVERTERS["anderson"],
}


@dataclass(frozen=True)
class Watched(Operator):
    """The operator step, with all iterates (B, 2, C, h, w): the latents of pictures and of their renderings."""

    path: list[Tensor] = field(default_factory=list)

    def init(self, z: Tensor) -> State:
        self.path.append(z)
        return super().init(z)

    def step(self, z: Tensor, t: Tensor, error: Tensor, state: State) -> tuple[Tensor, State]:
        after, state = super().step(z, t, error, state)
        self.path.append(after)
        return after, state

    def values(self) -> list[Tensor]:
        """What the inversion returns after 0, 1, … steps."""
        start = self.path[0]
        shares = [self.share(start, z).view(-1, 1, 1, 1) for z in self.path]
        return [start[:, 0].lerp(z[:, 0], share) for z, share in zip(self.path, shares, strict=True)]


class Walked(NamedTuple):
    """Evaluations of E∘D a step, and for z_0, z_1, …: the iterates and what an inversion returns that stops there."""

    cost: int
    iterates: list[Tensor]
    values: list[Tensor]


@torch.inference_mode()
def paths(model: Autoencoder, images: Tensor, start: Tensor) -> Iterator[tuple[str, Walked]]:
    """The paths of the operator and of plain steps z ← z − ρ T(z)."""
    watched = Watched()
    Inverter(watched, STEPS)(model, images)
    yield "operator", Walked(2, [z[:, 0] for z in watched.path], watched.values())
    residual = decoder_residual(in_slices(model.encode, 2), in_slices(model.decode, 2), images, start)
    for rho in FORWARD:
        iterates = [z for z, _ in trace(residual, start, ForwardStep(rho), STEPS)]
        yield f"forward step {rho:g}", Walked(1, iterates, iterates)


@torch.inference_mode()
def photographs(model: Autoencoder, paths: list[Path], side: int) -> tuple[Tensor, Tensor]:
    """8-bit pictures (N, 3, side, side) that the decoder makes of photographs' latents, and these latents."""
    photos = read_pictures(paths, (side, side))
    latents = torch.cat([model.encode(x) for x in photos.split(4)])
    return eight_bit(torch.cat([model.decode(z) for z in latents.split(4)])), latents


def row_of(way: str, evaluations: float, gain: Tensor) -> dict:
    mean, half = float(gain.mean()), float(stats.t.ppf(0.975, len(gain) - 1) * gain.std() / len(gain) ** 0.5)
    return {
        "method": way,
        "evaluations": evaluations,
        "gain dB": mean,
        "low": mean - half,
        "high": mean + half,
        "worst": float(gain.min()),
        "images that lose": int((gain < 0).sum()),
    }


def condition_of(way: str, path: list[Tensor], truth: Tensor) -> dict:
    """Where a step S = z_k − z_{k+1} meets Theorem 1's condition about the true latent: ⟨S, z_k − z*⟩ > ‖S‖² / 2.

    It is equivalent to ‖z_{k+1} − z*‖ < ‖z_k − z*‖.
    """
    betas = torch.stack([cocoercivity(z, z - after, truth) for z, after in pairwise(path)])
    met = betas > 0.5
    return {
        "method": way,
        "steps": share(int(met.sum()), met.numel()),
        "images": share(int(met.all(0).sum()), met.shape[1]),
    }


def figure_of(rows: list[dict]) -> Figure:
    """Gains against evaluations."""
    figure, (ax,) = panels(7, 4)
    for way in dict.fromkeys(row["method"].partition(",")[0] for row in rows):
        of_way = [row for row in rows if row["method"].startswith(way)]
        x, gain, low, high = columns(of_way, "evaluations", "gain dB", "low", "high")
        ax.errorbar(x, gain, [gain - low, high - gain], fmt="o-", capsize=2, label=way)
    ax.set(xlabel="evaluations of E∘D an image", ylabel="gain over the encoder, dB")
    ax.legend(fontsize=8)
    return figure


@experiment(16, photographs=True)
@click.option("--autoencoder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="With load.py.")
@click.option("--skip", default=24, show_default=True, help="Pictures of the folder that are left out.")
@click.option("--side", default=192, show_default=True, help="Side of the pictures in pixels.")
def main(bench: Bench, autoencoder: Path | None, skip: int, side: int) -> None:
    """The operator step and others against the encoder, on pictures whose latents are known."""
    model: Autoencoder = (
        bench.model if autoencoder is None else Pair(*runpy.run_path(str(autoencoder / "load.py"))["load"]())
    )
    if bench.photographs:
        images, latents = photographs(model, find_images(bench.photographs)[skip : skip + bench.number], side)
    elif autoencoder:
        raise click.UsageError("--autoencoder requires --images")
    else:
        seen = bench.pictures()
        images, latents = seen.images, seen.latents
    start = INVERTERS["encoder"](model, images).value
    first, rows, conditions = nmse_db(start, latents), [], []
    click.echo(f"encoder {first.mean():.2f} dB")
    for way, walked in paths(model, images, start):
        gains = [first - nmse_db(z, latents) for z in walked.values]
        of_way = [row_of(f"{way}, {k}", walked.cost * k, gain) for k, gain in enumerate(gains) if k]
        conditions.append(condition_of(way, walked.iterates, latents))
        for row in [*of_way, conditions[-1]]:
            click.echo(line(row, 2))
        rows += of_way
    for way, inverter in ANDERSON.items():
        found = inverter(model, images)
        rows.append(row_of(way, float(found.steps.float().mean()), first - nmse_db(found.value, latents)))
        click.echo(line(rows[-1], 2))
    bench.write(rows, figure_of(rows), conditions=conditions, encoder=float(first.mean()), skip=skip, side=side)
