"""Fixtures: checkpoints as Stable Diffusion's repositories hold them, of true architectures, written small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def draw(*shape, seed=0):
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_unet(**config):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32, 32, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": 16,
            "attention_head_dim": 8,
        }
        | config
    )


def write_model(folder, tokenizer, *, vae, unet, scheduler):
    """A checkpoint as Stable Diffusion's repositories hold one, with the parts that we do not read left out."""
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        eos_token_id=tokenizer.eos_token_id,
    )
    parts = {"vae": vae, "unet": unet, "text_encoder": CLIPTextModel(text), "scheduler": scheduler}
    for part, module in (parts | {"tokenizer": tokenizer}).items():
        module.save_pretrained(folder / part)
    index = {part: ["diffusers", type(module).__name__] for part, module in parts.items()}
    index |= {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0"}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def pipeline(parts):
    """A pipeline of these modules."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def wrap(parts, name="tiny"):
    """A model of these modules."""
    from ringmark.inversion.models.pipeline import LatentModel

    return LatentModel(pipeline(parts), name=name)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="session")
def sd1(tmp_path_factory, tiny_parts):
    """Stable Diffusion 1.5: PNDM, ε, attention in the autoencoder's middle; 64×96 images."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler

    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    )
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    folder = write_model(
        tmp_path_factory.mktemp("models") / "sd1",
        tiny_parts["tokenizer"],
        vae=vae,
        unet=make_unet(sample_size=[8, 12]),
        scheduler=scheduler,
    )
    edit(folder / "scheduler" / "scheduler_config.json", clip_sample=False)
    return folder


@pytest.fixture(scope="session")
def sd2(tmp_path_factory, tiny_parts):
    """Stable Diffusion 2.1: v, linear projections, a list of attention heads; here an autoencoder of factor 2."""
    import torch
    from diffusers import DDIMScheduler

    torch.manual_seed(2)
    return write_model(
        tmp_path_factory.mktemp("models") / "sd2",
        tiny_parts["tokenizer"],
        vae=tiny_parts["vae"],
        unet=make_unet(use_linear_projection=True, attention_head_dim=[2, 4, 4, 4]),
        scheduler=DDIMScheduler(
            **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
        ),
    )


@pytest.fixture(scope="session")
def taesd(tmp_path_factory, tiny_parts):
    """With the tiny autoencoder, which has latents and no posterior."""
    import torch
    from diffusers import AutoencoderTiny, DDIMScheduler

    torch.manual_seed(3)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    return write_model(
        tmp_path_factory.mktemp("models") / "taesd",
        tiny_parts["tokenizer"],
        vae=vae,
        unet=make_unet(),
        scheduler=DDIMScheduler(**BETAS, prediction_type="sample"),
    )


@pytest.fixture(scope="session")
def small(tmp_path_factory, tiny_parts):
    """The quickest to load."""
    parts = {part: tiny_parts[part] for part in ("vae", "unet", "scheduler")}
    return write_model(tmp_path_factory.mktemp("models") / "small", tiny_parts["tokenizer"], **parts)


@pytest.fixture
def copy(small, tmp_path):
    return Path(shutil.copytree(small, tmp_path / "copy"))


def refused(source, code, *words):
    """The error of loading a model that cannot be used: it has this code and one short line with these words."""
    from ringmark.errors import ModelError
    from ringmark.inversion.models.pipeline import LatentModel

    with pytest.raises(ModelError) as caught:
        LatentModel.from_pretrained(source)
    message = str(caught.value)
    assert caught.value.code == code, message
    assert "\n" not in message and len(message) < 500
    for word in (Path(source).name, *words):
        assert word in message, message
    return message
