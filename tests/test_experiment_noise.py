"""What counts as a call of the network; the small setting of the experiment on noise, end to end."""

from __future__ import annotations

import pytest
import torch

from scripts.experiments import noise as script


def test_calls_are_counted_by_latents(pocket):
    counting, schedule = script.Counting(pocket), pocket.schedule(2)
    counting.predict(torch.zeros(3, *pocket.latent_shape), 1, schedule, pocket.nothing.expand(3))
    assert counting.calls == 3


def test_many_steps_are_not_tried_twice():
    assert list(script.inversions(4, 25, 3)) == ["naive", "exact", "naive, 25 steps"]
    assert list(script.inversions(25, 25, 3)) == ["naive", "exact"]


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    options = ("-n", 2, "--drawn", 4, "--its", 3, "--inversion-steps", 6)
    rows = {
        (row["latents"], row["prompt"], row["inversion"]): row
        for row in experiment("noise", tmp_path, *options)["rows"]
    }
    assert len(rows) == 3 * (2 + len(script.INVERTERS))
    for way, calls in (("naive", 4), ("naive, 6 steps", 6)):
        assert rows["encoder", "empty", way]["calls"] == calls
    naive, exact = (rows["true", "true", way]["noise NMSE dB"] for way in ("naive", "exact"))
    assert exact < naive - 3
