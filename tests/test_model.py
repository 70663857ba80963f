"""One adapter for every latent diffusion model: true architectures, written small, read back, or refused in one line."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from ringmark.errors import ModelError
from ringmark.inversion.memory import stored_bytes
from ringmark.inversion.models.loading import resolve
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.schedule import Schedule

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_unet(**config):
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


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="session")
def sd1(tmp_path_factory, tiny_parts):
    """Stable Diffusion 1.5: PNDM, ε, attention in the autoencoder's middle; 64×96 images."""
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


@pytest.mark.parametrize(
    ("which", "latent_shape", "image_size", "scale", "prediction"),
    [
        ("sd1", (4, 8, 12), (64, 96), 0.18215, "epsilon"),
        ("sd2", (4, 8, 8), (16, 16), 0.7, "v_prediction"),
        ("taesd", (4, 8, 8), (64, 64), 1.0, "sample"),
    ],
)
def test_everything_is_read_from_the_configs(request, which, latent_shape, image_size, scale, prediction):
    model = LatentModel.from_pretrained(request.getfixturevalue(which))
    assert model.latent_shape == latent_shape and model.image_size == image_size
    assert model.scale == scale and model.prediction == prediction
    assert model.name == which and model.recovery is None
    assert set(model.identity) == {"name", "fingerprint", "latent_shape"} and json.dumps(model.identity)
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    assert not any(p.requires_grad for m in (model.vae, model.unet, model.text_encoder) for p in m.parameters())
    assert not (model.vae.training or model.unet.training or model.text_encoder.training)

    with torch.inference_mode():
        images = draw(2, 3, *image_size).clamp(-1, 1)
        latents = model.encode(images)
        assert latents.shape == (2, *latent_shape) and torch.equal(latents, model.encode(images))
        decoded = model.decode(latents)
        assert decoded.shape == images.shape and decoded.isfinite().all()

        cond = model.embed(["a lake", ""])
        assert cond.shape == (2, 24, 16) and not torch.equal(cond[0], cond[1])
        schedule = model.schedule(2)
        x0, eps = model.predict(latents, 2, schedule, cond)
        assert x0.shape == eps.shape == latents.shape and eps.isfinite().all()
        a, s = schedule.at(2)
        assert torch.allclose(a * x0 + s * eps, latents, rtol=1e-3, atol=1e-4)
        for i in range(2):
            alone = model.predict(latents[i : i + 1], 2, schedule, cond[i : i + 1])[1]
            assert torch.allclose(alone[0], eps[i], rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_latents_are_the_scaled_mode_of_the_posterior(sd1):
    model = LatentModel.from_pretrained(sd1)
    images = draw(2, 3, 64, 96).clamp(-1, 1)
    posterior = model.vae.encode(images).latent_dist
    assert torch.equal(model.encode(images), posterior.mode() * 0.18215)
    assert torch.allclose(model.decode(model.encode(images)), model.vae.decode(posterior.mode()).sample, atol=1e-5)


@torch.inference_mode()
def test_a_shift_of_latents_is_undone_by_decoding(copy):
    edit(copy / "vae" / "config.json", shift_factor=0.3)
    model, images = LatentModel.from_pretrained(copy), draw(1, 3, 16, 16)
    mode = model.vae.encode(images).latent_dist.mode()
    assert torch.allclose(model.encode(images), (mode - 0.3) * 0.7)
    assert torch.allclose(model.decode(model.encode(images)), model.vae.decode(mode).sample, atol=1e-5)


@torch.inference_mode()
def test_the_tiny_autoencoder_has_latents_and_no_posterior(taesd):
    model, images = LatentModel.from_pretrained(taesd), draw(1, 3, 64, 64).clamp(-1, 1)
    assert torch.equal(model.encode(images), model.vae.encode(images).latents)


@pytest.mark.parametrize("t", [1, 333, 999])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_whatever_is_predicted_becomes_x0_and_eps(tiny_parts, monkeypatch, prediction, t):
    scheduler = DDIMScheduler(**BETAS, prediction_type=prediction)
    model = LatentModel(**tiny_parts | {"scheduler": scheduler}, name="tiny")
    x, eps, at = draw(2, 4, 8, 8), draw(2, 4, 8, 8, seed=1), torch.tensor([t])
    z = scheduler.add_noise(x, eps, at)
    answer = {"epsilon": eps, "sample": x, "v_prediction": scheduler.get_velocity(x, eps, at)}[prediction]
    monkeypatch.setattr(model.unet, "forward", lambda *args, **kwargs: (answer,))
    schedule = Schedule.from_alpha_bar(scheduler.alphas_cumprod, at)
    x0_found, eps_found = model.predict(z, 1, schedule, None)
    assert torch.allclose(eps_found, eps, rtol=1e-4, atol=2e-5)
    assert torch.allclose(x0_found, x, rtol=1e-3, atol=2e-5)


def test_embed_is_the_text_encoders_last_state(sd1):
    model = LatentModel.from_pretrained(sd1)
    long = "a lake under the hills " * 20
    ids = model.tokenizer([long], truncation=True, max_length=24, return_tensors="pt").input_ids
    assert ids.shape == (1, 24)
    with torch.inference_mode():
        assert torch.allclose(model.embed([long]), model.text_encoder(ids).last_hidden_state)
    assert torch.allclose(model.embed(["a", long])[1:], model.embed([long]), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_a_model_in_sixteen_bits_is_the_same_model(sd1, dtype):
    model, half = LatentModel.from_pretrained(sd1), LatentModel.from_pretrained(str(sd1), dtype=dtype)
    assert half.dtype == half.vae.dtype == half.text_encoder.dtype == dtype
    assert half.identity == model.identity
    images = draw(1, 3, 64, 96).clamp(-1, 1)
    latents = half.encode(images)
    assert latents.dtype == dtype and torch.allclose(latents.float(), model.encode(images), atol=0.05)
    for dtype in (latents.dtype, torch.float32):
        x0, eps = half.predict(latents.to(dtype), 1, half.schedule(5), half.embed([""]))
        assert x0.dtype == eps.dtype == torch.float32


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_the_fingerprint_changes_with_any_weight(copy, part):
    before = LatentModel.from_pretrained(copy).identity
    assert LatentModel.from_pretrained(copy).identity == before
    weights = load_file(copy / part / WEIGHTS[part])
    key = sorted(weights)[len(weights) // 2]
    save_file(weights | {key: weights[key] + 0.5}, copy / part / WEIGHTS[part], metadata={"format": "pt"})
    after = LatentModel.from_pretrained(copy).identity
    assert after["fingerprint"] != before["fingerprint"] and after["name"] == before["name"]


@pytest.mark.parametrize(
    "part, change",
    [
        ("scheduler", {"prediction_type": "sample"}),
        ("scheduler", {"beta_end": 0.02}),
        ("vae", {"scaling_factor": 0.5}),
    ],
)
def test_the_fingerprint_changes_with_what_the_weights_predict(copy, part, change):
    before = LatentModel.from_pretrained(copy).identity
    (file,) = (copy / part).glob("*config.json")
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"_diffusers_version": "0"}))
    assert LatentModel.from_pretrained(copy).identity == before
    file.write_text(json.dumps(config | change))
    assert LatentModel.from_pretrained(copy).identity["fingerprint"] != before["fingerprint"]


def test_the_fingerprint_does_not_depend_on_the_version_of_transformers(tiny_parts):
    """Version 4 holds the text encoder's tensors under text_model."""

    class Version4(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.text_model = encoder

    old = tiny_parts | {"text_encoder": Version4(tiny_parts["text_encoder"])}
    assert LatentModel(**old, name="a").identity == LatentModel(**tiny_parts, name="a").identity


def test_text_encoders_saved_by_either_version_load(copy):
    before = LatentModel.from_pretrained(copy).identity
    path = copy / "text_encoder" / WEIGHTS["text_encoder"]
    bare = {k.removeprefix("text_model."): v for k, v in load_file(path).items()}
    for prefix in ("", "text_model."):
        save_file({prefix + k: v for k, v in bare.items()}, path, metadata={"format": "pt"})
        assert LatentModel.from_pretrained(copy).identity == before


def test_a_pipeline_is_wrapped_as_it_is(tiny_parts):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        **tiny_parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.to(torch.bfloat16)
    try:
        model = LatentModel.from_pipeline(pipe, name="mine")
        assert model.vae is pipe.vae is tiny_parts["vae"] and model.unet is pipe.unet
        assert model.text_encoder is pipe.text_encoder and model.tokenizer is pipe.tokenizer
        assert model.scheduler is pipe.scheduler and model.name == "mine"
        assert {p.dtype for p in model.unet.parameters()} == {torch.bfloat16} == {model.dtype}
        assert all(p.requires_grad for p in model.unet.parameters())
    finally:
        pipe.to(torch.float32)


@pytest.mark.parametrize("which", ["sd1", "sd2", "taesd"])
def test_levels_ascend_through_the_schedule(request, which):
    model = LatentModel.from_pretrained(request.getfixturevalue(which))
    for steps in (1, 2, 7, 50, 500):
        schedule, alpha_bar = model.schedule(steps), model.scheduler.alphas_cumprod.double()
        assert len(schedule) == steps and schedule.signal.shape == (steps + 1,)
        assert (schedule.timesteps.diff() > 0).all() and (schedule.signal[1:].diff() < 0).all()
        assert schedule.timesteps[0] == {"sd1": 1, "sd2": 1, "taesd": 0}[which]
        assert schedule.at(0)[0] == (1.0 if which == "taesd" else float(alpha_bar[0]) ** 0.5)
        assert torch.equal(schedule.signal[1:], alpha_bar[schedule.timesteps].sqrt())


@pytest.mark.parametrize("steps", [-1, 0, 1000, 1001, 10**9])
def test_steps_that_the_schedule_has_not(tiny_parts, steps):
    """With an offset of 1 the thousandth step would start beyond the schedule."""
    with pytest.raises(ModelError) as caught:
        LatentModel(**tiny_parts, name="tiny").schedule(steps)
    assert (caught.value.code, caught.value.subject) == ("model.steps", "tiny")


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_a_schedule_that_ends_in_pure_noise(copy, steps):
    edit(copy / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert LatentModel.from_pretrained(copy).schedule(steps).at(steps) == (0, 1)


# -- what is refused ------------------------------------------------------------------------------------------------


def refused(source, *words):
    with pytest.raises(ModelError) as caught:
        LatentModel.from_pretrained(source)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in (Path(source).name, *words):
        assert word in message, message
    return message


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere/to/be/found"])
def test_a_folder_that_is_missing(source):
    refused(source, "not a diffusers model")


def test_a_folder_or_file_that_is_no_model(tmp_path):
    refused(tmp_path, "model_index.json")
    (tmp_path / "model.safetensors").touch()
    refused(tmp_path / "model.safetensors", "not a diffusers model")


@pytest.mark.parametrize("source", ["somebody/some-model", "some-model"])
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")
def test_a_hub_id_that_cannot_be_reached(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(source, "no such folder", "hub")


def test_a_relative_or_home_folder_is_found(copy, monkeypatch):
    fingerprint = LatentModel.from_pretrained(copy).identity["fingerprint"]
    monkeypatch.chdir(copy)
    here = LatentModel.from_pretrained(".")
    assert here.name == "copy" and here.identity["fingerprint"] == fingerprint
    monkeypatch.setenv("HOME", str(copy.parent))
    assert resolve("~/copy") == str(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_is_missing(copy, part):
    shutil.rmtree(copy / part)
    refused(copy)


@pytest.mark.parametrize("damage", ["cut", "garbage"])
@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_that_are_damaged(copy, part, damage):
    path = copy / part / WEIGHTS[part]
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "garbage": b"garbage " * 99}[damage])
    refused(copy)


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("change", ["lost", "reshaped"])
def test_weights_that_are_not_all_there(copy, part, change):
    """The libraries would fill the gap with random numbers."""
    path = copy / part / WEIGHTS[part]
    weights = load_file(path)
    key = sorted(weights)[0]
    lost = weights.pop(key)
    save_file(weights | ({} if change == "lost" else {key: lost[:1]}), path, metadata={"format": "pt"})
    message = refused(copy)
    assert change == "reshaped" or "missing" in message


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("part", WEIGHTS)
def test_nothing_is_unpickled(copy, part):
    (copy / part / WEIGHTS[part]).unlink()
    exploded = copy / "exploded"
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "diffusion_pytorch_model.pth"):
        (copy / part / name).write_bytes(pickle.dumps(Bomb(exploded)))
    refused(copy)
    assert not exploded.exists()


@pytest.mark.parametrize(
    "path",
    [f"{part}/config.json" for part in WEIGHTS] + ["scheduler/scheduler_config.json", "tokenizer/tokenizer.json"],
)
@pytest.mark.parametrize("content", ["{", "[]"])
@pytest.mark.filterwarnings("ignore:It is deprecated to pass")
def test_configs_that_are_damaged(copy, path, content):
    (copy / path).write_text(content)
    refused(copy)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"addition_embed_type": "text", "addition_embed_type_num_heads": 2}, "SDXL"),
        ({"in_channels": 9}, "inpainting"),
        ({"num_class_embeds": 3}, "more than a prompt"),
    ],
)
def test_networks_that_need_more_than_a_prompt(copy, config, word):
    make_unet(block_out_channels=(8, 8, 8, 8), attention_head_dim=4, **config).save_pretrained(copy / "unet")
    refused(copy, word)


def test_a_network_without_a_size(copy):
    edit(copy / "unet" / "config.json", sample_size=None)
    refused(copy, "sample_size")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "Nonesuch"}, "Nonesuch"),
        ({"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
        ({"_class_name": None}, "None"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
    ],
)
def test_schedulers_without_a_schedule_of_alpha_bar(copy, changes, word):
    edit(copy / "scheduler" / "scheduler_config.json", **changes)
    refused(copy, word)


def test_a_damaged_recovery_is_named(copy):
    (copy / "noise_recovery.json").write_text("{")
    with pytest.raises(ModelError, match=r"noise_recovery\.json"):
        LatentModel.from_pretrained(copy)


def test_loading_is_silent_and_leaves_the_libraries_as_they_were(copy, capfd):
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in (ours, theirs)]
    LatentModel.from_pretrained(copy)
    shutil.rmtree(copy / "vae")
    refused(copy)
    assert [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in (ours, theirs)] == before
    assert capfd.readouterr() == ("", "")


def test_lean_gradients_store_less_and_are_nearly_the_same(tiny_parts):
    model = LatentModel(**tiny_parts, name="tiny")
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def gradient():
        x = z.clone().requires_grad_()
        return torch.autograd.grad(model.decode(x).float().square().sum(), x)[0]

    plain, stored = gradient(), stored_bytes(model.decode, z, model.vae.parameters())
    with model.lean():
        assert model.vae.is_gradient_checkpointing
        less, kept = gradient(), stored_bytes(model.decode, z, model.vae.parameters())
    assert (less - plain).norm() < 0.05 * plain.norm() and not torch.equal(less, plain)
    assert kept < 0.5 * stored
    assert not model.vae.is_gradient_checkpointing and torch.equal(gradient(), plain)
