"""False positives at other sizes: what is painted and counted, by hand; the small setting, end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ringmark.data.scenes import scene
from scripts.experiments import sizes as script


def test_a_picture_is_the_middle_of_a_scene():
    whole = torch.from_numpy(scene(5, 48).pixels).movedim(-1, 0) / 127.5 - 1
    assert torch.equal(script.painted(5, (48, 48)), whole)
    assert torch.equal(script.painted(5, (32, 48)), whole[:, 8:40]) and whole.min() >= -1 and whole.max() <= 1
    assert torch.equal(script.painted(5, (48, 20)), whole[:, :, 14:34])


def test_rates_by_hand():
    p = np.array([[0.0005, 0.005, 0.5, 0.9], [0.04, 0.03, 0.2, 0.7]])
    row = script.row_of({"size": "8x8"}, p, seed=0)
    assert (row["keys"], row["images"], row["size"]) == (2, 4, "8x8")
    assert (row["0.05"], row["0.01"], row["0.001"]) == (0.5, 0.25, 0.125)
    assert (row["0.05 worst"], row["0.01 worst"], row["0.001 worst"]) == (0.5, 0.5, 0.25)
    assert row["0.01 low"] <= row["0.01"] <= row["0.01 high"]


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    found = experiment("sizes", tmp_path, "-n", 4, "--own", 20, "--keys", 2, "--size", "96x160", "--steps", 2)
    rows = {(row["size"], row["pattern"], row["null"]): row for row in found["rows"]}
    assert len(rows) == 3 + 6 and {size for size, *_ in rows} == {"128x128", "96x160"}
    assert all(0 <= row["0.05"] <= 1 for row in rows.values())
