"""Qwen-Image: a video autoencoder for one frame, masks of prompts, guidance that keeps the prediction's norm."""

from __future__ import annotations

import torch
from family import PROMPTS, FamilyTests, packed, unpacked


class TestQwenImage(FamilyTests):
    name, family, native = "qwen-image", "qwen-image", (1024, 1024)

    def given(self, noise):
        return packed(noise)

    def canonical(self, latents, size):
        return unpacked(latents, size)

    def guided(self, guidance):
        return {"true_cfg_scale": guidance} | ({} if guidance == 1 else {"negative_prompt": [""] * len(PROMPTS)})

    def posterior_mean(self, vae, images):
        return vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0]

    def reconstruction(self, vae, images):
        return vae.decode(self.posterior_mean(vae, images)[:, :, None]).sample[:, :, 0]

    def test_a_prompt_beside_a_longer_one_is_the_same(self, model, noise):
        schedule = model.schedule(2, self.size)
        both, alone = model.condition(PROMPTS), model.condition(PROMPTS[:1])
        assert not both.rows["prompt_embeds_mask"][0].all() and alone.rows["prompt_embeds_mask"].all()
        x0, _ = model.predict(noise, 2, schedule, both)
        assert torch.allclose(x0[:1], model.predict(noise[:1], 2, schedule, alone)[0], atol=1e-5)
