"""Measure the embedded rectified-flow model and write its card with the results.

    python -m scripts.measure_pocket_flow              # half an hour on one core

The card reports how well samples of 1, 4 and 25 steps follow their prompts (judged by the classifier of data/pocket's
card), how far one step is from 25, how straight the paths are, and a grid of samples.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import click
import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor
from tqdm import tqdm

from ringmark.data.files import write_atomic
from ringmark.data.images import from_array
from ringmark.data.scene_classifier import ATTRIBUTES, CELLS, features, train_classifiers
from ringmark.data.scenes import Attributes, caption, draw_attributes
from ringmark.inversion.models.flow import RectifiedFlowPipeline
from scripts.train_pocket import HELD_OUT, ROOT

STEPS = (1, 4, 25)
BATCH = 20

CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# pocket_flow

A small rectified-flow model of landscapes, 128 x 128 pixels: the sibling of `data/pocket`, with its autoencoder and
text encoder and a network that predicts velocity. The network starts from the weights of `data/pocket` and first
learns the velocity that follows from its noise prediction; it is then straightened on its own noise-latent pairs and
distilled to one step, as InstaFlow is. Trained by `scripts/train_pocket_flow.py` on procedural pictures alone
(`data/scenes.py`). It is an ordinary diffusers folder; `StableDiffusionPipeline` loads it, and a small subclass makes
it accept the scheduler:

    from ringmark.inversion.models.flow import RectifiedFlowPipeline
    pipe = RectifiedFlowPipeline.from_pretrained("data/pocket_flow")
    pipe("lake at sunset with snowy mountains, clouds", guidance_scale=1, num_inference_steps=1).images[0].show()

Guidance is distilled into the weights: draw with `guidance_scale=1`, or

    ringmark generate --model pocket_flow --key my.key --steps 1 --guidance 1 -n 4 -o marked

`noise_recovery.json` (192 images, seeds 900000 …) and `calibration.safetensors` (100 unmarked images, seeds 100000 …)
are of images drawn in one step; the former inverted in 25 steps, the latter in ten, the default of `ringmark verify`.
To keep this folder small, the calibration holds the full inversion alone, without early stages, and rings up to 10 of
the 12 that `ringmark calibrate` stores. That serves keys of the patterns rand and ring in the default placement; zeros
needs the rings beyond.

![samples at 1, 4 and 25 steps]({grid})

{captions}

## What it is

| part | |
|---|---|
| autoencoder, text encoder, tokenizer | those of `data/pocket` |
| network | `UNet2DConditionModel`, velocity ε − x0 at (1 − σ) x0 + σ ε, timestep 1000 σ, {parameters:.2f} M weights |
| schedule | `FlowMatchEulerDiscreteScheduler`, no shift; σ = 1, 1 − 1/N, …, 1/N |
| on disk | {megabytes:.1f} MB, float16 safetensors |

Prompts it knows are those of `data/pocket`.

## Measured

By `python -m scripts.measure_pocket_flow`, seeds fixed in the script; intervals are 95 %, Clopper-Pearson.

| what | 1 step | 4 steps | 25 steps | classifier on rendered scenes |
|---|---|---|---|---|
{obeyed}

| what | figure |
|---|---|
| latents of one step against 25 steps from the same noise, ‖a − b‖² / ‖b‖² | {distance[1]:.3f} |
| latents of 4 steps against 25 steps | {distance[4]:.3f} |
| deviation from straight paths, mean of ‖v(z_σ, σ) − (ε − x0)‖² / ‖ε − x0‖² over 25 steps | {bend:.4f} |

The classifier is scikit-learn's `ExtraTreesClassifier` on means, deviations and gradients in an {cells} x {cells} grid,
trained on {n_train} rendered scenes; its accuracy on {n_test} other rendered scenes stands in the last column. {n}
samples for each number of steps.

## Trained

{trained}
"""
ROWS = "Row by row: 1, 4 and 25 steps from the same noise."
TRAINED = "By `python -m scripts.train_pocket_flow{command}`, on one thread: {times}. {remark}"


@torch.inference_mode()
def draw(pipe: RectifiedFlowPipeline, prompts: Sequence[str], seed: int, steps: int) -> tuple[Tensor, list[np.ndarray]]:
    """Final latents (N, C, h, w) and uint8 pictures (H, W, 3), drawn with guidance 1 from noise of this seed."""
    channels, side = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    noise = torch.randn(len(prompts), channels, side, side, generator=torch.Generator().manual_seed(seed))
    latents = []
    for i in tqdm(range(0, len(prompts), BATCH), f"{steps} steps", disable=None):
        part = list(prompts[i : i + BATCH])
        drawn = pipe(
            part,
            latents=noise[i : i + BATCH],
            num_inference_steps=steps,
            guidance_scale=1.0,
            output_type="latent",
        )
        latents.append(drawn.images)
    z = torch.cat(latents)
    images = [pipe.vae.decode(part / pipe.vae.config.scaling_factor).sample for part in torch.split(z, BATCH)]
    return z, [np.asarray(from_array(image.numpy())) for image in torch.cat(images)]


@torch.inference_mode()
def bend(pipe: RectifiedFlowPipeline, prompts: Sequence[str], seed: int, steps: int = 25) -> float:
    """Mean of ‖v(z_σ, σ) − (ε − x0)‖² / ‖ε − x0‖² along the Euler paths of one batch; 0 for straight paths."""
    velocities: list[Tensor] = []
    hook = pipe.unet.register_forward_hook(lambda _module, _inputs, output: velocities.append(output[0].float()))
    draw(pipe, prompts[:BATCH], seed, steps)
    hook.remove()
    v = torch.stack(velocities)
    chord = v.mean(0)  # Euler's steps have equal length, so their mean is ε − x0
    return float(((v - chord).square().sum((2, 3, 4)) / chord.square().sum((1, 2, 3))).mean())


def obedience(pictures: list[np.ndarray], asked: list[Attributes], trees: dict[str, Any]) -> dict[str, int]:
    """For each attribute, the number of pictures in which the classifier finds what the prompt asks for."""
    x = np.stack([features(p) for p in pictures])
    return {name: int((trees[name].predict(x) == [getattr(a, name) for a in asked]).sum()) for name in ATTRIBUTES}


def grid(pipe: RectifiedFlowPipeline, path: Path, columns: int = 6, rows: int = 1) -> list[str]:
    """Draw a grid of rows x columns captions, with 1, 4 and 25 steps below each other; returns the captions."""
    rng = np.random.default_rng(36)
    prompts = [caption(draw_attributes(rng)) for _ in range(columns * rows)]
    drawn = [draw(pipe, prompts, 600_000, steps)[1] for steps in STEPS]
    strips = [
        np.concatenate(pictures[i : i + columns], 1) for i in range(0, len(prompts), columns) for pictures in drawn
    ]
    from_array(np.concatenate(strips).transpose(2, 0, 1) / 127.5 - 1).save(path, quality=80, method=6)
    return prompts


def obeyed_rows(hits: dict[int, dict[str, int]], count: int, accuracy: dict[str, float]) -> str:
    rows = []
    for name in ATTRIBUTES:
        cells = []
        for steps in STEPS:
            low, high = binomtest(hits[steps][name], count).proportion_ci(method="exact")
            cells.append(f"{hits[steps][name] / count:.1%} [{low:.1%}, {high:.1%}]")
        rows.append(f"| {name} as in the prompt | {' | '.join(cells)} | {accuracy[name]:.1%} |")
    return "\n".join(rows)


@click.command()
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=ROOT / "data" / "pocket_flow",
    show_default=True,
    help="The model to measure.",
)
@click.option("--samples", default=200, show_default=True, help="Samples for the classifier, for each number of steps.")
@click.option("--training-scenes", default=4000, show_default=True, help="Rendered scenes to train the classifier.")
@click.option("--test-scenes", default=1000, show_default=True, help="Rendered scenes to test the classifier.")
def main(folder: Path, samples: int, training_scenes: int, test_scenes: int) -> None:
    """Measure the embedded rectified-flow model and write its card."""
    pipe = RectifiedFlowPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(HELD_OUT)
    asked = [draw_attributes(rng) for _ in range(samples)]
    prompts = [caption(a) for a in asked]
    drawn = {steps: draw(pipe, prompts, 500_000, steps) for steps in STEPS}
    captions = grid(pipe, folder / "samples.webp")
    trees, accuracy = train_classifiers(training_scenes, test_scenes)
    hits = {steps: obedience(pictures, asked, trees) for steps, (_, pictures) in drawn.items()}
    click.echo(f"samples of {samples} that follow the prompt: {hits}; classifier on rendered scenes: {accuracy}")
    reference = drawn[STEPS[-1]][0]
    distance = {s: float((z - reference).square().sum() / reference.square().sum()) for s, (z, _) in drawn.items()}
    trained = json.loads((folder / "training.json").read_text())
    text = CARD.format(
        grid="samples.webp",
        captions=fill(f"{ROWS} Captions from left to right: {'; '.join(captions)}.", 120),
        parameters=sum(p.numel() for p in pipe.unet.parameters()) / 1e6,
        megabytes=sum(f.stat().st_size for f in folder.glob("*/*.safetensors")) / 1e6,
        obeyed=obeyed_rows(hits, samples, accuracy),
        distance=distance,
        bend=bend(pipe, prompts, 500_000),
        cells=CELLS,
        n_train=training_scenes,
        n_test=test_scenes,
        n=samples,
        trained=fill(TRAINED.format_map({"remark": ""} | trained), 120),
    )
    write_atomic(folder / "README.md", text)


if __name__ == "__main__":
    main()
