"""Distances and ratios by hand; the small setting, end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scripts.experiments import diversity as script


def test_the_distance_of_two_pictures_by_hand():
    first, second = torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32)
    second[0] = 2 / 127.5
    second[1, :, ::2] = 4 / 127.5  # whose mean is that of the other
    assert script.distances(first, second) == pytest.approx([2, 2], rel=1e-4)


def test_the_ratio_is_that_of_the_means():
    found = script.compared(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]), "a", 0)
    assert found == {"a distance": 2.0, "a ratio": 0.5, "a low": 0.5, "a high": 0.5}


def test_rows_compare_pictures_of_the_same_key():
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    same = torch.cat([images[:4], images[:4]])
    unmarked, alike = script.rows_of({"unmarked": images, "alike": same}, {"alike": 0.1}, 2, 0)
    assert unmarked["same prompt ratio"] == unmarked["another prompt ratio"] == 1 and unmarked["altered"] == 0
    assert alike["same prompt distance"] == 0 < alike["another prompt distance"] and alike["pairs"] == 4
    assert alike["another prompt distance"] == pytest.approx(script.distances(same[:4], same[[2, 3, 0, 1]]).mean())


@pytest.mark.slow
def test_end_to_end(experiment, tmp_path):
    found = experiment("diversity", tmp_path, "-n", 2, "--keys", 2, "--steps", 2)
    rows = {row["mark"]: row for row in found["rows"]}
    assert rows["unmarked"]["same prompt ratio"] == 1 and len(rows) == 8
    assert rows["1-9"]["altered"] < rows["all 2-3, 4-10"]["altered"]
