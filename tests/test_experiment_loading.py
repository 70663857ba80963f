"""Where the time of a short command goes: the small setting, end to end."""

from __future__ import annotations

import pytest

from scripts.experiments import loading as script


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    rows = experiment("loading", tmp_path, "--rounds", 1, figure=False)["rows"]
    assert [row["garbage collector"] for row in rows] == list(script.WAYS)
    assert all(sum(row[name] for name in (*script.STEPS, "exit")) == pytest.approx(row["whole"]) for row in rows)
