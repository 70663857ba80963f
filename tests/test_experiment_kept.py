"""Time of a further audit: the small setting, end to end."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    found = experiment("kept", tmp_path, "-n", 16, "--keys", 1, "--keys", 10, "--rounds", 1, figure=False)
    assert [row["keys"] for row in found["rows"]] == [1, 10] and found["bytes"] > 4000
    assert all(row["images a second"] > 0 for row in found["rows"]) and found["rows"][1]["rows of the table"] > 0
