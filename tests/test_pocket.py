"""The embedded model is an ordinary diffusers folder, small enough to ship, and is sampled as diffusers samples it."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from ringmark.inversion.diffusion import sample
from ringmark.inversion.models.loading import POCKET
from ringmark.inversion.models.pipeline import LatentModel


def test_an_unmodified_pipeline_draws_what_ringmark_draws():
    pipe = StableDiffusionPipeline.from_pretrained(POCKET)
    pipe.set_progress_bar_config(disable=True)
    model = LatentModel.from_pretrained("pocket")
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    prompt = "lake at sunset with snowy mountains, clouds"
    theirs = pipe(prompt, latents=noise, num_inference_steps=5, guidance_scale=3.0, output_type="latent").images
    ours = sample(model, noise, model.condition([prompt], guidance=3.0), model.schedule(5))
    assert torch.allclose(ours, theirs, atol=1e-3)
    picture = np.asarray(pipe(prompt, latents=noise, num_inference_steps=2, guidance_scale=3.0).images[0])
    assert picture.shape == (128, 128, 3) and picture.std() > 10


def test_it_is_small_and_holds_no_pickle():
    files = [f for f in POCKET.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 20e6
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
