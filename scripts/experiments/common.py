"""What the experiments share: pictures whose latents are known, contenders, and results as CSV, JSON, PNG and SVG."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ringmark.data.cache import cached
from ringmark.data.files import write_atomic
from ringmark.data.images import from_array, read_sample, to_array
from ringmark.data.sources import find_images
from ringmark.inversion.decoder import Inverter, decoder_residual
from ringmark.inversion.diffusion import invert
from ringmark.inversion.memory import memory_kilobytes, peak_during
from ringmark.inversion.methods import Adam, InertialKM
from ringmark.inversion.metrics import Walk
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.solve import Method, Residual
from ringmark.watermark.embed import generate
from ringmark.watermark.figures import save_figure, write_table
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.tasks.audit import prompts_for

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
    cache: Path | None = None,
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
    prompts = prompts_for([], number, SEED)
    draw = partial(_draw, model, prompts, scheme, steps, guidance)
    tensors = (
        cached(cache, [model.identity, number, steps, guidance, scheme and torch.view_as_real(scheme.spectrum)], draw)
        if cache
        else draw()
    )
    return Pictures(**tensors, names=prompts)


def _draw(
    model: LatentModel, prompts: list[str], scheme: TreeRing | None, steps: int, guidance: float
) -> dict[str, Tensor]:
    draw, half = partial(generate, model, steps=steps, guidance=guidance), len(prompts) // 2
    seeds = list(range(SEED, SEED + len(prompts)))
    with tqdm(total=len(prompts), desc="draw", unit="image", disable=None) as bar:
        drawn = [*draw(prompts[:half], seeds[:half], scheme=scheme, progress=bar.update)]
        drawn += draw(prompts[half:], seeds[half:], progress=bar.update)
    stack = lambda name: torch.stack([getattr(d, name) for d in drawn])
    return {"images": eight_bit(stack("image")), "latents": stack("latent"), "noise": stack("noise")}


def eight_bit(images: Tensor) -> Tensor:
    """Images as they come out of a PNG file."""
    return torch.stack([torch.from_numpy(to_array(from_array(x.clamp(-1, 1).numpy()))) for x in images])


def gradients(steps: int) -> dict[str, Inverter]:
    """Both settings of the gradient baseline of arXiv 2409.18442 at this many iterations."""
    by = partial(Inverter, max_steps=steps, early=False, gradient=True)
    return {
        f"gradient 0.1 scheduled, {steps}": by(Adam(lr=0.1, horizon=steps)),
        f"gradient 0.01 fixed, {steps}": by(Adam(lr=0.01, horizon=None)),
    }


@dataclass(frozen=True)
class Inverted:
    """Latents (N, C, h, w), evaluations (N,) and the pixel residual's RMS in grey levels (N,), NaN for the encoder."""

    latents: Tensor
    evaluations: Tensor
    pixel_rms: Tensor


def invert_all(
    model: LatentModel, inverter: Inverter, images: Tensor, *, name: str, cache: Path, batch: int = 8
) -> Inverted:
    """Invert the images batch by batch. What was inverted before is read from the folder `cache`."""
    folder = cache if model.dtype == torch.float32 else cache / str(model.dtype)
    make = partial(_invert_all, model, inverter, images, name, batch)
    return Inverted(**cached(folder, [model.identity, repr(inverter), images], make))


def _invert_all(model: LatentModel, inverter: Inverter, images: Tensor, name: str, batch: int) -> dict[str, Tensor]:
    found = [
        inverter(model, some.to(model.device)) for some in tqdm(images.split(batch), name, leave=False, disable=None)
    ]
    best = [
        s.merits.nan_to_num(torch.inf).amin(0) if len(s.merits) else torch.full((len(s.value),), torch.nan)
        for s in found
    ]
    return {
        "latents": torch.cat([s.value.cpu() for s in found]),
        "evaluations": torch.cat([s.steps for s in found]),
        "pixel_rms": torch.cat(best) / images[0].numel() ** 0.5 * 127.5,
    }


def inertial(alpha: float, rho: float) -> InertialKM:
    """Inertial KM of step ρ = 2λβ with λ at nine tenths of its bound: what α allows of λ, β makes up for."""
    lam = 0.9 * InertialKM.bound(alpha)
    return InertialKM(lam, alpha, rho / (2 * lam))


def residual(model: LatentModel, images: Tensor, pixels: bool = True) -> Residual:
    """T(z) = E(D(z)) − E(x) with error D(z) − x, D cut to the range of a picture: what `invert_decoder` solves.

    Without `pixels` T is all that a method learns.
    """
    both = decoder_residual(model.encode, model.decode, images.to(model.device), model.encode(images))
    return both if pixels else lambda z, rows: both(z, rows)[0]


@torch.inference_mode()
def walk(
    model: LatentModel,
    method: Method,
    seen: Pictures,
    *,
    steps: int,
    at: int,
    name: str,
    cache: Path,
    pixels: bool = True,
    batch: int = 4,
) -> Walk:
    """`Walk.along` from the encoder's latents, batch by batch. What was walked before is read from the folder `cache`."""

    def along(images: Tensor, truth: Tensor) -> dict[str, Tensor]:
        images, truth = images.to(model.device), truth.to(model.device)
        T, start = residual(model, images, pixels), model.encode(images)
        return vars(Walk.along(T, start, method, steps=steps, at=at, truth=truth))

    key, parts = [model.identity, repr(method), pixels, steps, at], []
    some = list(zip(seen.images.split(batch), seen.latents.split(batch), strict=True))
    for images, truth in tqdm(some, name, leave=False, disable=None):
        parts.append(cached(cache, [*key, images, truth], partial(along, images, truth)))
    return Walk(**{key: torch.cat([p[key] for p in parts], -1) for key in parts[0]})


@torch.inference_mode()
def recovered(model: LatentModel, latents: Tensor, steps: int, name: str, batch: int = 8) -> dict[str, Tensor]:
    """The `noise` (N, C, h, w) that latents come from, by naive DDIM inversion with the empty prompt."""
    schedule, nothing, noise = model.schedule(steps), model.embed([""]), []
    for z in tqdm(latents.split(batch), f"{name}: noise", leave=False, disable=None):
        noise.append(invert(model, z.to(model.device), nothing.expand(len(z), -1, -1), schedule).float().cpu())
    return {"noise": torch.cat(noise)}


def seconds(model: LatentModel, inverters: dict[str, Inverter], images: Tensor, rounds: int = 3) -> dict[str, float]:
    """Seconds an image: the median over rounds, in each of which all take their turn, the device synchronised."""
    taken = {name: [] for name in inverters}
    with tqdm(total=rounds * len(inverters), desc="time", leave=False, disable=None) as bar:
        for _ in range(rounds):
            for name, inverter in inverters.items():
                synchronise(model)
                started = time.perf_counter()
                inverter(model, images.to(model.device))
                synchronise(model)
                taken[name].append((time.perf_counter() - started) / len(images))
                bar.update()
    return {name: float(np.median(values)) for name, values in taken.items()}


def synchronise(model: LatentModel) -> None:
    """Wait for the device, so that a clock shows work done and not work queued."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def peak_memory(source: str, inverter: Inverter, images: Tensor, dtype: str = "float32") -> float:
    """Megabytes above the loaded model that one batch needs at its peak, in a process of its own.

    Two steps reach the peak: no method's memory grows after them.
    """
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (source, replace(inverter, max_steps=min(2, inverter.max_steps)), images, dtype))


def _peak(source: str, inverter: Inverter, images: Tensor, dtype: str) -> float:
    model = LatentModel.from_pretrained(source, dtype=getattr(torch, dtype))
    Inverter(max_steps=1)(model, images[:1])  # what the libraries allocate once is not the method's
    return peak_during(model.device, lambda: inverter(model, images.to(model.device)))[1]


def limit_memory(gib: float) -> None:
    """Let this process take so much more memory than it has now: what is beyond fails instead of filling the machine (Linux).

    Infinity lifts the limit again.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = hard if gib == float("inf") else memory_kilobytes("VmData") * 1024 + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))


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
