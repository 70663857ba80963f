"""SDXL and its Turbo, whose sampler has trailing steps."""

from __future__ import annotations

import torch
from family import PROMPTS, FamilyTests, ddim


class TestBase(FamilyTests):
    name, family, channels = "sdxl", "sdxl", 4

    @classmethod
    def deterministic(cls, scheduler):
        return ddim(scheduler)

    def test_no_prompt_is_zeros_and_a_negative_prompt_is_not(self, model):
        assert not model.empty["prompt_embeds"].any() and not model.empty["pooled_prompt_embeds"].any()
        rows = model.condition(PROMPTS, guidance=3.0, negative="fog").rows
        assert rows["negative_prompt_embeds"].abs().min() > 0
        assert torch.equal(rows["negative_prompt_embeds"][:1], model.condition(["fog"]).rows["prompt_embeds"])


class TestTurbo(TestBase):
    name = "sdxl-turbo"
