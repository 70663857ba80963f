"""DDIM both ways: one formula, diffusers' own scheduler, and the noise that comes back."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from ringmark.inversion.diffusion import invert, sample, transfer
from ringmark.inversion.methods import Anderson, ForwardStep, InertialKM
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.schedule import Grid
from ringmark.inversion.solve import norms

STEPS = [1, 2, 7, 10, 25, 50]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Smooth:
    """The exact ε of normal data with variance s², bent a little, and shifted by the prompt."""

    alpha_bar = DDIMScheduler(**BETAS).alphas_cumprod

    def __init__(self, bend=0.3, s=0.5):
        self.bend, self.s, self.calls = bend, s, 0

    def embed(self, prompts):
        return torch.stack([torch.full((1, 1), len(p) / 10) for p in prompts])

    def eps(self, z, t, cond):
        assert len(z) == len(cond)
        self.calls += len(z)
        a = float(self.alpha_bar[t])
        ideal = (1 - a) ** 0.5 / (a * self.s**2 + 1 - a) * z
        return ideal + self.bend * (1 - a) ** 0.5 * torch.sin(z.roll(1, -1) + cond.view(-1, 1, 1, 1).to(z))

    def grid(self, steps):
        ddim = DDIMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False)
        ddim.set_timesteps(steps)
        return Grid.from_schedule(ddim.alphas_cumprod, ddim.timesteps, float(ddim.final_alpha_cumprod))


def diffusers_sample(model, scheduler, noise, cond, steps, guidance=1.0):
    """The denoising loop of diffusers' pipelines, on what the network predicts."""
    scheduler.set_timesteps(steps)
    nothing, z = model.embed([""]).expand_as(cond), noise
    for t in scheduler.timesteps:
        out = model.raw(z, t, cond)
        if guidance != 1:
            empty = model.raw(z, t, nothing)
            out = empty + guidance * (out - empty)
        z = scheduler.step(out, t, z, eta=0.0).prev_sample
    return z


alphas = st.floats(1e-3, 1.0, exclude_max=True)


@given(a=alphas, b=alphas, seed=st.integers(0, 99))
def test_transfer_there_and_back_is_exact_for_fixed_eps(a, b, seed):
    z, eps = draw(2, 3, 2, 2, seed=seed).double(), draw(2, 3, 2, 2, seed=seed + 1).double()
    there = transfer(z, eps, a, b)
    assert torch.allclose(transfer(there, eps, b, a), z, rtol=1e-9, atol=1e-9)
    assert torch.allclose(transfer(z, eps, a, a), z, rtol=1e-12, atol=1e-12)


@given(a=alphas, b=alphas)
def test_transfer_keeps_the_clean_picture(a, b):
    """z = √ᾱ x + √(1 − ᾱ) ε stays of that form."""
    x, eps = draw(1, 4).double(), draw(1, 4, seed=1).double()
    at = lambda level: level**0.5 * x + (1 - level) ** 0.5 * eps
    assert torch.allclose(transfer(at(a), eps, a, b), at(b), rtol=1e-9, atol=1e-9)
    assert torch.allclose(transfer(at(a), eps, a, 1.0), x, rtol=1e-9, atol=1e-9)


def test_transfer_keeps_the_dtype():
    z = draw(2, 3).half()
    levels = torch.tensor([0.9, 0.5], dtype=torch.float64)
    assert transfer(z, z, *levels).dtype == torch.float16


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_sample_is_diffusers_ddim_on_every_schedule(tiny_parts, spacing, to_one, offset, steps):
    if spacing == "trailing" and 1000 % steps:
        pytest.skip("there diffusers moves by a step that is not its spacing")
    scheduler = DDIMScheduler(**BETAS, timestep_spacing=spacing, set_alpha_to_one=to_one, steps_offset=offset)
    grid = LatentModel(**tiny_parts | {"scheduler": scheduler}, name="tiny").grid(steps)
    model = Smooth()
    model.raw = model.eps
    noise, cond = draw(2, 4, 8, 8), model.embed(["a", "bcd"])
    theirs = diffusers_sample(model, scheduler, noise, cond, steps, guidance=3.0)
    assert torch.allclose(sample(model, noise, cond, grid, guidance=3.0), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 7, 10])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@torch.inference_mode()
def test_sample_is_diffusers_ddim_whatever_the_network_predicts(tiny_parts, prediction, guidance, steps):
    scheduler = DDIMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False, prediction_type=prediction)
    model = LatentModel(**tiny_parts | {"scheduler": scheduler}, name="tiny")
    model.raw = lambda z, t, cond: model.unet(z, t, cond).sample
    noise, cond = draw(2, *model.latent_shape), model.embed(["a lake", "snow on the hills"])
    theirs = diffusers_sample(model, scheduler, noise, cond, steps, guidance)
    ours = sample(model, noise, cond, model.grid(steps), guidance=guidance)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - noise).abs().max() > 0.1


def test_guidance_one_needs_no_empty_prompt():
    model = Smooth()
    noise, cond = draw(3, 1, 2, 2), model.embed(["a"] * 3)
    sample(model, noise, cond, model.grid(4))
    assert model.calls == 3 * 4
    model.embed = None
    sample(model, noise, cond, model.grid(4))
    invert(model, noise, cond, model.grid(4))


def test_progress_hears_of_every_move():
    model, heard = Smooth(), []
    z = sample(model, draw(1, 1, 2, 2), model.embed([""]), model.grid(5), progress=lambda: heard.append("down"))
    invert(model, z, model.embed([""]), model.grid(5), progress=lambda: heard.append("up"))
    assert heard == ["down"] * 5 + ["up"] * 5


def test_naive_inversion_takes_eps_at_the_cleaner_latent():
    model = Smooth()
    z, cond, grid = draw(2, 2, 3, 3), model.embed(["a", "bb"]), model.grid(3)
    by_hand = z
    for t, a, b in zip(grid.timesteps.tolist(), grid.alpha_bar, grid.alpha_bar[1:], strict=False):
        clean = (by_hand - (1 - a) ** 0.5 * model.eps(by_hand, t, cond)) / a**0.5
        by_hand = b**0.5 * clean + (1 - b) ** 0.5 * model.eps(by_hand, t, cond)
    assert torch.allclose(invert(model, z, cond, grid), by_hand.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_naive_inversion_comes_nearer_with_more_steps(guidance):
    model = Smooth()
    noise, cond = draw(3, 2, 4, 4), model.embed(["a", "bb", "ccc"])
    latents = sample(model, noise, cond, model.grid(200), guidance=guidance)
    there, back = [], []
    for steps in (5, 20, 100):
        grid = model.grid(steps)
        again = invert(model, latents, cond, grid, guidance=guidance)
        there.append(float((sample(model, again, cond, grid, guidance=guidance) - latents).norm()))
        drawn = sample(model, noise, cond, grid, guidance=guidance)
        back.append(float((invert(model, drawn, cond, grid, guidance=guidance) - noise).norm()))
    assert there[0] > there[1] > there[2] and there[2] < 0.25 * there[0]
    assert back[0] > back[1] > back[2] and back[2] < 0.25 * back[0]


@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("method", [ForwardStep(1.0), Anderson(window=2), InertialKM()], ids=repr)
def test_exact_inversion_recovers_the_noise(method, guidance, steps):
    model = Smooth()
    noise, cond, grid = draw(3, 2, 4, 4), model.embed(["a", "bb", "ccc"]), model.grid(steps)
    latents = sample(model, noise, cond, grid, guidance=guidance)
    exact = invert(model, latents, cond, grid, guidance=guidance, method=method, max_steps=60, tol=1e-6)
    naive = invert(model, latents, cond, grid, guidance=guidance)
    assert (norms(exact - noise) < 1e-3 * norms(noise)).all()
    assert (norms(exact - noise) < 0.1 * norms(naive - noise)).all()


def test_three_exact_steps_are_already_better_than_none():
    model = Smooth()
    noise, cond, grid = draw(3, 2, 4, 4), model.embed([""] * 3), model.grid(25)
    latents = sample(model, noise, cond, grid)
    naive = norms(invert(model, latents, cond, grid) - noise)
    for method in (ForwardStep(), Anderson(window=2)):
        assert (norms(invert(model, latents, cond, grid, method=method) - noise) < 0.3 * naive).all()


@pytest.mark.parametrize("method", [None, ForwardStep(), Anderson(window=2)], ids=repr)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_result_does_not_depend_on_the_batch(method, guidance):
    """Samples finish their fixed-point iterations at different times; each keeps its own prompt."""
    model, grid = Smooth(bend=0.6), Smooth().grid(8)
    scale = torch.tensor([0.01, 1.0, 20.0, 1.0]).view(4, 1, 1, 1)
    latents, cond = scale * draw(4, 2, 3, 3), model.embed(["", "aaaaaa", "b" * 12, "c" * 30])
    options = {"guidance": guidance, "method": method, "max_steps": 5, "tol": 1e-3}
    together = invert(model, latents, cond, grid, **options)
    for i in range(4):
        alone = invert(model, latents[i : i + 1], cond[i : i + 1], grid, **options)
        assert torch.allclose(alone[0], together[i], rtol=1e-4, atol=1e-5)
        drawn = sample(model, latents[i : i + 1], cond[i : i + 1], grid, guidance=guidance)
        assert torch.allclose(drawn[0], sample(model, latents, cond, grid, guidance=guidance)[i], rtol=1e-4, atol=1e-5)


def test_an_implicit_equation_that_diverges_keeps_the_naive_move():
    """ε so steep that the plain fixed-point iteration blows up: the value stays finite, no worse than naive."""
    model = Smooth(bend=0.0)
    model.eps = lambda z, t, cond: 300 * z
    z = draw(2, 1, 2, 2)
    out = invert(model, z, model.embed([""] * 2), model.grid(1), method=ForwardStep(), max_steps=9)
    assert torch.equal(out, invert(model, z, model.embed([""] * 2), model.grid(1))) and out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_latents_stay_so(dtype):
    model = Smooth()
    z, cond, grid = draw(2, 1, 4, 4).to(dtype), model.embed(["", "a"]).to(dtype), model.grid(5)
    assert sample(model, z, cond, grid, guidance=2.0).dtype == dtype
    for method in (None, Anderson(window=2)):
        assert invert(model, z, cond, grid, method=method).dtype == dtype
