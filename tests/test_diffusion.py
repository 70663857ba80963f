"""Sampling both ways: one formula, diffusers' own schedulers, and the noise that comes back."""

from __future__ import annotations

import pytest
import torch
from checkpoints import wrap
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from ringmark.errors import ModelError
from ringmark.inversion.diffusion import invert, sample, transfer
from ringmark.inversion.methods import Anderson, ForwardStep, InertialKM
from ringmark.inversion.models.pipeline import PREDICTIONS, from_epsilon
from ringmark.inversion.schedule import Schedule
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

    def eps(self, z, a, s, cond):
        assert len(z) == len(cond)
        self.calls += len(z)
        ideal = s / (a**2 * self.s**2 + s**2) * z
        return ideal + self.bend * s * torch.sin(z.roll(1, -1) + cond.view(-1, 1, 1, 1).to(z))

    def predict(self, z, level, schedule, cond):
        z, (a, s) = z.float(), schedule.at(level)
        eps = self.eps(z, a, s, cond)
        return (z - s * eps) / a, eps

    def schedule(self, steps):
        ddim = DDIMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False)
        ddim.set_timesteps(steps)
        return Schedule.from_alpha_bar(ddim.alphas_cumprod, ddim.timesteps, float(ddim.final_alpha_cumprod))


def roots(alpha_bar):
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def diffusers_sample(raw, scheduler, noise, cond, steps, nothing=None, guidance=1.0):
    """The denoising loop of diffusers' pipelines, on what the network `raw` predicts, guided away from `nothing`."""
    scheduler.set_timesteps(steps)
    z = noise
    for t in scheduler.timesteps:
        out = raw(z, t, cond)
        if guidance != 1:
            empty = raw(z, t, nothing.expand_as(cond))
            out = empty + guidance * (out - empty)
        z = scheduler.step(out, t, z, eta=0.0).prev_sample
    return z


def drawn_by_hand(model, scheduler, noise, cond, steps, guidance):
    """The same loop on the model's network, called directly."""
    embeds, nothing = cond.rows["prompt_embeds"], model.empty["prompt_embeds"]

    def raw(z, t, states):
        return model.network(z, t, states).sample

    return diffusers_sample(raw, scheduler, noise, embeds, steps, nothing, guidance)


levels = st.floats(0, 1)


@given(a=levels, s=levels, b=levels, r=levels)
def test_transfer_is_the_latent_of_a_level(a, s, b, r):
    """x = a x₀ + s ε is linear in both, and without noise or signal one of the two."""
    x0, eps = draw(2, 3, 2, 2).double(), draw(2, 3, 2, 2, seed=1).double()
    assert torch.equal(transfer(x0, eps, 1.0, 0.0), x0) and torch.equal(transfer(x0, eps, 0.0, 1.0), eps)
    moved = transfer(x0, eps, a, s) + transfer(x0, eps, b - a, r - s)
    assert torch.allclose(moved, transfer(x0, eps, b, r), rtol=1e-12, atol=1e-12)


@given(a=st.floats(1e-3, 1, exclude_max=True), b=st.floats(1e-3, 1, exclude_max=True), seed=st.integers(0, 99))
def test_a_move_there_and_back_is_exact_for_fixed_eps(a, b, seed):
    z, eps = draw(2, 3, 2, 2, seed=seed).double(), draw(2, 3, 2, 2, seed=seed + 1).double()
    at = {level: (level**0.5, (1 - level) ** 0.5) for level in (a, b)}

    def move(z, start, end):
        return transfer(from_epsilon(z, eps, *at[start])[0], eps, *at[end])

    assert torch.allclose(move(move(z, a, b), b, a), z, rtol=1e-9, atol=1e-9)


def test_a_walk_keeps_the_dtype():
    model, z = Smooth(), draw(2, 1, 2, 2).half()
    assert sample(model, z, model.embed(["", ""]), model.schedule(2)).dtype == torch.float16


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_sample_is_diffusers_ddim_on_every_schedule(tiny_parts, spacing, to_one, offset, steps):
    if spacing == "trailing" and 1000 % steps:
        pytest.skip("there diffusers moves by a step that is not its spacing")
    scheduler = DDIMScheduler(**BETAS, timestep_spacing=spacing, set_alpha_to_one=to_one, steps_offset=offset)
    schedule = wrap(tiny_parts | {"scheduler": scheduler}).schedule(steps)
    model = Smooth()
    noise, cond = draw(2, 4, 8, 8), model.embed(["a", "bcd"])

    def raw(z, t, cond):
        return model.eps(z, *(float(x) for x in roots(scheduler.alphas_cumprod[t])), cond)

    theirs = diffusers_sample(raw, scheduler, noise, cond, steps)
    assert torch.allclose(sample(model, noise, cond, schedule), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 7, 10])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@torch.inference_mode()
def test_sample_is_diffusers_ddim_whatever_the_network_predicts(tiny_parts, prediction, guidance, steps):
    scheduler = DDIMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False, prediction_type=prediction)
    model = wrap(tiny_parts | {"scheduler": scheduler})
    noise, cond = draw(2, *model.latent_shape), model.condition(["a lake", "snow on the hills"], guidance=guidance)
    theirs = drawn_by_hand(model, scheduler, noise, cond, steps, guidance)
    ours = sample(model, noise, cond, model.schedule(steps))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - noise).abs().max() > 0.1


def test_a_move_costs_one_evaluation():
    model = Smooth()
    noise, cond = draw(3, 1, 2, 2), model.embed(["a"] * 3)
    sample(model, noise, cond, model.schedule(4))
    invert(model, noise, cond, model.schedule(4))
    assert model.calls == 3 * 4 * 2


def test_naive_inversion_takes_eps_at_the_cleaner_latent():
    model = Smooth()
    z, cond, schedule = draw(2, 2, 3, 3), model.embed(["a", "bb"]), model.schedule(3)
    by_hand = z
    for i in range(len(schedule)):
        (a, s), (b, r) = schedule.at(i), schedule.at(i + 1)
        eps = model.eps(by_hand, b, r, cond)
        by_hand = b * (by_hand - s * eps) / a + r * eps
    assert torch.allclose(invert(model, z, cond, schedule), by_hand.float(), rtol=1e-4, atol=1e-5)


def test_naive_inversion_comes_nearer_with_more_steps():
    model = Smooth()
    noise, cond = draw(3, 2, 4, 4), model.embed(["a", "bb", "ccc"])
    latents = sample(model, noise, cond, model.schedule(200))
    there, back = [], []
    for steps in (5, 20, 100):
        schedule = model.schedule(steps)
        again = invert(model, latents, cond, schedule)
        there.append(float((sample(model, again, cond, schedule) - latents).norm()))
        drawn = sample(model, noise, cond, schedule)
        back.append(float((invert(model, drawn, cond, schedule) - noise).norm()))
    assert there[0] > there[1] > there[2] and there[2] < 0.25 * there[0]
    assert back[0] > back[1] > back[2] and back[2] < 0.25 * back[0]


@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize("method", [ForwardStep(1.0), Anderson(window=2), InertialKM()], ids=repr)
def test_exact_inversion_recovers_the_noise(method, steps):
    model = Smooth()
    noise, cond, schedule = draw(3, 2, 4, 4), model.embed(["a", "bb", "ccc"]), model.schedule(steps)
    latents = sample(model, noise, cond, schedule)
    exact = invert(model, latents, cond, schedule, method=method, max_steps=60, tol=1e-6)
    naive = invert(model, latents, cond, schedule)
    assert (norms(exact - noise) < 1e-3 * norms(noise)).all()
    assert (norms(exact - noise) < 0.1 * norms(naive - noise)).all()


def test_three_exact_steps_are_already_better_than_none():
    model = Smooth()
    noise, cond, schedule = draw(3, 2, 4, 4), model.embed([""] * 3), model.schedule(25)
    latents = sample(model, noise, cond, schedule)
    naive = norms(invert(model, latents, cond, schedule) - noise)
    for method in (ForwardStep(), Anderson(window=2)):
        assert (norms(invert(model, latents, cond, schedule, method=method) - noise) < 0.3 * naive).all()


@pytest.mark.parametrize("method", [None, ForwardStep(), Anderson(window=2)], ids=repr)
def test_a_result_does_not_depend_on_the_batch(method):
    """Samples finish their fixed-point iterations at different times; each keeps its own prompt."""
    model, schedule = Smooth(bend=0.6), Smooth().schedule(8)
    scale = torch.tensor([0.01, 1.0, 20.0, 1.0]).view(4, 1, 1, 1)
    latents, cond = scale * draw(4, 2, 3, 3), model.embed(["", "aaaaaa", "b" * 12, "c" * 30])
    options = {"method": method, "max_steps": 5, "tol": 1e-3}
    together = invert(model, latents, cond, schedule, **options)
    for i in range(4):
        alone = invert(model, latents[i : i + 1], cond[i : i + 1], schedule, **options)
        assert torch.allclose(alone[0], together[i], rtol=1e-4, atol=1e-5)
        drawn = sample(model, latents[i : i + 1], cond[i : i + 1], schedule)
        assert torch.allclose(drawn[0], sample(model, latents, cond, schedule)[i], rtol=1e-4, atol=1e-5)


def test_an_implicit_equation_that_diverges_keeps_the_naive_move():
    """ε so steep that the plain fixed-point iteration blows up: the value stays finite, no worse than naive."""
    model = Smooth(bend=0.0)
    model.eps = lambda z, a, s, cond: 300 * z
    z = draw(2, 1, 2, 2)
    out = invert(model, z, model.embed([""] * 2), model.schedule(1), method=ForwardStep(), max_steps=9)
    assert torch.equal(out, invert(model, z, model.embed([""] * 2), model.schedule(1))) and out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_latents_stay_so(dtype):
    model = Smooth()
    z, cond, schedule = draw(2, 1, 4, 4).to(dtype), model.embed(["", "a"]).to(dtype), model.schedule(5)
    assert sample(model, z, cond, schedule).dtype == dtype
    for method in (None, Anderson(window=2)):
        assert invert(model, z, cond, schedule, method=method).dtype == dtype


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@torch.inference_mode()
def test_a_schedule_that_ends_in_pure_noise_is_walked_as_diffusers_does(tiny_parts, prediction, guidance, steps):
    """Zero terminal SNR, trailing (arXiv 2305.08891): at the noisy end ᾱ = 0, and nothing divides by it."""
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": prediction}
    scheduler = DDIMScheduler(**BETAS, **options)
    model = wrap(tiny_parts | {"scheduler": scheduler})
    noise, schedule = draw(2, *model.latent_shape), model.schedule(steps)
    cond = model.condition(["a lake", "snow"], guidance=guidance)
    assert schedule.at(steps) == (0, 1)
    theirs = drawn_by_hand(model, scheduler, noise, cond, steps, guidance)
    ours = sample(model, noise, cond, schedule)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4) and ours.isfinite().all()
    assert invert(model, ours, cond, schedule).isfinite().all()


def test_eps_says_nothing_where_there_is_no_signal(tiny_parts):
    scheduler = DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    model = wrap(tiny_parts | {"scheduler": scheduler})
    for walk in (sample, invert):
        with pytest.raises(ModelError) as caught:
            walk(model, draw(1, *model.latent_shape), model.nothing, model.schedule(3))
        assert caught.value.code == "model.no-signal" and caught.value.subject == "tiny"


class Network:
    """The exact posterior mean of normal data with variance s² and mean m, as a network that predicts `what`."""

    def __init__(self, what, s=0.5, mean=0.3):
        self.what, self.s, self.mean = what, s, mean

    def embed(self, prompts):
        return torch.zeros(len(prompts), 1, 1)

    def predict(self, z, level, schedule, cond):
        a, s = schedule.at(level)
        gain = a * self.s**2 / (a**2 * self.s**2 + s**2)
        x0 = self.mean + gain * (z - a * self.mean) + 0.1 * s * a * torch.sin(z.roll(1, -1))
        eps = (z - a * x0) / s
        out = {"sample": x0, "v_prediction": a * eps - s * x0, "flow_prediction": eps - x0}[self.what]
        return PREDICTIONS[self.what](z, out, a, s)


def flow(steps):
    """σ as FlowMatchEulerDiscreteScheduler spaces it with shift 3."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler, Schedule.from_sigma(scheduler.sigmas.flip(0), scheduler.timesteps.flip(0))


def no_signal(steps):
    scheduler = DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    return Schedule.from_alpha_bar(scheduler.alphas_cumprod, scheduler.timesteps, 1.0)


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_rectified_flow_is_walked_as_diffusers_does(steps):
    (scheduler, schedule), model = flow(steps), Network("flow_prediction")
    z, cond = draw(2, 3, 4, 4), model.embed(["", ""])
    ours, level = sample(model, z, cond, schedule), len(schedule)
    for t in scheduler.timesteps:
        x0, eps = model.predict(z, level, schedule, cond)
        z, level = scheduler.step(eps - x0, t, z).prev_sample, level - 1
    assert torch.allclose(ours, z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [4, 25])
@pytest.mark.parametrize(
    ("what", "schedule"),
    [("flow_prediction", lambda n: flow(n)[1]), ("v_prediction", no_signal), ("sample", no_signal)],
    ids=["flow", "v", "x0"],
)
def test_exact_inversion_recovers_the_noise_where_the_noisy_end_has_no_signal(what, schedule, steps):
    model, noise, schedule = Network(what), draw(3, 2, 4, 4), schedule(steps)
    cond = model.embed([""] * 3)
    latents = sample(model, noise, cond, schedule)
    naive = invert(model, latents, cond, schedule)
    exact = invert(model, latents, cond, schedule, method=Anderson(window=2), max_steps=60, tol=1e-7)
    assert (norms(exact - noise) < 1e-2 * norms(noise)).all()
    assert (norms(exact - noise) < 0.1 * norms(naive - noise)).all()


def test_one_step_of_rectified_flow_is_inverted():
    """From x₀ = z − v(z), as in InstaFlow."""
    model, noise, (_, schedule) = Network("flow_prediction"), draw(3, 2, 4, 4), flow(1)
    latents = sample(model, noise, model.embed([""] * 3), schedule)
    x0, eps = model.predict(latents, 1, schedule, None)
    assert torch.allclose(invert(model, latents, model.embed([""] * 3), schedule), latents + (eps - x0), atol=1e-5)
