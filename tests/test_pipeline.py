"""One adapter for every latent diffusion model: true architectures, written small, as maps, or refused in one line."""

from __future__ import annotations

import copy as copying
import json

import accelerate
import pytest
import torch
from checkpoints import BETAS, WEIGHTS, draw, edit, make_unet, pipeline, refused, wrap
from diffusers import DDIMScheduler
from families import build
from safetensors.torch import load_file, save_file

from ringmark.errors import ModelError
from ringmark.inversion.memory import stored_bytes
from ringmark.inversion.models.loading import quiet
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.schedule import Schedule


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
    assert model.vae.config.scaling_factor == scale and model.prediction == prediction
    assert model.name == which and model.recovery is None
    assert set(model.identity) == {"name", "fingerprint", *model.kind} and json.dumps(model.identity)
    assert model.kind == {"family": "stable-diffusion", "channels": 4, "factor": image_size[0] // latent_shape[1]}
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    assert not any(p.requires_grad for m in (model.vae, model.network, model.pipe.text_encoder) for p in m.parameters())
    assert not (model.vae.training or model.network.training or model.pipe.text_encoder.training)

    with torch.inference_mode():
        images = draw(2, 3, *image_size).clamp(-1, 1)
        latents = model.encode(images)
        assert latents.shape == (2, *latent_shape) and torch.equal(latents, model.encode(images))
        decoded = model.decode(latents)
        assert decoded.shape == images.shape and decoded.isfinite().all()

        cond = model.condition(["a lake", ""])
        states = cond.rows["prompt_embeds"]
        assert states.shape == (2, 24, 16) and not torch.equal(states[0], states[1])
        assert torch.allclose(states[1:], model.empty["prompt_embeds"], atol=1e-6)
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
    model = wrap(tiny_parts | {"scheduler": scheduler})
    x, eps, at = draw(2, 4, 8, 8), draw(2, 4, 8, 8, seed=1), torch.tensor([t])
    z = scheduler.add_noise(x, eps, at)
    answer = {"epsilon": eps, "sample": x, "v_prediction": scheduler.get_velocity(x, eps, at)}[prediction]
    monkeypatch.setattr(model.network, "forward", lambda *args, **kwargs: (answer,))
    schedule = Schedule.from_alpha_bar(scheduler.alphas_cumprod, at)
    x0_found, eps_found = model.predict(z, 1, schedule, model.nothing.expand(2))
    assert torch.allclose(eps_found, eps, rtol=1e-4, atol=2e-5)
    assert torch.allclose(x0_found, x, rtol=1e-3, atol=2e-5)


def test_a_condition_is_the_text_encoders_last_state(sd1):
    model = LatentModel.from_pretrained(sd1)
    long = "a lake under the hills " * 20
    ids = model.pipe.tokenizer([long], truncation=True, max_length=24, return_tensors="pt").input_ids
    assert ids.shape == (1, 24)
    states = model.condition([long]).rows["prompt_embeds"]
    with torch.inference_mode():
        assert torch.allclose(states, model.pipe.text_encoder(ids).last_hidden_state)
    assert torch.allclose(model.condition(["a", long]).rows["prompt_embeds"][1:], states, atol=1e-6)


def test_guidance_leads_away_from_the_negative_prompt(sd1):
    model = LatentModel.from_pretrained(sd1)
    plain, guided = model.condition(["a", "b"]), model.condition(["a", "b"], guidance=3.0, negative="c")
    assert set(plain.rows) == {"prompt_embeds"} and plain.options == {"guidance_scale": 1.0}
    assert guided.options == {"guidance_scale": 3.0}
    away = model.condition(["c"]).expand(2).rows["prompt_embeds"]
    assert torch.equal(guided.rows["negative_prompt_embeds"], away)


def test_the_empty_prompt_needs_no_text_encoder_if_it_is_known(tiny_parts):
    model = wrap(tiny_parts)
    blind = pipeline(tiny_parts | {"text_encoder": None, "tokenizer": None})
    again = LatentModel(blind, name="tiny", empty=model.empty)
    z, schedule = draw(2, *model.latent_shape), model.schedule(4)
    for one, other in zip(*(m.predict(z, 2, schedule, m.nothing.expand(2)) for m in (model, again)), strict=True):
        assert torch.equal(one, other)
    assert again.identity == model.identity
    with pytest.raises(ModelError) as caught:
        again.condition(["a lake"])
    assert caught.value.code == "model.no-text"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_a_model_in_sixteen_bits_is_the_same_model(sd1, dtype):
    model, half = LatentModel.from_pretrained(sd1), LatentModel.from_pretrained(str(sd1), dtype=dtype)
    assert half.dtype == half.vae.dtype == half.pipe.text_encoder.dtype == dtype
    assert half.identity == model.identity
    images = draw(1, 3, 64, 96).clamp(-1, 1)
    latents = half.encode(images)
    whole = model.encode(images)
    assert latents.dtype == dtype and (latents.float() - whole).norm() < 0.2 * whole.norm()
    for dtype in (latents.dtype, torch.float32):
        x0, eps = half.predict(latents.to(dtype), 1, half.schedule(5), half.nothing)
        assert x0.dtype == eps.dtype == torch.float32


@pytest.mark.parametrize("part", ["unet", "vae"])
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


@torch.no_grad()
def test_a_pipeline_is_wrapped_as_it_is(tiny_parts):
    pipe = pipeline(tiny_parts)
    before = dict(vars(pipe))
    pipe.to(torch.bfloat16)
    try:
        model = LatentModel(pipe, name="mine")
        assert model.vae is pipe.vae is tiny_parts["vae"] and model.network is pipe.unet
        assert model.pipe is not pipe and isinstance(model.pipe, type(pipe)) and model.name == "mine"
        assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16} == {model.dtype}
        assert all(p.requires_grad for p in model.network.parameters())
        model.predict(draw(1, *model.latent_shape), 1, model.schedule(2), model.nothing)
        assert vars(pipe) == before and isinstance(pipe.scheduler, DDIMScheduler)
    finally:
        pipe.to(torch.float32)


@pytest.mark.parametrize(("size", "shape"), [((16, 16), (4, 8, 8)), ((24, 40), (4, 12, 20))])
def test_noise_of_a_picture_of_any_size(tiny_parts, size, shape):
    assert wrap(tiny_parts).noise_shape(size) == shape


@pytest.mark.parametrize("size", [(16, 17), (0, 16), (-8, 16), (12, 16), (8, 8 * 10**6)])
def test_sizes_that_cannot_be_drawn(tiny_parts, size):
    with pytest.raises(ModelError) as caught:
        wrap(tiny_parts).noise_shape(size)
    assert caught.value.code == ("model.too-large" if max(size) > 10**6 else "model.size")


def test_a_pipeline_whose_tokenizer_is_beyond_its_text_encoder(tiny_parts):
    tokenizer = copying.deepcopy(tiny_parts["tokenizer"])
    tokenizer.add_tokens(["<mine>"])
    with pytest.raises(ModelError) as caught:
        wrap(tiny_parts | {"tokenizer": tokenizer}, name="mine")
    assert (caught.value.code, caught.value.subject) == ("model.damaged", "mine")


@pytest.mark.parametrize("which", ["sd1", "sd2", "taesd"])
def test_levels_ascend_through_the_schedule(request, which):
    model = LatentModel.from_pretrained(request.getfixturevalue(which))
    for steps in (1, 2, 7, 50, 500):
        schedule, alpha_bar = model.schedule(steps), model.pipe.scheduler.alphas_cumprod.double()
        assert len(schedule) == steps and schedule.signal.shape == (steps + 1,)
        assert (schedule.timesteps.diff() > 0).all() and (schedule.signal[1:].diff() < 0).all()
        assert schedule.timesteps[0] == 1  # diffusers' pipelines correct an offset of 0, which taesd has
        assert schedule.at(0)[0] == (1.0 if which == "taesd" else float(alpha_bar[0]) ** 0.5)
        assert torch.equal(schedule.signal[1:], alpha_bar[schedule.timesteps].sqrt())


@pytest.mark.parametrize("steps", [-1, 0, 1000, 1001, 10**9])
def test_steps_that_the_schedule_has_not(tiny_parts, steps):
    """With an offset of 1 the thousandth step would start beyond the schedule."""
    with pytest.raises(ModelError) as caught:
        wrap(tiny_parts).schedule(steps)
    assert (caught.value.code, caught.value.subject) == ("model.steps", "tiny")


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_a_schedule_that_ends_in_pure_noise(copy, steps):
    edit(copy / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert LatentModel.from_pretrained(copy).schedule(steps).at(steps) == (0, 1)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"addition_embed_type": "text", "addition_embed_type_num_heads": 2}, "SDXL"),
        ({"in_channels": 9}, "inpainting"),
        ({"num_class_embeds": 3}, "more inputs than a prompt"),
    ],
)
def test_networks_that_need_more_than_a_prompt(copy, config, word):
    make_unet(block_out_channels=(8, 8, 8, 8), attention_head_dim=4, **config).save_pretrained(copy / "unet")
    refused(copy, "model.conditioning", word)


@pytest.mark.parametrize("size", [None, 0, -32, 1_000_000, 1e6, "32", [8], [8, 8, 8], [8, "8"], [8, 0], True, {}])
def test_a_network_without_a_usable_size(copy, size):
    edit(copy / "unet" / "config.json", sample_size=size)
    refused(copy, "model.sample-size", "sample_size", str(size))


@pytest.mark.parametrize("value", ["0.18215", [0.18], None, float("nan"), 0])
def test_an_autoencoder_without_a_usable_scale(copy, value):
    edit(copy / "vae" / "config.json", scaling_factor=value)
    refused(copy, "model.scaling", "scaling_factor")


@pytest.mark.parametrize(
    ("changes", "code", "word"),
    [
        ({"prediction_type": "flow_prediction"}, "model.prediction", "flow_prediction"),
    ],
)
def test_schedulers_without_a_schedule_of_alpha_bar(copy, changes, code, word):
    edit(copy / "scheduler" / "scheduler_config.json", **changes)
    refused(copy, code, word)


def test_lean_gradients_store_less_and_are_nearly_the_same(tiny_parts):
    model = wrap(tiny_parts)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def gradient():
        x = z.clone().requires_grad_()
        return torch.autograd.grad(model.decode(x).float().square().sum(), x)[0]

    plain, stored = gradient(), stored_bytes(model.decode, z, model.vae.parameters())
    with model.lean():
        assert model.vae.is_gradient_checkpointing
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        less, kept = gradient(), stored_bytes(model.decode, z, model.vae.parameters())
    assert (less - plain).norm() < 0.2 * plain.norm()
    assert kept < 0.5 * stored
    assert not model.vae.is_gradient_checkpointing and not torch.is_autocast_enabled("cpu")
    torch.testing.assert_close(gradient(), plain)


def overflowing(folder, by=2e5):
    """Enlarge the residual stream of a folder's autoencoder; its norms take it away again."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        for half in (vae.encoder, vae.decoder):
            half.conv_in.weight.mul_(by)
            half.conv_in.bias.mul_(by)
            for name, module in half.named_modules():
                if name.endswith("conv2"):
                    module.weight.mul_(by)
                if name.endswith("conv2") or name.endswith("conv_shortcut") or name.endswith("samplers.0.conv"):
                    module.bias.mul_(by)
    vae.save_pretrained(folder / "vae")


def test_an_autoencoder_that_overflows_is_widened(copy, caplog):
    overflowing(copy)
    images, z = draw(2, 3, 16, 16).clamp(-1, 1), draw(2, 4, 8, 8)
    exact, model = (LatentModel.from_pretrained(copy, dtype=dtype) for dtype in (torch.float32, torch.float16))
    assert not model.vae.encode(images.half()).latent_dist.mode().isfinite().all()
    stays = model.pipe.vae
    assert torch.allclose(model.encode(images), exact.encode(images), atol=1e-2)
    assert torch.allclose(model.decode(z), exact.decode(z), atol=2e-2)
    assert model.vae.dtype == torch.float32 and model.network.dtype == stays.dtype == torch.float16
    assert model.pipe.vae is stays and "float32" in caplog.text
    assert model.encode(torch.full((1, 3, 16, 16), torch.nan)).isnan().all()


def test_an_offloaded_one_is_widened_too(copy):
    overflowing(copy)
    exact, model = (LatentModel.from_pretrained(copy, dtype=dtype) for dtype in (torch.float32, torch.float16))
    accelerate.cpu_offload(model.vae, torch.device("cpu"), offload_buffers=True)
    assert next(model.vae.parameters()).is_meta
    images = draw(2, 3, 16, 16).clamp(-1, 1)
    assert torch.allclose(model.encode(images), exact.encode(images), atol=1e-2)


def test_one_that_does_not_overflow_stays_narrow(copy, caplog):
    model = LatentModel.from_pretrained(copy, dtype=torch.float16)
    assert model.vae.config.force_upcast and model.encode(draw(1, 3, 16, 16)).dtype == torch.float16
    assert model.encode(torch.full((1, 3, 16, 16), torch.inf)).dtype == torch.float16 and not caplog.text


@pytest.mark.parametrize("asked", [True, False])
def test_one_of_sdxl_is_widened_if_its_config_asks_for_it(tmp_path, asked):
    with quiet():
        build("sdxl").save_pretrained(tmp_path)
    edit(tmp_path / "vae" / "config.json", force_upcast=asked)
    model = LatentModel.from_pretrained(tmp_path, dtype=torch.float16)
    assert model.decode(draw(1, *model.noise_shape((16, 16)))).dtype == (torch.float32 if asked else torch.float16)
