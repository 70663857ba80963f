"""What a billion pictures take: the small setting, and the false discovery rate."""

from __future__ import annotations

import json

import numpy as np
import pytest

from scripts.experiments.scale import RESULTS, discoveries, power


def test_small_setting(experiment, tmp_path):
    found = experiment("scale", tmp_path, "--pictures", 100_000, "--rate", 0.01, "--runs", 1, figure=False)
    assert [row["marked"] for row in found["rows"]] == [1000] * 3
    clean = found["rows"][0]
    assert 50 < clean["false at 0.001"] < 150 and clean["false"] < clean["false at 0.001"]
    published = json.loads((RESULTS / "scale.json").read_text())
    assert published["seconds"] == found["seconds"], "scale.json was made from another benchmark.json: run it again"


def test_benjamini_and_hochberg_keep_the_rate():
    random = np.random.default_rng(0)
    false, true = np.sum([discoveries(100_000, 1000, 0.9, 0.1, random)[2:4] for _ in range(20)], 0)
    assert false / (false + true) == pytest.approx(0.1, abs=0.02)


def test_the_power_of_those_that_were_all_found_is_bounded():
    assert power(31, 40) == 31 / 40
    assert power(40, 40) == pytest.approx(0.025 ** (1 / 40))
