"""Tiny random pipelines of every family: loading, marking, sampling as the pipeline does, inversion.

    python -m scripts.experiments families -o build/families                          # all, a minute
    python -m scripts.experiments families -o build/families --pipeline flux.1-dev    # seconds

The architectures are true, the weights are random: that a mark is found shows that it is planted and recovered in the
family's own form of latents, not how well a trained model keeps it. Each pipeline draws two pictures with prompts and
guidance 3 in eight steps, at three aspect ratios. Noise is recovered from the drawn latents, for the NMSE with the true
condition, for the mark with the empty prompt and without guidance, as `ringmark verify` does.
"""

from __future__ import annotations

import math
import tempfile
from functools import wraps
from typing import TYPE_CHECKING, Any

import click
import torch
from torch import Tensor

from ringmark.inversion.diffusion import invert, sample
from ringmark.inversion.methods import Anderson
from ringmark.inversion.metrics import nmse_db
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.embed import initial_noise, mark
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.base import make_key, scheme_of
from scripts.experiments.common import Bench, experiment, score_and_p
from scripts.experiments.plots import columns, panels
from tests.families import BUILDERS, build

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROMPTS = ["a red lake", "old hills under the moon"]
STEPS, GUIDANCE = 8, 3.0
SIDES = ((16, 16), (16, 24), (24, 16))  # of latents
SECRET = bytes(32)


def deterministic(scheduler: Any) -> Any:
    """The sampler whose steps are inverted. DDIM steps to the timesteps that it lists if they are trailing."""
    from diffusers import DDIMScheduler

    if "FlowMatch" in type(scheduler).__name__:
        return scheduler
    if scheduler.config.get("use_flow_sigmas"):
        return type(scheduler).from_config(scheduler.config, solver_order=1)
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, timestep_spacing="trailing")


def drawn(model: LatentModel, pipe: Any, size: tuple[int, int], **arguments: Any) -> Tensor:
    """Latents (2, C, h, w) that the pipeline draws of the prompts, read from its scheduler's last step."""
    last, own = [], pipe.scheduler.step

    @wraps(own)
    def step(*args: Any, **options: Any) -> Any:
        last[:] = own(*args, **options)[:1]
        return (*last,)

    pipe.scheduler.step = step
    condition = model.condition(PROMPTS, guidance=GUIDANCE)
    call = {"height": size[0], "width": size[1], "num_inference_steps": STEPS, "output_type": "latent"} | arguments
    try:
        pipe(**call, **condition.rows, **condition.options)
    finally:
        del pipe.scheduler.step
    _, height, width = model.noise_shape(size)
    return model.family.unpack(last[0], (height, width))


def measure(model: LatentModel, pipe: Any, size: tuple[int, int]) -> dict[str, float]:
    """Our walk against the pipeline's, the inversion of ours, and the p-value of the pipeline's marks."""
    shape = model.noise_shape(size)
    noise, schedule = initial_noise([0, 1], shape), model.schedule(STEPS, size)
    condition = model.condition(PROMPTS, guidance=GUIDANCE)
    ours = sample(model, noise, condition, schedule)
    theirs = drawn(model, pipe, size, latents=(model.family.given or model.family.pack)(noise))
    naive = invert(model, ours, condition, schedule)
    exact = invert(model, ours, condition, schedule, method=Anderson(), max_steps=5, tol=1e-4)
    return {
        "walk": float((ours - theirs).abs().max()),
        "naive dB": float(nmse_db(naive, noise).max()),
        "exact dB": float(nmse_db(exact, noise).max()),
        "p": marked_p(model, pipe, size),
    }


def marked_p(model: LatentModel, pipe: Any, size: tuple[int, int]) -> float:
    """The larger p-value of two pictures that the pipeline draws while it is marked."""
    shape, reference = model.noise_shape(size), (16 * model.factor, 16 * model.factor)
    key = make_key("tree-ring", kind=model.kind, reference=reference, model=model.identity, secret=SECRET, radii=(1, 4))
    with mark(pipe, key):
        latents = drawn(model, pipe, size, generator=torch.Generator().manual_seed(0))
    noise = invert(model, latents, model.nothing.expand(len(latents)), model.schedule(STEPS, size))
    return float(score_and_p(scheme_of(key, shape), Null.white(shape), noise)[1].max())


def row(name: str) -> dict[str, Any]:
    """The worst of all sizes. The pipeline is saved and loaded before."""
    with tempfile.TemporaryDirectory() as folder:
        build(name).save_pretrained(folder)
        model = LatentModel.from_pretrained(folder)
    model.pipe.scheduler = deterministic(model.pipe.scheduler)
    model = LatentModel(model.pipe, name=name)
    found = [measure(model, model.pipe, (h * model.factor, w * model.factor)) for h, w in SIDES]
    worst = {column: max(one[column] for one in found) for column in found[0]}
    kind = {"family": model.family.name, "pipeline": type(model.pipe).__name__, "name": name}
    latents = {"channels": model.channels, "factor": model.factor, "multiple": model.factor * model.family.patch}
    return kind | latents | worst | {"sizes": len(found), "usual sizes": len(model.family.sizes)}


def markdown(rows: list[dict]) -> str:
    """The rows as a table."""
    heads = ("family", "tiny pipeline", "latents", "loads", "walk − pipeline's", "noise NMSE naive, exact (dB)")
    heads += ("marked: p", "sides are multiples of", "usual sizes")
    lines = [heads, ("---",) * len(heads)]
    for r in rows:
        p = f"1e{math.log10(r['p']):.0f}" if r["p"] > 0 else "< 1e-300"
        latents = f"{r['channels']} × f{r['factor']}"
        lines.append(
            (r["family"], f"`{r['pipeline']}`, {r['name']}", latents, "yes", f"{r['walk']:.0e}")
            + (f"{r['naive dB']:.0f}, {r['exact dB']:.0f}", p, str(r["multiple"]), str(r["usual sizes"]))
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figure_of(rows: list[dict]) -> Figure:
    """NMSE of the recovered noise, naive and exact."""
    figure, (ax,) = panels(8, 0.4 * len(rows) + 1.5)
    for column in ("naive dB", "exact dB"):
        (nmse,) = columns(rows, column)
        ax.plot(nmse, range(len(rows)), "o", label=column.removesuffix(" dB"))
    ax.set_yticks(range(len(rows)), [r["name"] for r in rows])
    ax.set_xlabel(f"NMSE of the noise in {STEPS} steps, dB")
    ax.invert_yaxis()
    ax.legend()
    return figure


@experiment(model=False, drawing=False)
@click.option("--pipeline", "names", type=click.Choice(list(BUILDERS)), multiple=True, help="Only this; repeatable.")
def main(bench: Bench, names: tuple[str, ...]) -> None:
    """Every family of models on tiny random pipelines: loading, marking, walking, inverting."""
    rows = [row(name) for name in names or BUILDERS]
    click.echo(markdown(rows))
    bench.write(rows, figure_of(rows), steps=STEPS, guidance=GUIDANCE, sides=SIDES)
