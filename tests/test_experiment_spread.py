"""Rows by hand; the small setting, end to end."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from scripts.experiments import spread as script


def test_the_spread_of_one_half_widens_the_other():
    rng = np.random.default_rng(0)
    spreads = np.where(np.arange(200) < 10, 2.0, 1.0)  # ten bad keys
    log10_p = stats.norm.logsf(rng.normal(0, spreads, (400, 200))) / np.log(10)
    plain, wide = (script.row_of("latents", way, p, 0) for way, p in (("a", log10_p), ("b", script.by_halves(log10_p))))
    assert plain["0.01 worst"] > 5 and plain["0.01 low"] > 1.2
    assert wide["0.01 worst"] < 2 and wide["0.01 low"] <= 1


def test_the_walk_by_hand():
    p = [np.log10([[0.01]]), np.log10([[0.01]]), np.log10([[0.5]])]
    assert 10 ** script.walked(p, [0.1, 0.2, 0.7]) == pytest.approx(0.05)  # 0.01 / 0.2


def test_small_setting(experiment, tmp_path):
    found = experiment("spread", tmp_path, "--keys", 20)
    stages = [(row["stage"], row["p"]) for row in found["rows"]]
    assert stages == [
        *((stage, "by the null") for stage in ("latents", "3 steps", "full")),
        *((stage, "widened") for stage in ("latents", "3 steps")),
        ("walk", "by the null"),
        ("walk", "widened"),
    ]
    assert all(row["images"] == 500 and row["keys"] == 20 for row in found["rows"])
    assert found["inflation"]["latents"]["largest"] > found["inflation"]["latents"]["median"] >= 1
