"""Memory against the number of records: the small setting, end to end."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    found = experiment("records", tmp_path, "--records", 20, figure=False)
    assert [row["what"] for row in found["rows"]] == ["resumed", "reported", "tested again"]
    assert all(row["records"] == 20 and row["peak MB"] > 100 for row in found["rows"])
