"""Rows by hand; the small setting, end to end."""

from __future__ import annotations

import numpy as np
import pytest

from ringmark.inversion.recover import STEPS
from scripts.experiments import steps as script


def test_rows_by_hand():
    rows = script.rows_of("none", {4: np.array([1e-4, 1e-2, 0.1, 1.0]), STEPS: np.full(4, 1e-6)}, 0)
    few, usual = rows
    assert (few["steps"], few["count"], few["of"], few["difference"]) == (4, 1, 4, -0.75)
    assert few["median log10 p"] == pytest.approx(-1.5) and few["difference low"] <= -0.75 <= few["difference high"]
    assert (usual["share"], usual["difference"], usual["difference low"]) == (1.0, 0.0, 0.0)


@pytest.mark.slow
def test_small_setting(experiment, smooth_pictures, tmp_path):
    options = ("-n", 2, "--keys", 2, "--steps", 4, "--count", 1, "--attack", "jpeg:50")
    rows = experiment("steps", tmp_path / "out", smooth_pictures(20), *options)["rows"]
    assert [(row["condition"], row["steps"]) for row in rows] == [
        (condition, count) for condition in ("clean", "jpeg:50") for count in (1, STEPS)
    ]
    assert all(row["of"] == 2 and row["low"] <= row["share"] <= row["high"] for row in rows)
