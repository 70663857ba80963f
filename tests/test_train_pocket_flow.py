"""Training the rectified-flow model: its formulas, a stopped run that goes on bit for bit, a folder diffusers loads."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from ringmark.data.scenes import scene
from scripts import train_pocket_flow as script

ALPHA_BAR = torch.linspace(0.999, 0.005, 100)


@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    monkeypatch.setattr(script, "mixed_precision", nullcontext)


@pytest.fixture
def pocket(tiny_parts):
    return script.Pocket(
        vae=tiny_parts["vae"],
        text=tiny_parts["text_encoder"],
        tokenizer=tiny_parts["tokenizer"],
        unet=copy.deepcopy(tiny_parts["unet"]),
        alpha_bar=ALPHA_BAR,
    )


@pytest.fixture
def corpus(pocket):
    latents = torch.randn(2, 6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states = pocket.states([scene(i, 16).caption for i in range(6)])
    return script.Corpus(latents=latents, states=states, empty=pocket.states([""]))


def network(predict):
    """A network that answers predict(z, timesteps (B, 1, 1, 1))."""
    return lambda z, timesteps, states: SimpleNamespace(sample=predict(z, timesteps.view(-1, 1, 1, 1)))


def noise(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_paths_to_a_single_point_are_straight_so_one_step_is_exact():
    point = noise(1, seed=2)
    unet = network(lambda z, t: (z - point) / (t / 1000))
    states = torch.zeros(3, 5, 2)
    assert torch.allclose(script.one_step(unet, noise(3), states), point, atol=1e-5)
    for steps in (1, 4, 25):
        drawn = script.euler(unet, noise(3), states, states[:1], steps, guidance=2.0)
        assert torch.allclose(drawn, point.expand(3, -1, -1, -1), atol=1e-4)


def test_the_velocity_of_a_noise_predictor_is_that_of_the_flow(pocket):
    """For x0 ~ N(0, I) the posterior means are known: ε̂ = √(1 − ᾱ) z, and v = (2σ − 1) / (σ² + (1 − σ)²) z_σ."""
    ratio = ((1 - ALPHA_BAR) / ALPHA_BAR).log() / 2

    def epsilon(z, t):
        low = t.long().clamp(max=len(ratio) - 2)
        level = torch.lerp(ratio[low], ratio[low + 1], t - low).exp()
        return level / (1 + level**2).sqrt() * z

    gaussian = script.Pocket(
        vae=pocket.vae, text=pocket.text, tokenizer=pocket.tokenizer, unet=network(epsilon), alpha_bar=ALPHA_BAR
    )
    z, sigma = noise(4), torch.tensor([0.1, 0.3, 0.6, 0.9])
    expected = ((2 * sigma - 1) / (sigma**2 + (1 - sigma) ** 2)).view(-1, 1, 1, 1) * z
    assert torch.allclose(gaussian.velocity(z, sigma, torch.zeros(4, 5, 2)), expected, atol=1e-3)


def test_a_warm_start_knows_the_time(pocket):
    warm = pocket.warm_start()
    sigma = torch.linspace(0.05, 0.9, 20)
    old = pocket.unet.time_embedding(pocket.unet.time_proj(pocket.timestep(sigma)))
    new = warm.time_embedding(warm.time_proj(1000 * sigma))
    unfitted = pocket.unet.time_embedding(pocket.unet.time_proj(1000 * sigma))
    assert (new - old).square().mean() < 0.25 * (unfitted - old).square().mean()
    assert all(p.requires_grad for p in warm.parameters())
    assert torch.equal(warm.conv_in.weight, pocket.unet.conv_in.weight)


def test_levels_lie_on_the_path():
    for draw in (script.logit_normal, script.both_ends):
        sigma = draw(4000, torch.Generator().manual_seed(0))
        assert sigma.shape == (4000,) and 0 <= sigma.min() and sigma.max() <= 1
        assert abs(float(sigma.mean()) - 0.5) < 0.03
    assert ((sigma < 0.25) | (sigma > 0.75)).float().mean() > 0.6 or draw is script.logit_normal


def test_a_picture_shows_eight_captions_at_three_numbers_of_steps(pocket, tmp_path):
    from PIL import Image

    run = script.Run(tmp_path / "flow.safetensors", {"unet": pocket.unet}, lr=1e-3)
    script.picture_of(run, pocket, 2.0, 5, 0)()
    assert Image.open(tmp_path / "flow-00000.png").size == (8 * 16, 3 * 16)


def plan_of(**changes):
    steps = {"scenes": 6, "flow": 3, "reflow": 3, "onestep": 4}
    drawing = {"pairs": 40, "pair_steps": 2, "guidance": 2.0, "batch": 4, "every": 2}
    return script.Plan(**(steps | drawing | changes))


def die_at(function, fatal: int):
    def loss(*args):
        if args[-1] == fatal:
            raise KeyboardInterrupt
        return function(*args)

    return loss


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(pocket, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "picture_of", lambda *_: lambda: None)
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole, _ = script.train(tmp_path / "whole", pocket, corpus, plan_of())
    for name, step in (("flow_loss", 2), ("reflow_loss", 1), ("one_step_loss", 3)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(script, name, die_at(getattr(script, name), step))
            script.train(tmp_path / "stopped", pocket, corpus, plan_of())
    again, pairs = script.train(tmp_path / "stopped", pocket, corpus, plan_of())
    description = script.describe(again, pairs, plan_of())
    assert "--flow-steps 3" in description["command"] and "40 pairs in" in description["times"]
    for name, run in whole.items():
        assert run.step == again[name].step
        assert all(torch.equal(value, again[name].ema[key]) for key, value in run.ema.items())
    assert len(list((tmp_path / "stopped").glob("pairs-*/*.safetensors"))) == 2
    assert not list((tmp_path / "stopped").rglob("*.tmp"))


def test_pairs_are_the_flows_own_and_more_of_them_begin_with_the_same(pocket, corpus, tmp_path):
    few = script.draw_pairs(tmp_path / "few", pocket.unet, corpus, plan_of(pairs=5))
    many = script.draw_pairs(tmp_path / "many", pocket.unet, corpus, plan_of())
    assert len(few.noise) == 5 and len(many.noise) == 40
    assert torch.equal(few.latents, many.latents[:5])
    states = corpus.states[few.captions.long()]
    drawn = script.euler(pocket.unet, few.noise.float(), states, corpus.empty, 2, 2.0)
    assert torch.allclose(drawn, few.latents.float(), atol=1e-2)


def test_the_last_stage_that_began_is_exported_averaged(pocket, tmp_path):
    for name, value in (("flow", 1.0), ("reflow", 2.0)):
        unet = copy.deepcopy(pocket.unet)
        run = script.Run(tmp_path / f"{name}.safetensors", {"unet": unet}, lr=1e-3)
        run.train(lambda _, unet=unet: sum(p.square().sum() for p in unet.parameters()), 1, lambda: None, 1)
        run.ema["unet.conv_out.bias"].fill_(value)
        run.save()
    assert torch.equal(script.latest(tmp_path, pocket).conv_out.bias, torch.full((4,), 2.0))


def test_the_folder_is_one_that_diffusers_loads(pocket, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
    from safetensors.torch import load_file

    script.export(pocket, pocket.unet, tmp_path)
    pipe = script.RectifiedFlowPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    assert type(StableDiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionPipeline
    assert all(v.dtype == torch.float16 for v in load_file(next((tmp_path / "unet").glob("*.safetensors"))).values())
    assert next(pocket.unet.parameters()).dtype == torch.float32
    prompts, z = ["lake at night", "sea at dawn"], noise(2)
    for steps in (1, 4):
        images = pipe(prompts, latents=z, num_inference_steps=steps, guidance_scale=2.0, output_type="latent").images
        expected = script.euler(pipe.unet, z, pocket.states(prompts), pocket.states([""]), steps, 2.0)
        assert torch.allclose(images, expected, atol=2e-2)
