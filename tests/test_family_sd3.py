"""Stable Diffusion 3."""

from __future__ import annotations

import torch
from families import build
from family import FamilyTests

from ringmark.inversion.models.pipeline import LatentModel


class TestSD3(FamilyTests):
    name, family = "sd3", "sd3"


class TestDynamicShift(TestSD3):
    """Levels depend on the size of the picture."""

    @classmethod
    def deterministic(cls, scheduler):
        return type(scheduler).from_config(scheduler.config, use_dynamic_shifting=True, shift=1.0)

    def test_larger_pictures_spend_more_steps_on_noise(self, model):
        small, large = (model.schedule(4, size).noise for size in ((64, 64), (256, 256)))
        assert (large[1:-1] > small[1:-1]).all() and large[-1] == small[-1] == 1


def test_the_third_text_encoder_may_be_missing():
    pipe = build("sd3")
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    rows = LatentModel(pipe, name="sd3").condition(["a lake"]).rows
    assert rows["prompt_embeds"].shape[1] > 256 and torch.equal(rows["prompt_embeds"][0, -1], torch.zeros(48))
