"""Pictures back to noise: what is recovered, and the settings that say what it depends on."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from checkpoints import wrap

from ringmark.errors import ModelError, RingmarkError
from ringmark.inversion.condition import Condition
from ringmark.inversion.decoder import INVERTERS, Inverter
from ringmark.inversion.diffusion import invert, sample
from ringmark.inversion.methods import ForwardStep
from ringmark.inversion.recover import Recoverer, RecoverySettings
from ringmark.inversion.schedule import Schedule


class Identity:
    """Pixels are latents and the network predicts no noise, so that noise is latents up to a known scale."""

    factor, image_size = 1, (8, 8)
    device, dtype = torch.device("cpu"), torch.float32
    identity = {"name": "identity", "fingerprint": "0", "family": "identity", "channels": 3, "factor": 1}

    def encode(self, images):
        return images

    decode = encode

    nothing = Condition({"prompt_embeds": torch.zeros(1, 1, 1)})

    def predict(self, latents, level, schedule, cond):
        assert len(cond) == len(latents)
        return latents / schedule.at(level)[0], torch.zeros_like(latents)

    def schedule(self, steps, size=None):
        return Schedule.from_alpha_bar(torch.linspace(1, 0.01, steps + 1).double(), torch.arange(1, steps + 1))


@pytest.fixture
def model(tiny_parts):
    return wrap(tiny_parts)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_noise_is_the_latents_carried_to_the_noisy_end():
    recoverer, images = Recoverer(Identity(), INVERTERS["encoder"], steps=4), draw(3, 3, 8, 8).clamp(-1, 1)
    recovered = recoverer(images)
    assert torch.equal(recovered.images, images) and torch.equal(recovered.solution.value, images)
    assert torch.allclose(recovered.noise, 0.1 * images, atol=1e-6)
    assert recovered.noise.dtype == torch.float32 and recovered.seconds > 0


def test_noise_and_latents_are_those_of_the_two_inversions(model):
    recoverer, images = Recoverer(model, Inverter(ForwardStep(), 2), steps=3), draw(2, 3, 16, 16).clamp(-1, 1)
    recovered = recoverer(images)
    solution = Inverter(ForwardStep(), 2)(model, images)
    torch.testing.assert_close(recovered.solution.value, solution.value)
    expected = invert(model, solution.value, model.nothing.expand(2), model.schedule(3))
    torch.testing.assert_close(recovered.noise, expected)
    torch.testing.assert_close(recoverer.noise(recoverer.latents(images).value), expected)


def test_noise_of_drawn_latents_resembles_what_they_were_drawn_from(model):
    noise = draw(2, *model.latent_shape)
    latents = sample(model, noise, model.nothing.expand(2), model.schedule(25))
    recovered = Recoverer(model).noise(latents)
    assert (recovered - noise).norm() < 0.5 * noise.norm()


def test_no_images_are_no_noise():
    recoverer = Recoverer(Identity(), INVERTERS["encoder"], steps=2)
    assert recoverer.noise(torch.empty(0, 3, 8, 8)).shape == (0, 3, 8, 8)


def test_without_steps_the_latents_stand_for_the_noise(model):
    images, latents = torch.rand(2, 3, 16, 16) * 2 - 1, Recoverer(model, INVERTERS["encoder"], 0)
    recovered = latents(images)
    torch.testing.assert_close(recovered.noise, latents.encode(images))
    assert latents.settings.timesteps == "" and latents.settings.steps == 0


@pytest.mark.parametrize("method", ["encoder", "operator"])
def test_what_is_encoded_already_is_not_encoded_again(model, method):
    recoverer, images = Recoverer.named(model, method, steps=2), torch.rand(3, 3, 16, 16) * 2 - 1
    plain, given = recoverer(images), recoverer(images, recoverer.encode(images))
    assert torch.equal(plain.noise, given.noise) and plain.solution.status == given.solution.status


def test_settings_are_what_calibration_files_hold():
    settings = Recoverer(Identity()).settings
    expected = {
        "model": Identity.identity,
        "image_size": [8, 8],
        "dtype": "torch.float32",
        "method": "Operator(allowance=1.9, steepness=8.0)",
        "max_steps": 2,
        "early": False,
        "gradient": False,
        "lean": False,
        "steps": 10,
        "timesteps": "1-10",
    }
    assert settings.as_dict() == expected and list(settings.as_dict()) == list(expected)
    assert json.loads(json.dumps(settings.as_dict())) == expected


def test_settings_are_told_apart_by_what_they_serve():
    settings = Recoverer(Identity()).settings
    latents, noise = settings.of_latents(), settings.of_noise()
    assert latents | noise == settings.as_dict()
    assert not {"steps", "timesteps"} & set(latents) and not {"method", "max_steps"} & set(noise)
    assert Recoverer(Identity(), steps=7).settings.of_latents() == latents
    assert Recoverer(Identity(), INVERTERS["forward"]).settings.of_noise() == noise


def test_every_setting_is_a_setting_of_latents_or_noise():
    """A new field must not be forgotten by the caches."""
    settings = Recoverer(Identity()).settings
    names = {field.name for field in dataclasses.fields(RecoverySettings)}
    assert names == set(settings.of_latents()) | set(settings.of_noise())


@pytest.mark.parametrize("method", INVERTERS)
def test_a_recoverer_by_name(method):
    recoverer = Recoverer.named(Identity(), method, 3, 5)
    assert recoverer.inverter == Inverter.named(method, 3) and len(recoverer.schedule((8, 8))) == recoverer.steps == 5
    assert Recoverer.named(Identity(), method).settings == Recoverer(Identity(), INVERTERS[method]).settings


def test_a_name_of_no_method():
    with pytest.raises(RingmarkError) as caught:
        Recoverer.named(Identity(), "nonesuch")
    assert caught.value.code == "recovery.method-unknown" and "operator" in str(caught.value)


def test_steps_that_cannot_be_walked(model):
    with pytest.raises(ModelError) as caught:
        Recoverer(model, steps=1001)
    assert caught.value.code == "model.steps"
