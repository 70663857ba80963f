"""The Ray engine while its processes are killed: the small setting, end to end."""

from __future__ import annotations

import pytest

pytest.importorskip("ray")


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    options = ["-n", 60, "--kills", 1, "--drivers", 1, "--measured", 24]
    found = experiment("engines", tmp_path, *options, figure=False)
    assert found["killed"] == {"worker": 1, "driver": 1} and found["lines"] == 60
    assert found["rows"][-1]["images"] == 60 and found["rows"][-1]["different"] == 0
