"""Time of an audit against the number of workers: the small setting, end to end."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    found = experiment("reading", tmp_path, "-n", 2, "--rounds", 1, "--side", 256, figure=False)
    assert [row["workers"] for row in found["rows"]] == [0, 1, 2] * 3
    assert all(row["s an image"] > 0 for row in found["rows"])
