"""Marks at other sizes, the small setting end to end."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    found = experiment("marked_sizes", tmp_path, "-n", 2, "--size", "160x96", "--steps", 6, "--attack", "jpeg:50")
    assert [(row["size"], row["attack"]) for row in found["rows"]] == [("160x96", "clean"), ("160x96", "jpeg:50")]
    assert found["rows"][0]["count"] == 2 and found["rows"][0]["largest p"] < 1e-6
    assert all(0 <= row["low"] <= row["share"] <= row["high"] <= 1 for row in found["rows"])
