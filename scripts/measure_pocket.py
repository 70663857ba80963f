"""Measure the embedded model and write its card, data/pocket/README.md, with the results.

    python -m scripts.measure_pocket              # about ten minutes on two cores

The card reports the reconstruction of held-out scenes, how well samples follow their prompts (judged by a classifier
trained on rendered scenes only), and a grid of samples.
"""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import fill

import click
import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor
from tqdm import tqdm

from ringmark.data.files import write_atomic
from ringmark.data.images import from_array, save_png, to_array
from ringmark.data.scene_classifier import ATTRIBUTES, CELLS, features, train_classifiers
from ringmark.data.scenes import Attributes, caption, draw_attributes, scene
from ringmark.inversion.models.loading import POCKET
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.embed import generate

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = 1_000_000  # as in train_pocket.py: never trained on

CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# pocket

A small latent diffusion model of landscapes, {size} x {size} pixels. It ships with ringmark for demonstrations, tests
and experiments. It was trained from scratch by `scripts/train_pocket.py` on procedural pictures (`data/scenes.py`)
only: nothing was downloaded and no photograph was used. It is an ordinary diffusers folder:

    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained("data/pocket")
    pipe("lake at sunset with snowy mountains, clouds", guidance_scale=3, num_inference_steps=25).images[0].show()

![36 samples]({grid})

{captions}

## What it is

| part | |
|---|---|
| autoencoder | `AutoencoderKL`, f = {factor}, {channels} latent channels, {vae_parameters:.2f} M parameters, \
scaling factor {scale} |
| network | `UNet2DConditionModel`, ε-prediction, {unet_parameters:.2f} M parameters |
| text | `CLIPTextModel`, {text_parameters:.2f} M parameters, with a tokenizer of {vocabulary} tokens |
| schedule | DDIM, scaled-linear betas {beta_start}-{beta_end}, no clipping |
| on disk | {megabytes:.1f} MB, float16 safetensors, training pictures and classifier not included |

Prompts have the form *GROUND at SKY with RELIEF, WEATHER, ACCENT*. Grounds: {grounds}. Skies:
{skies} ("in a storm", "in fog"). Reliefs: {reliefs}. Weathers and accents are listed in `data/scenes.py`.

## Measured

Measured by `python -m scripts.measure_pocket`, with seeds fixed in the script. Intervals are 95 % Clopper-Pearson.

| what | figure |
|---|---|
| reconstruction of {n_psnr} held-out scenes, PSNR | {psnr:.2f} dB (mean; standard deviation {psnr_sd:.2f}, \
worst {psnr_min:.2f}) |
| standard deviation of the four latent channels | {spread} |
{obeyed}

The classifier is scikit-learn's `ExtraTreesClassifier` on means, deviations and gradients in an {cells} x {cells} grid,
trained on {n_train} rendered scenes. The table gives its accuracy on {n_test} other rendered scenes beside the share
of the model's samples (guidance 3, 25 DDIM steps) that it assigns to the prompt.

## Training

{trained}
"""
TRAINED = "Trained by `python -m scripts.train_pocket{command}` on two cores: {times}. {remark}"


@torch.inference_mode()
def reconstruction(model: LatentModel, count: int) -> tuple[Tensor, Tensor]:
    """PSNR (n,) in dB of held-out scenes through the autoencoder, and the latents' deviation per channel (C,)."""
    psnr, latents = [], []
    for i in tqdm(range(0, count, 16), "reconstruction", disable=None):
        pixels = [scene(HELD_OUT + j).pixels for j in range(i, i + 16)]
        x = torch.from_numpy(np.stack([to_array(from_array(p.transpose(2, 0, 1) / 127.5 - 1)) for p in pixels]))
        latents.append(model.encode(x))
        error = (model.decode(latents[-1]).clamp(-1, 1) - x) / 2
        psnr.append(-10 * error.square().mean((1, 2, 3)).log10())
    return torch.cat(psnr), torch.cat(latents).std((0, 2, 3))


def draw_samples(model: LatentModel, attributes: list[Attributes], seed: int) -> list[np.ndarray]:
    """uint8 pictures (H, W, 3) drawn from the full captions of these attributes."""
    prompts = [caption(a) for a in attributes]
    with tqdm(total=len(prompts), desc="samples", disable=None) as bar:
        drawn = generate(model, prompts, list(range(seed, seed + len(prompts))), progress=bar.update)
        return [np.asarray(from_array(d.image.numpy())) for d in drawn]


def obedience(model: LatentModel, trees: dict, count: int) -> dict[str, tuple[int, int]]:
    """For each attribute, the number of samples in which the classifier finds what the prompt asks for."""
    rng = np.random.default_rng(HELD_OUT)
    asked = [draw_attributes(rng) for _ in range(count)]
    x = np.stack([features(p) for p in draw_samples(model, asked, seed=500_000)])
    return {
        name: (int((trees[name].predict(x) == [getattr(a, name) for a in asked]).sum()), count) for name in ATTRIBUTES
    }


def grid(model: LatentModel, path: Path) -> list[str]:
    """36 samples in a 6 x 6 picture; returns their captions."""
    rng = np.random.default_rng(36)
    asked = [draw_attributes(rng) for _ in range(36)]
    pictures = draw_samples(model, asked, seed=600_000)
    rows = [np.concatenate(pictures[i : i + 6], 1) for i in range(0, 36, 6)]
    save_png(from_array(np.concatenate(rows).transpose(2, 0, 1) / 127.5 - 1), path)
    return [caption(a) for a in asked]


def millions(module: torch.nn.Module) -> float:
    """Parameters."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def obeyed(name: str, figures: dict) -> str:
    """A row of the card: how often samples have an attribute of the prompt."""
    hits, n = figures["obeyed"][name]
    low, high = binomtest(hits, n).proportion_ci(method="exact")
    share, accuracy = f"{hits / n:.1%} of {n} samples [{low:.1%}, {high:.1%}]", figures["accuracy"][name]
    return f"| {name} as in the prompt | {share}; classifier on rendered scenes {accuracy:.1%} |"


def card(model: LatentModel, figures: dict, captions: list[str], folder: Path) -> str:
    """The model card in Markdown."""
    from ringmark.data.scenes import GROUNDS, RELIEFS, SKIES

    trained = json.loads((folder / "training.json").read_text())
    config = model.pipe.scheduler.config
    return CARD.format(
        size=model.image_size[0],
        factor=model.image_size[0] // model.latent_shape[1],
        channels=model.latent_shape[0],
        grid="samples.png",
        captions=fill(f"Captions of the grid, row by row: {'; '.join(captions)}.", 120),
        scale=model.vae.config.scaling_factor,
        vocabulary=len(model.pipe.tokenizer),
        vae_parameters=millions(model.vae),
        unet_parameters=millions(model.network),
        text_parameters=millions(model.pipe.text_encoder),
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        grounds=", ".join(GROUNDS),
        skies=", ".join(SKIES),
        reliefs=", ".join(filter(None, RELIEFS)),
        megabytes=sum(f.stat().st_size for f in folder.rglob("*.safetensors")) / 1e6,
        obeyed="\n".join(obeyed(name, figures) for name in ATTRIBUTES),
        cells=CELLS,
        trained=fill(TRAINED.format_map({"remark": ""} | trained), 120),
        **{k: v for k, v in figures.items() if k not in ("obeyed", "accuracy")},
    )


@click.command()
@click.option(
    "--folder", type=click.Path(path_type=Path), default=POCKET, show_default=True, help="The model to measure."
)
@click.option("--held-out", default=256, show_default=True, help="Scenes for the reconstruction.")
@click.option("--samples", default=200, show_default=True, help="Samples for the classifier.")
@click.option("--training-scenes", default=6000, show_default=True, help="Rendered scenes to train the classifier.")
def main(folder: Path, held_out: int, samples: int, training_scenes: int) -> None:
    """Measure the embedded model and write its card."""
    model = LatentModel.from_pretrained(folder)
    psnr, spread = reconstruction(model, held_out)
    click.echo(f"PSNR {psnr.mean():.2f} dB, channel deviations {[round(s, 3) for s in spread.tolist()]}")
    trees, accuracy = train_classifiers(training_scenes, 1000)
    click.echo(f"classifier on rendered scenes: {accuracy}")
    hits = obedience(model, trees, samples)
    click.echo(f"samples that follow the prompt: {hits}")
    captions = grid(model, folder / "samples.png")
    figures = {
        "n_psnr": len(psnr),
        "psnr": float(psnr.mean()),
        "psnr_sd": float(psnr.std()),
        "psnr_min": float(psnr.min()),
        "spread": ", ".join(f"{s:.2f}" for s in spread.tolist()),
        "obeyed": hits,
        "accuracy": accuracy,
        "n_train": training_scenes,
        "n_test": 1000,
    }
    write_atomic(folder / "README.md", card(model, figures, captions, folder))


if __name__ == "__main__":
    main()
