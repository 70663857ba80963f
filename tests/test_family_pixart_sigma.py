"""PixArt-Σ, whose network also predicts variances."""

from __future__ import annotations

from family import FamilyTests, ddim


class TestPixArtSigma(FamilyTests):
    name, family, channels = "pixart-sigma", "pixart-sigma", 4
    call = {"use_resolution_binning": False}

    @classmethod
    def deterministic(cls, scheduler):
        """With evenly spaced timesteps ("linspace"), DDIM steps to others than those that it lists."""
        return ddim(scheduler, timestep_spacing="trailing")

    def test_the_network_predicts_twice_as_many_channels(self, model):
        assert model.network.config.out_channels == 2 * model.channels
