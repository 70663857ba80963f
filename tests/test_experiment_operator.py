"""Theorem 1's condition by hand; the small setting, end to end, on an autoencoder from a file."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from ringmark.data.scenes import scene
from scripts.experiments import operator as script

HALVES = """
import torch.nn.functional as F

def load():
    return (lambda x: 0.8 * F.avg_pool2d(x, 2)), (lambda z: F.interpolate(z, scale_factor=2.0))
"""


def test_the_condition_holds_where_a_step_comes_closer():
    truth, start = torch.zeros(2, 1), torch.ones(2, 1)
    path = [start, torch.tensor([[0.5], [-0.5]]), torch.tensor([[0.25], [-2.0]])]
    found = script.condition_of("any", path, truth)
    assert (found["steps"]["count"], found["steps"]["of"]) == (3, 4)
    assert (found["images"]["count"], found["images"]["of"]) == (1, 2)


def test_small_setting(experiment, tmp_path):
    for i in range(3):
        Image.fromarray(scene(i, 16).pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "load.py").write_text(HALVES)
    options = ["--images", tmp_path, "--autoencoder", tmp_path, "--skip", 1, "-n", 2, "--side", 16]
    found = experiment("operator", tmp_path / "out", *options)
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["operator, 1"]["evaluations"] == 2 and rows["operator, 5"]["evaluations"] == 10
    assert rows["operator, 3"]["gain dB"] > 3 and rows["operator, 3"]["images that lose"] == 0
    assert found["encoder"] == pytest.approx(-14, abs=0.5)  # E∘D is 0.8
