"""The embedded rectified-flow model is drawn as its pipeline draws it, and the walk back finds the noise."""

from __future__ import annotations

import pytest
import torch

from ringmark.inversion.diffusion import invert, sample
from ringmark.inversion.methods import Anderson
from ringmark.inversion.metrics import nmse_db
from ringmark.inversion.models.flow import RectifiedFlowPipeline
from ringmark.inversion.models.loading import EMBEDDED
from ringmark.inversion.models.pipeline import LatentModel

FOLDER, PROMPT = EMBEDDED["pocket_flow"], "lake at sunset with snowy mountains, clouds"


@pytest.fixture(scope="module")
def model() -> LatentModel:
    return LatentModel.from_pretrained("pocket_flow")


@pytest.fixture(scope="module")
def pipe() -> RectifiedFlowPipeline:
    pipe = RectifiedFlowPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def noise(model) -> torch.Tensor:
    return torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))


def test_it_is_found_by_its_name(model):
    assert model.name == "pocket_flow" and model.prediction == "flow_prediction"
    assert model.kind == {"family": "rectified-flow", "channels": 4, "factor": 4}


@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (4, 2.0), (25, 1.0)])
def test_the_walk_is_the_pipelines_own(model, pipe, noise, steps, guidance):
    drawing = {"latents": noise, "num_inference_steps": steps, "guidance_scale": guidance, "output_type": "latent"}
    ours = sample(model, noise, model.condition([PROMPT], guidance=guidance), model.schedule(steps))
    assert torch.allclose(ours, pipe(PROMPT, **drawing).images, atol=1e-4)


def test_exact_inversion_finds_the_noise(model, noise):
    cond, schedule = model.condition([PROMPT]), model.schedule(8)
    latents = sample(model, noise, cond, schedule)
    naive = invert(model, latents, cond, schedule)
    exact = invert(model, latents, cond, schedule, method=Anderson(), max_steps=5, tol=1e-5)
    assert nmse_db(exact, noise) < min(-25, nmse_db(naive, noise) - 15)


def test_one_step_draws_a_picture(pipe, noise):
    picture = pipe(PROMPT, latents=noise, num_inference_steps=1, guidance_scale=1.0, output_type="np").images[0]
    assert picture.shape == (128, 128, 3) and picture.std() > 0.05


def test_it_is_small_and_holds_no_pickle():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 12.96e6  # 13 MB with the folders
    assert not [f for f in FOLDER.rglob("*") if f.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_its_configs_name_no_folder_that_parts_came_from():
    assert not [f for f in FOLDER.glob("*/config.json") if "_name_or_path" in f.read_text(encoding="utf-8")]
