"""Rows by hand, images judged for their own keys, and the refusal without stages; the small setting, end to end."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from ringmark.errors import CalibrationError
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.schemes.base import scheme_of
from scripts.experiments import benchmark as script

NOISE = torch.randn(40, 4, 8, 8, generator=torch.Generator().manual_seed(0))
FORMER = Calibration.measure(NOISE, {"steps": 25}, {"drawn": 40})


def test_a_row_by_hand():
    table = {
        "stages": torch.tensor([1e-4, 1e-4, 1.0, 1.0]),
        "alone": torch.tensor([1e-4, 0.5, 1e-4, 1e-4]),
        "plain": torch.tensor([3.0, 4.0, 5.0, 6.0]),
        "seconds": torch.tensor([[1.0, 4.0, 10.0]] * 2 + [[3.0, 4.0, 10.0]] * 2),
    }
    row = script.row_of("none", table, 0)
    assert (row["stages / alone"], row["plain / stages"]) == (0.5, 5.0)
    assert (row["found, stages"], row["found, alone"], row["difference"]) == (0.5, 0.75, -0.25)
    assert row["difference low"] <= -0.25 <= row["difference high"]
    assert row["seconds, alone"] == 4 and row["mean seconds, stages"] == 2


def test_every_image_is_drawn_and_judged_with_its_own_key(bench, monkeypatch):
    run = bench(number=5, steps=1)
    keys = [run.key(seed=i) for i in range(2)]
    asked = []

    def judge(key, images):
        asked.append((key, len(images)))
        return [0.5] * len(images)

    def ways(bench, key, former):
        return dict.fromkeys(script.WAYS, partial(judge, key))

    monkeypatch.setattr(script, "ways_of", ways)
    monkeypatch.setattr(script.Bench, "calibration_used", "none")
    images = script.marked_images(run, keys)
    table = script.judged_by_key(run, keys, FORMER, images, "clean")
    assert asked == [(keys[0], 3)] * 3 + [(keys[1], 2)] * 3
    assert table["stages"].shape == (5,) and table["seconds"].shape == (5, 3)
    noise, prompts = run.fresh(5)
    marked = torch.cat([scheme_of(keys[0]).embed(noise[:3]), scheme_of(keys[1]).embed(noise[3:])])
    assert torch.equal(images, run.draw(marked, prompts).images)


def test_a_calibration_without_stages_is_refused(bench):
    run = bench()
    vars(run)["calibration"] = run.calibration and replace(run.calibration, earlier=())
    with pytest.raises(CalibrationError) as refused:
        script.ways_of(run, run.key(seed=0), FORMER)
    assert refused.value.code == "calibration.stages"
