"""What a marked pipeline starts from, for every family; the pictures that a model's own pipeline draws."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from checkpoints import draw
from families import BUILDERS, build
from family import ddim
from torch import Tensor

import ringmark
from ringmark.errors import KeyFileError, MarkWarning, ModelError, SchemeError
from ringmark.inversion.diffusion import invert
from ringmark.inversion.models.families import family_of, kind_of
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.models.walk import Watched
from ringmark.watermark.embed import generate, initial_noise, mark
from ringmark.watermark.keys.key import Key
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.base import make_key, scheme_of
from scripts.experiments.common import score_and_p

SIZE = {8: (64, 96), 32: (192, 256)}  # (H, W) by the factor of the latents
BINNED = {"sana": {"use_resolution_binning": False}, "pixart-sigma": {"use_resolution_binning": False}}


def key_for(pipe: Any, secret: int = 1, *, radii: tuple[int, int] = (1, 2), **other: Any) -> Key:
    """A key for this pipeline's kind of latents, of radii that its small pictures have."""
    kind = kind_of(pipe) | other
    return make_key(
        "tree-ring",
        kind=kind,
        reference=SIZE[kind["factor"]],
        model={"name": "tiny", "fingerprint": "0"},
        secret=bytes([secret]) * 32,
        channels=(0, 2),
        radii=radii,
    )


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(pipe: Any, size: tuple[int, int] | None = None, **call: Any) -> Tensor:
    """The unit noise (B, C, h, w) from which a call of the pipeline takes its first step."""
    factor = int(pipe.vae_scale_factor)
    height, width = size or SIZE[factor]
    watched, other = Watched(copy.deepcopy(pipe.scheduler)), copy.copy(pipe)
    other.scheduler = watched.scheduler
    call = {"prompt": "a red lake", "num_inference_steps": 2, "output_type": "latent"} | call
    other(height=height, width=width, **call)
    latents = family_of(pipe).unpack(watched.first, (height // factor, width // factor))
    return latents.float() / getattr(watched.scheduler, "init_noise_sigma", 1.0)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return build("stable-diffusion")


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.filterwarnings("ignore::ringmark.errors.MarkWarning")
def test_the_network_receives_the_pipelines_noise_with_the_mark(name):
    pipe, call = build(name), BINNED.get(name, {})
    plain, key = start(pipe, generator=seeded(), **call), key_for(pipe)
    with mark(pipe, key):
        marked = start(pipe, generator=seeded(), **call)
    scheme = scheme_of(key, tuple(plain.shape[1:]))
    assert torch.allclose(marked, scheme.embed(plain), atol=1e-5) and not torch.allclose(marked, plain, atol=0.1)
    assert torch.allclose(*(torch.where(scheme.inside, 0, torch.fft.fft2(z)) for z in (marked, plain)), atol=1e-4)
    assert torch.equal(start(pipe, generator=seeded(), **call), plain)


@pytest.mark.parametrize("name", ["stable-diffusion", "flux.1-dev", "flux.2", "z-image"])
def test_batches_sizes_and_given_latents_are_marked(name):
    pipe = build(name)
    key, family = key_for(pipe), family_of(pipe)
    two = {"generator": [seeded(1), seeded(2)], "num_images_per_prompt": 2}
    wide = start(pipe, (128, 64), prompt=["a"], **two)
    given = draw(2, *wide.shape[1:])
    latents = (family.given or family.pack)(given)
    with mark(pipe, key):
        two["generator"] = [seeded(1), seeded(2)]
        marked = start(pipe, (128, 64), prompt=["a"], **two)
        from_given = start(pipe, (128, 64), prompt=["a", "b"], latents=latents)
    scheme = scheme_of(key, tuple(wide.shape[1:]))
    assert torch.allclose(marked, scheme.embed(wide), atol=1e-5)
    assert torch.allclose(from_given, scheme.embed(given), atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_keeps_the_mark_within_rounding(dtype, tolerance):
    pipe = build("sdxl").to(dtype)  # its noise is multiplied by 14.6
    plain, key = start(pipe, generator=seeded()), key_for(pipe)
    with mark(pipe, key):
        marked = start(pipe, generator=seeded())
    assert torch.allclose(marked, scheme_of(key, tuple(plain.shape[1:])).embed(plain), atol=tolerance, rtol=tolerance)


def test_a_mark_is_removed_once_and_put_on_once(pipe):
    plain, kind = start(pipe, generator=seeded()), type(pipe)
    first = ringmark.mark(pipe, key_for(pipe))
    with pytest.raises(ModelError) as caught:
        mark(pipe, key_for(pipe, 2))
    assert caught.value.code == "model.marked" and isinstance(pipe, kind)
    first.remove()
    with mark(pipe, key_for(pipe, 2)):
        first.remove()  # does not touch the second
        assert not torch.allclose(start(pipe, generator=seeded()), plain, atol=0.1)
    assert type(pipe) is kind and torch.equal(start(pipe, generator=seeded()), plain)


def test_a_marked_pipeline_is_still_one(pipe, tmp_path):
    """Its copies are marked with their own scheduler, models made of it are not, and it saves as before."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

    key, plain = key_for(pipe), start(pipe, generator=seeded())
    scheme = scheme_of(key, tuple(plain.shape[1:]))
    with mark(pipe, key):
        other = copy.copy(pipe)
        other.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        assert torch.allclose(start(other, generator=seeded()), scheme.embed(plain), atol=1e-5)
        assert torch.allclose(start(pipe.to("cpu"), generator=seeded()), scheme.embed(plain), atol=1e-5)
        model = LatentModel(pipe, name="tiny")
        noise, _ = model.draw(plain, model.condition(["a"]), steps=1)
        assert torch.allclose(noise, plain, atol=1e-5)
        assert type(StableDiffusionImg2ImgPipeline.from_pipe(pipe)) is StableDiffusionImg2ImgPipeline
        pipe.save_pretrained(tmp_path)
    assert type(StableDiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionPipeline


def test_adapters_can_come_after_the_mark(pipe):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    key, plain = key_for(pipe), start(pipe, generator=seeded())
    scheme = scheme_of(key, tuple(plain.shape[1:]))
    query = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    rows, columns = pipe.unet.get_submodule(query.removeprefix("unet.")).weight.shape
    lora = {f"{query}.lora_A.weight": draw(2, columns), f"{query}.lora_B.weight": draw(rows, 2)}
    with mark(pipe, key):
        pipe.load_lora_weights(lora)
        assert torch.allclose(start(pipe, generator=seeded()), scheme.embed(plain), atol=1e-5)
        pipe.unload_lora_weights()
    parts = {**pipe.components, "requires_safety_checker": False}
    controlled = StableDiffusionControlNetPipeline(controlnet=ControlNetModel.from_unet(pipe.unet), **parts)
    with mark(controlled, key):
        started = start(controlled, generator=seeded(), image=torch.rand(1, 3, 64, 96))
        assert torch.allclose(started, scheme.embed(plain), atol=1e-5)


def with_controlnet(pipe: Any) -> tuple[Any, dict[str, Any]]:
    """The pipeline with a random ControlNet, and what a call then needs besides the usual arguments."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    net = ControlNetModel.from_unet(pipe.unet)
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.constant_(block.weight, 0.02)  # zero before training
    parts = pipe.components | {"controlnet": net, "requires_safety_checker": False}
    return StableDiffusionControlNetPipeline(**parts), {"image": draw(1, 3, 128, 192).sigmoid()}


def with_ip_adapter(pipe: Any) -> tuple[Any, dict[str, Any]]:
    """The pipeline with a random IP-Adapter, and what a call then needs besides the usual arguments."""
    from diffusers import StableDiffusionPipeline

    unet, width = copy.deepcopy(pipe.unet), pipe.unet.config.cross_attention_dim
    image_proj = {"proj.weight": draw(4 * width, 8), "proj.bias": draw(4 * width)}
    image_proj |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    attentions = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    rows = {2 * i + 1: unet.get_submodule(name).to_k.weight.shape[0] for i, name in enumerate(attentions)}
    matrices = {f"{i}.to_{part}_ip.weight": draw(n, width, seed=i) for i, n in rows.items() for part in "kv"}
    adapted = StableDiffusionPipeline(**pipe.components | {"unet": unet, "requires_safety_checker": False})
    state = {"image_proj": image_proj, "ip_adapter": matrices}
    adapted.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None)
    return adapted, {"ip_adapter_image_embeds": [draw(1, 1, 8)]}


@pytest.mark.parametrize("adapt", [with_controlnet, with_ip_adapter])
def test_marks_are_found_in_what_a_pipeline_draws_with_an_adapter(pipe, adapt, monkeypatch):
    """By the model without the adapter, as in verification."""
    adapted, call = adapt(pipe)
    adapted.scheduler = ddim(pipe.scheduler)
    call |= {"height": 128, "width": 192, "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    plain = pipe("a red lake", generator=seeded(), **{k: v for k, v in call.items() if "image" not in k}).images
    key, other = (key_for(pipe, secret, radii=(1, 3)) for secret in (1, 2))
    with mark(adapted, key):
        drawn = adapted("a red lake", generator=seeded(), **call).images
    assert (drawn - plain).std() > 0.1 * plain.std()
    model = LatentModel(pipe, name="tiny")
    noise = invert(model, drawn, model.nothing, model.schedule(4, (128, 192)))
    p, p_other = (score_and_p(scheme_of(k, (4, 16, 24)), Null.white((4, 16, 24)), noise)[1] for k in (key, other))
    assert p < 1e-6 and p_other > 1e-3


def test_a_marked_pipeline_can_be_offloaded():
    """Whole networks, by the hooks that move weights to a GPU and back; here from the CPU to the CPU.

    Layer by layer is not tested: accelerate needs a GPU for it.
    """
    pipe = build("stable-diffusion")
    key, plain = key_for(pipe), start(pipe, generator=seeded())
    scheme = scheme_of(key, tuple(plain.shape[1:]))
    with mark(pipe, key):
        pipe.enable_model_cpu_offload(device="cpu")
        assert hasattr(pipe.unet, "_hf_hook")
        assert torch.allclose(start(pipe, generator=seeded()), scheme.embed(plain), atol=1e-5)
    assert torch.equal(start(pipe, generator=seeded()), plain)


def test_pipelines_that_cannot_be_marked_are_refused(pipe):
    from diffusers import DDPMPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
    from diffusers import StableDiffusionPanoramaPipeline as Unknown

    key, parts = key_for(pipe), {**pipe.components, "requires_safety_checker": False}
    cases = [
        (DDPMPipeline(pipe.unet, pipe.scheduler), "model.no-noise"),
        (Unknown(**parts | {"scheduler": ddim(pipe.scheduler)}), "model.family"),
        (StableDiffusionImg2ImgPipeline(**parts), "model.from-picture"),
        (StableDiffusionInpaintPipeline(**parts), "model.from-picture"),
    ]
    for other, code in cases:
        with pytest.raises(ModelError) as caught:
            mark(other, key)
        assert caught.value.code == code


@pytest.mark.parametrize("other", [{"family": "sdxl"}, {"channels": 16}, {"factor": 32}])
def test_a_key_of_another_kind_of_latents_is_refused(pipe, other):
    kind = type(pipe)
    with pytest.raises(KeyFileError) as caught:
        mark(pipe, key_for(pipe, **other))
    assert caught.value.code == "key.latents" and type(pipe) is kind


def test_a_size_that_the_key_cannot_mark_is_refused(pipe):
    with mark(pipe, key_for(pipe)), pytest.raises(SchemeError) as caught:
        start(pipe, (16, 16))
    assert caught.value.code == "scheme.size"


def warned(pipe: Any, **call: Any) -> bool:
    """Whether exactly one warning of ours is given, at the line of the call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe("a", height=64, width=64, output_type="latent", **{"num_inference_steps": 2} | call)
    ours = [w for w in caught if w.category is MarkWarning]
    assert len(ours) <= 1 and all(w.filename == __file__ for w in ours)
    return bool(ours)


def test_samplers_that_add_noise_give_a_warning_at_the_call(pipe):
    from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler

    own = pipe.scheduler
    with mark(pipe, key_for(pipe)):
        assert not warned(pipe)
        pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(own.config)
        assert warned(pipe) and not warned(pipe, num_inference_steps=1)
        pipe.scheduler = DDIMScheduler.from_config(own.config)
        assert warned(pipe, eta=0.5) and not warned(pipe)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(own.config)
    assert not warned(pipe)
    pipe.scheduler = own


def test_generate_draws_each_image_from_its_own_seed(pipe):
    model = LatentModel(pipe, name="tiny")
    settings = {"key": key_for(pipe), "steps": 2, "guidance": 1.0, "size": (64, 96)}
    whole = list(generate(model, ["a", "b", "c"], [3, 4, 5], batch=2, **settings))
    (alone,) = generate(model, ["c"], [5], batch=1, **settings)
    assert torch.allclose(whole[2].noise, alone.noise) and torch.allclose(whole[2].image, alone.image, atol=1e-5)
    assert [(d.prompt, d.seed) for d in whole] == [("a", 3), ("b", 4), ("c", 5)]
    marked = scheme_of(settings["key"], (4, 8, 12)).embed(initial_noise([3, 4, 5], (4, 8, 12)))
    assert torch.allclose(torch.stack([d.noise for d in whole]), marked, atol=1e-5)
    assert whole[0].image.shape == (3, 64, 96)


@pytest.mark.filterwarnings("ignore::ringmark.errors.MarkWarning")
def test_the_noise_of_a_sampler_does_not_depend_on_the_batch_either(pipe):
    model = LatentModel(pipe, name="tiny")
    settings = {"sampler": "euler-a", "steps": 3, "guidance": 2.0, "negative": "fog"}
    _, second = generate(model, ["a", "b"], [3, 4], **settings)
    (alone,) = generate(model, ["b"], [4], **settings)
    assert torch.allclose(second.image, alone.image, atol=1e-4)


def test_unmarked_images_are_drawn_from_the_noise_of_their_seeds(pipe):
    model = LatentModel(pipe, name="tiny")
    (drawn,) = generate(model, ["a"], [3], steps=2, guidance=1.0)
    assert torch.allclose(drawn.noise, initial_noise([3], model.latent_shape)[0], atol=1e-6)
    assert torch.equal(initial_noise([1, 3], model.latent_shape)[1], initial_noise([3], model.latent_shape)[0])


@pytest.mark.parametrize("steps, sampler, code", [(0, None, "model.steps"), (2, "none", "model.sampler")])
def test_what_the_model_cannot_draw_is_refused(pipe, steps, sampler, code):
    with pytest.raises(ModelError) as caught:
        list(generate(LatentModel(pipe, name="tiny"), ["a"], [3], steps=steps, sampler=sampler))
    assert caught.value.code == code
