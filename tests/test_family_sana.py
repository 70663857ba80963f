"""Sana: an autoencoder of factor 32, and an instruction before every prompt but negative ones."""

from __future__ import annotations

import torch
from family import FamilyTests


class TestSana(FamilyTests):
    name, family, channels, factor = "sana", "sana", 32, 32
    native, size = (256, 256), (128, 192)
    call = {"use_resolution_binning": False}

    @classmethod
    def deterministic(cls, scheduler):
        """The first-order solver is Euler's method."""
        return type(scheduler).from_config(scheduler.config, solver_order=1)

    def posterior_mean(self, vae, images):
        return vae.encode(images).latent

    def test_negative_prompts_lack_the_instruction(self, model):
        rows = model.condition(["fog"], guidance=3.0, negative="fog").rows
        assert not torch.allclose(rows["prompt_embeds"], rows["negative_prompt_embeds"], atol=0.1)
        assert rows["prompt_embeds"].shape == rows["negative_prompt_embeds"].shape
