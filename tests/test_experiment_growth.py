"""Time against the size and the number of pictures: the small setting, end to end."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    given = ("--shape", "pocket", "--side", 64, "--side", 72, "--images", 3)
    found = experiment("growth", tmp_path, *given, figure=False)
    parts, (audit,) = found["rows"], found["audits"]
    assert [part["side"] for part in parts] == [64, 72]
    assert all(part[f"{name} s"] > 0 for part in parts for name in ("encoder", "decoder", "network"))
    passed = [stage["s"] for stage in found["stages"]]
    assert passed == sorted(passed) and len(passed) == 3 and passed[0] > 0
    assert audit["images"] == 3 and audit["ms an image"] > 0
    assert experiment("growth", tmp_path, *given, figure=False)["rows"] == found["rows"]  # kept
