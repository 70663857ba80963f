"""Which samplers keep the mark.

    python -m scripts.experiments samplers -o build/samplers                                    # 8 images each
    python -m scripts.experiments samplers -o build/samplers-two --sampler ddim --sampler lcm   # two rows of the table

The same marked noise and prompts are drawn by each sampler that `ringmark generate --sampler` has for this model, and
by DDIM with η = 1, then read as `ringmark verify` does. LCM has 8 steps and no guidance, all others those given.
Found: p ≤ 0.001 for one key.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import click
import numpy as np
import torch
from torch import Tensor

from ringmark.errors import MarkWarning
from ringmark.inversion.models.samplers import SAMPLERS, adds_noise
from ringmark.watermark.embed import mark
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.base import scheme_of
from ringmark.watermark.statistics import ALPHA
from scripts.experiments.common import SEED, Bench, eight_bit, experiment, share
from scripts.experiments.plots import panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ETA = "ddim, η = 1"
LCM_STEPS = 8
WORDS = {True: "adds noise", False: "deterministic"}


def plans(bench: Bench) -> dict[str, tuple[str, int, float, float]]:
    """Sampler, steps, guidance and η, by the name of the row."""
    flow = bench.model.prediction == "flow_prediction"
    fitting = [name for name, sampler in SAMPLERS.items() if (sampler.flow if flow else sampler.alpha_bar)]
    found = {name: (name, bench.steps, bench.guidance, 0.0) for name in fitting}
    if "lcm" in found:
        found["lcm"] = ("lcm", LCM_STEPS, 1.0, 0.0)
    return found if flow else found | {ETA: ("ddim", bench.steps, bench.guidance, 1.0)}


@torch.inference_mode()
def drawn(bench: Bench, key: Key, plan: tuple[str, int, float, float]) -> Tensor:
    """Images (N, 3, H, W) drawn from marked noise by the model's own pipeline, rounded to 8 bits."""
    noise, prompts = bench.fresh(bench.number)
    sampler, steps, guidance, eta = plan

    def make(some: Tensor, texts: list[str], seeds: list[int]) -> dict[str, Tensor]:
        condition = bench.model.condition(texts, guidance=guidance)
        if eta:
            condition = replace(condition, options={**condition.options, "eta": eta})
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with mark(bench.model.pipe, key), warnings.catch_warnings():
            warnings.simplefilter("ignore", MarkWarning)
            settings = {"steps": steps, "sampler": sampler, "generators": generators}
            _, latents = bench.model.draw(some, condition, **settings)
        return {"images": eight_bit(bench.model.decode(latents).float().cpu())}

    seeds = [bench.first + bench.number + i for i in range(bench.number)]
    cache = ["drawn", key.fingerprint, *plan]
    return bench.batches(cache, make, noise, prompts, seeds, name=f"{sampler}: draw")["images"]


def figure_of(points: dict[str, np.ndarray], stochastic: dict[str, bool]) -> Figure:
    """log₁₀ p of every image, by sampler."""
    figure, (ax,) = panels(7, 5, across=1)
    for i, (name, p) in enumerate(points.items()):
        colour = "#d1495b" if stochastic[name] else "#1b3a5c"
        ax.plot(np.log10(np.maximum(p, 1e-300)), np.full(len(p), i), "o", color=colour, ms=4, alpha=0.7)
    ax.axvline(np.log10(ALPHA), color="grey", ls=":", lw=1)
    ax.set_yticks(range(len(points)), list(points), fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="log₁₀ p of each marked image; dotted: p = 0.001")
    return figure


@experiment(8)
@click.option("--sampler", "names", multiple=True, help="Only this row; may be repeated.  [default: all]")
def main(bench: Bench, names: tuple[str, ...]) -> None:
    """Which samplers keep the mark: p of images that each of them draws from the same marked noise."""
    key = bench.key(seed=SEED)
    scheme, rows, points, stochastic = scheme_of(key, bench.model.latent_shape), [], {}, {}
    for name, plan in plans(bench).items():
        if names and name not in names:
            continue
        sampler, steps, guidance, eta = plan
        arguments = {"num_inference_steps": steps, "eta": eta}
        stochastic[name] = adds_noise(bench.model.sampler(sampler, steps), arguments)
        _, p = bench.test(scheme, bench.noise_of(drawn(bench, key, plan), name))
        points[name] = p
        found = share(int((p <= ALPHA).sum()), len(p))
        row = {"sampler": name, "kind": WORDS[stochastic[name]], "steps": steps, "guidance": guidance, "n": len(p)}
        row |= {"median p": float(np.median(p)), "largest p": float(p.max()), "found": found["count"]}
        rows.append(row | {"low": found["low"], "high": found["high"]})
        click.echo(f"{name:16} {row['kind']:14} median p {row['median p']:.2g}, found {row['found']} of {len(p)}")
    bench.write(rows, figure_of(points, stochastic), alpha=ALPHA)
