"""What the experiments share: pictures whose latents are known, contenders, and results as CSV, JSON, PNG and SVG."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.images import find_images, from_array, read_sample, to_array
from data.store import write_atomic
from inversion.decoder import invert_decoder, invert_decoder_by_gradient
from inversion.methods import Adam
from inversion.model import LatentModel
from inversion.solve import Solution
from watermark.generate import generate
from watermark.report import save_figure, write_table
from watermark.runs import prompts_for
from watermark.schemes.tree_ring import TreeRing

SEED = 700_000  # of the first image drawn for an experiment


def experiment_options(number: int):
    """--model, --images, -n and -o as decorators; `number` is the default of -n."""

    def apply(command):
        for option in (
            click.option(
                "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the results."
            ),
            click.option("-n", "--number", default=number, show_default=True, help="Images."),
            click.option(
                "--images", type=click.Path(path_type=Path), help="A folder of pictures instead of drawn ones."
            ),
            click.option(
                "--model", "source", default="pocket", show_default=True, help='"pocket", a folder or a hub id.'
            ),
        ):
            command = option(command)
        return command

    return apply


@dataclass(frozen=True)
class Pictures:
    """Images (N, 3, H, W) rounded to 8 bits, the latents that were decoded into them and, if drawn, their noise."""

    images: Tensor
    latents: Tensor
    noise: Tensor | None
    names: list[str]


@torch.inference_mode()
def pictures(
    model: LatentModel,
    number: int,
    folder: Path | None = None,
    *,
    scheme: TreeRing | None = None,
    steps: int = 25,
    guidance: float = 3.0,
) -> Pictures:
    """Drawn by the model, with different prompts and seeds; or, from a folder, encoded and decoded, so that z is known.

    With a scheme the first half of the drawn images is marked.
    """
    if folder:
        paths = find_images(folder)[:number]
        photos = torch.stack([torch.from_numpy(to_array(read_sample(p, model.image_size).image)) for p in paths])
        latents = torch.cat([model.encode(x) for x in photos.split(8)])
        images = torch.cat([model.decode(z) for z in latents.split(8)])
        return Pictures(eight_bit(images), latents, None, [str(p.relative_to(folder)) for p in paths])
    seeds, prompts = list(range(SEED, SEED + number)), prompts_for([], number, SEED)
    draw = partial(generate, model, steps=steps, guidance=guidance)
    half = number // 2
    with tqdm(total=number, desc="draw", unit="image", disable=None) as bar:
        drawn = [*draw(prompts[:half], seeds[:half], scheme=scheme, progress=bar.update)]
        drawn += draw(prompts[half:], seeds[half:], progress=bar.update)
    stack = lambda name: torch.stack([getattr(d, name) for d in drawn])
    return Pictures(eight_bit(stack("image")), stack("latent"), stack("noise"), [d.prompt for d in drawn])


def eight_bit(images: Tensor) -> Tensor:
    """Images as they come out of a PNG file."""
    return torch.stack([torch.from_numpy(to_array(from_array(x.clamp(-1, 1).numpy()))) for x in images])


Contender = Callable[[LatentModel, Tensor], Solution]


def ours(model: LatentModel, images: Tensor, **options) -> Solution:
    """invert_decoder with these options."""
    return invert_decoder(model.encode, model.decode, images, **options)


def by_gradient(model: LatentModel, images: Tensor, *, lr: float, scheduled: bool, steps: int) -> Solution:
    """The gradient baseline from the encoder's latents."""
    with torch.inference_mode():
        start = model.encode(images)
    method = Adam(lr=lr, horizon=steps if scheduled else None)
    return invert_decoder_by_gradient(model.decode, images, start, method, max_steps=steps)


def paper_adam(steps: int) -> Contender:
    """Adam on T as arXiv 2409.18442 runs it: every one of its steps, whatever the residual."""
    return partial(ours, method=Adam(horizon=steps), max_steps=steps, tol=None)


def gradients(steps: int) -> dict[str, Contender]:
    """Both settings of the gradient baseline at this many iterations."""
    return {
        f"gradient 0.1 scheduled, {steps}": partial(by_gradient, lr=0.1, scheduled=True, steps=steps),
        f"gradient 0.01 fixed, {steps}": partial(by_gradient, lr=0.01, scheduled=False, steps=steps),
    }


@dataclass(frozen=True)
class Timed:
    """A contender's latents (N, C, h, w), seconds an image (median over batches) and evaluations (N,)."""

    latents: Tensor
    seconds: float
    evaluations: Tensor


def run(model: LatentModel, contender: Contender, images: Tensor, *, name: str, batch: int = 8) -> Timed:
    """Invert the images batch by batch, the device synchronised before each reading of the clock."""
    values, seconds, steps = [], [], []
    for some in tqdm(images.split(batch), name, leave=False, disable=None):
        synchronise(model)
        started = time.perf_counter()
        solution = contender(model, some.to(model.device))
        synchronise(model)
        seconds.append((time.perf_counter() - started) / len(some))
        values.append(solution.value.cpu())
        steps.append(solution.steps)
    return Timed(torch.cat(values), float(np.median(seconds)), torch.cat(steps))


def synchronise(model: LatentModel) -> None:
    """Wait for the device, so that a clock shows work done and not work queued."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def peak_memory(source: str, contender: Contender, images: Tensor) -> float:
    """Megabytes above the loaded model that one batch needs at its peak, in a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (source, contender, images))


def _peak(source: str, contender: Contender, images: Tensor) -> float:
    model = LatentModel.from_pretrained(source)
    ours(model, images[:1], max_steps=1)  # what the libraries allocate once is not the method's
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender(model, images.to(model.device))
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    before = _status("VmRSS")
    contender(model, images)
    return (_status("VmHWM") - before) / 2**10


def _status(field: str) -> int:
    """Kilobytes from this process's status (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def write_results(output: Path, name: str, rows: list[dict], figure=None, **facts) -> None:
    """name.csv, name.json (rows and facts) and the figure as PNG and SVG."""
    write_table(output / f"{name}.csv", rows)
    write_atomic(output / f"{name}.json", json.dumps(facts | {"rows": rows}, indent=1))
    if figure is not None:
        for suffix in ("png", "svg"):
            save_figure(figure, output / f"{name}.{suffix}")
