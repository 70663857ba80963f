"""FLUX.1: tokens of 2×2 latents, levels that depend on the size, guidance as an input of the network."""

from __future__ import annotations

import torch
from family import PROMPTS, FamilyTests, packed, unpacked


class TestDev(FamilyTests):
    name, family, native = "flux.1-dev", "flux.1", (1024, 1024)

    def given(self, noise):
        return packed(noise)

    def canonical(self, latents, size):
        return unpacked(latents, size)

    def test_larger_pictures_spend_more_steps_on_noise(self, model):
        small, large = (model.schedule(4, size).noise for size in ((64, 64), (1024, 1024)))
        assert (large[1:-1] > small[1:-1]).all() and large[-1] == small[-1] == 1


class TestSchnell(TestDev):
    name = "flux.1-schnell"

    def test_larger_pictures_spend_more_steps_on_noise(self, model):
        assert torch.equal(model.schedule(4, (64, 64)).noise, model.schedule(4, (1024, 1024)).noise)

    def test_guidance_has_no_effect(self, model, noise):
        schedule = model.schedule(2, self.size)
        conditions = [model.condition(PROMPTS, guidance=guidance) for guidance in (1.0, 3.0)]
        (x0, _), (guided, _) = (model.predict(noise, 2, schedule, condition) for condition in conditions)
        assert torch.equal(x0, guided)
