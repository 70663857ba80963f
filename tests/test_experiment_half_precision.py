"""Half precision against float32: what is compared, by hand; the small setting, end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ringmark.watermark.calibration import Calibration
from scripts.experiments import half_precision as script


def test_a_row_by_hand():
    change = np.array([[0.1, 0.3], [-0.4, 0.0], [0.0, 0.0]])
    row = script.row_of(3, change, np.array([[1.0, 0.96], [1.02, 1.0]]), seed=0)
    assert (row["steps"], row["images"], row["keys"]) == (3, 3, 2)
    assert row["power, largest change"] == pytest.approx(0.04) and row["log10 p, mean change"] == pytest.approx(0)
    assert row["largest of an image"] == pytest.approx(0.2) and row["largest of an image and key"] == 0.4
    assert row["low"] <= 0 <= row["high"]


def test_power_is_compared_ring_by_ring():
    noise = torch.randn(20, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    full, twice = (Calibration.measure(x, {}, {"drawn": 20}) for x in (noise, 2 * noise))
    ratio = script.power_ratio(twice, full)
    assert ratio.shape == (full.reach + 1, 2) and ratio == pytest.approx(4)


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    found = experiment("half_precision", tmp_path, "-n", 20, "--keys", 3, "--steps", 4, figure=False)
    assert [row["steps"] for row in found["rows"]] == [0, 3, 4] and found["half"] == "bfloat16"
    assert all(0 < row["power, largest change"] < 0.5 for row in found["rows"])
