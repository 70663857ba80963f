"""Tests run offline and draw the same examples every time; a tiny latent diffusion model for those that need one."""

from __future__ import annotations

import csv
import json
import os
import random
import secrets
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; processes they start inherit this
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

pytest_plugins = ["checkpoints"]

settings.register_profile("ringmark", deadline=None, derandomize=True, database=None)
settings.load_profile("ringmark")


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    _seed_secrets(f"{request.node.nodeid} {fixturedef.argname}")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    _seed_secrets(pyfuncitem.nodeid)


def _seed_secrets(name: str) -> None:
    """The same keys in every run: of hundreds of p-values of random keys, one may well be below a thousandth."""
    secrets.token_bytes = random.Random(name).randbytes


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory):
    """A folder for what commands keep in the user's cache."""
    os.environ["RINGMARK_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def pocket():
    """The embedded model, loaded once."""
    from ringmark.inversion.models.pipeline import LatentModel

    return LatentModel.from_pretrained("pocket")


@pytest.fixture
def bench(pocket, tmp_path):
    """A run of an experiment on the embedded model, or on another: `bench(model=…, seed=…)`."""
    from scripts.experiments.common import Bench

    def make(model=pocket, **settings):
        made = Bench("test", tmp_path, **settings)
        vars(made)["model"] = model  # where the property keeps what it has loaded
        return made

    return make


@pytest.fixture
def smooth_pictures(tmp_path):
    """A folder of this many unmarked pictures of pocket's size, smoothed noise."""

    def make(number: int) -> Path:
        import torch

        from ringmark.data.images import from_array

        folder, generator = tmp_path / "smooth", torch.Generator().manual_seed(0)
        folder.mkdir()
        for i in range(number):
            noise = torch.randn(3, 128, 128, generator=generator)
            smooth = 3 * torch.nn.functional.avg_pool2d(noise, 9, 1, 4)
            from_array(smooth.clamp(-1, 1).numpy()).save(folder / f"{i}.png")
        return folder

    return make


@pytest.fixture
def experiment():
    """Run an experiment as a command in this process; its results as read back from JSON."""
    from click.testing import CliRunner

    from scripts.experiments.__main__ import main

    def run(name: str, out: Path, *options: object, figure: bool = True) -> dict:
        done = CliRunner().invoke(main, [name, "-o", str(out), *map(str, options)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        for suffix in ("csv", "png", "svg") if figure else ("csv",):
            assert (out / f"{name}.{suffix}").stat().st_size > 100
        found = json.loads((out / f"{name}.json").read_text())
        assert len(list(csv.DictReader((out / f"{name}.csv").open()))) == len(found["rows"])
        return found

    return run


@pytest.fixture(scope="session")
def tiny_parts():
    """The modules of a random latent diffusion model: 4×8×8 latents, 16×16 images, the pocket model's tokenizer."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from ringmark.inversion.models.loading import POCKET

    tokenizer = CLIPTokenizer.from_pretrained(POCKET, subfolder="tokenizer")
    torch.manual_seed(0)
    return {
        "vae": AutoencoderKL(
            block_out_channels=[8, 8],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.7,
        ).eval(),
        "unet": UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
        ).eval(),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                eos_token_id=tokenizer.eos_token_id,
            )
        ).eval(),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
    }


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a key, two marked and two unmarked images, drawn in a few steps."""
    from shell import run

    folder = tmp_path_factory.mktemp("house")
    run("keygen", "-o", folder / "my.key")
    run("generate", "--key", folder / "my.key", "-n", 2, "-o", folder / "images/marked", "--steps", 4)
    run("generate", "--no-mark", "-n", 2, "--seed", 2, "-o", folder / "images/unmarked", "--steps", 4)
    return folder
