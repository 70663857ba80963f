"""Stable Diffusion 1 and 2: networks that predict ε or v, with and without signal at the noisy end."""

from __future__ import annotations

from family import FamilyTests, ddim


class TestNoise(FamilyTests):
    name, family, channels = "stable-diffusion", "stable-diffusion", 4

    @classmethod
    def deterministic(cls, scheduler):
        return ddim(scheduler)


class TestVelocity(TestNoise):
    name = "stable-diffusion-v"


class TestZeroTerminalSNR(TestNoise):
    name = "stable-diffusion-zero-snr"

    def test_the_noisy_end_has_no_signal(self, model):
        assert model.schedule(4).at(4) == (0.0, 1.0)


class TestRectifiedFlow(FamilyTests):
    name, family, channels = "rectified-flow", "rectified-flow", 4
