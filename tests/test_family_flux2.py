"""FLUX.2: latents are normalised in patches of 2×2; Klein is guided away from the empty prompt."""

from __future__ import annotations

import torch
from family import FamilyTests, packed, unpacked


class TestDev(FamilyTests):
    name, family, channels, native = "flux.2", "flux.2", 32, (1024, 1024)

    def given(self, noise):
        height, width = noise.shape[-2:]
        return packed(noise).transpose(1, 2).reshape(len(noise), -1, height // 2, width // 2)

    def canonical(self, latents, size):
        return unpacked(latents, size)

    def test_levels_depend_on_the_size_and_on_the_number_of_steps(self, model):
        few, many = (model.schedule(steps, (1024, 1024)).noise for steps in (4, 8))
        assert (model.schedule(4, (64, 64)).noise[1:-1] < few[1:-1]).all()
        assert not torch.allclose(few, many[::2], atol=1e-3)

    def test_latents_have_unit_variance_if_the_statistics_are_right(self, model):
        mean, deviation = model.vae.bn.running_mean, (model.vae.bn.running_var + 1e-4).sqrt()
        patches = torch.stack([mean - deviation, mean + deviation], dim=1).view(1, 128, 2, 1)
        z = model.family.normalise(model.vae, torch.nn.functional.pixel_shuffle(patches, 2))
        assert torch.allclose(z[..., :2, :], torch.tensor(-1.0), atol=1e-4)
        assert torch.allclose(z[..., 2:, :], torch.tensor(1.0), atol=1e-4)


class TestKlein(TestDev):
    name = "flux.2-klein"
