"""Samplers by name: which fit a model, and which add noise of their own."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from checkpoints import draw
from families import build

from ringmark.errors import ModelError
from ringmark.inversion.models.samplers import SAMPLERS, adds_noise, make_sampler

STEPS = 3
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def drawn_twice(scheduler: Any) -> bool:
    """Whether two walks with different random numbers end alike."""
    ends = []
    for seed in (0, 1):
        generator, z = torch.Generator().manual_seed(seed), draw(1, 4, 4, 4)
        scheduler.set_timesteps(STEPS)
        random = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
        for t in scheduler.timesteps:
            z = scheduler.step(z / 2, t, z, **random)[0]
        ends.append(z)
    return torch.allclose(*ends)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("flow", [False, True])
def test_samplers_that_add_noise_are_those_that_need_random_numbers(name, flow):
    if flow and not SAMPLERS[name].flow:
        pytest.skip("not for rectified flow")
    own = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0) if flow else diffusers.DDIMScheduler(**CONFIG)
    scheduler = make_sampler(name, own, flow=flow)
    assert scheduler.config.num_train_timesteps == 1000
    assert adds_noise(scheduler, {}) is not drawn_twice(scheduler)


@pytest.mark.parametrize(
    "kind, settings, arguments, expected",
    [
        ("DDIMScheduler", {}, {"eta": 1.0}, True),
        ("DDIMScheduler", {}, {"eta": 0.0}, False),
        ("EulerDiscreteScheduler", {}, {"eta": 1.0}, False),  # has no η, so pipelines do not pass it on
        ("TCDScheduler", {}, {"eta": 0.0}, False),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}, True),
        ("DPMSolverSinglestepScheduler", {}, {}, False),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}, True),
        ("KDPM2AncestralDiscreteScheduler", {}, {}, True),
        ("SASolverScheduler", {}, {}, True),
        ("LCMScheduler", {}, {"num_inference_steps": 1}, False),  # the last step adds none
    ],
)
def test_noise_depends_on_class_settings_and_call(kind, settings, arguments, expected):
    assert adds_noise(getattr(diffusers, kind)(**settings), arguments) is expected


def test_a_subclass_of_a_scheduler_is_like_it():
    class Mine(diffusers.LCMScheduler):
        pass

    assert adds_noise(Mine(), {})


def test_the_shift_of_time_is_the_models():
    own = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert make_sampler("dpm++", own, flow=True).config.flow_shift == 3.0
    assert make_sampler("euler", make_sampler("unipc", own, flow=True), flow=True).config.shift == 3.0


@pytest.mark.parametrize("name, flow", [("none", False), ("ddim", True)])
def test_a_sampler_of_another_kind_of_model_is_refused(name, flow):
    with pytest.raises(ModelError) as caught:
        make_sampler(name, diffusers.DDIMScheduler(), flow=flow)
    assert caught.value.code == "model.sampler"


def test_a_sampler_that_a_pipeline_cannot_use_is_refused():
    from ringmark.inversion.models.pipeline import LatentModel

    model = LatentModel(build("flux.1-dev"), name="tiny")
    assert len(model.sampler("dpm++", STEPS, (64, 96)).timesteps) == STEPS
    with pytest.raises(ModelError) as caught:
        model.sampler("heun", STEPS)
    assert caught.value.code == "model.sampler"
