"""The study's small setting, end to end; a stopped run goes on where it was."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner

from scripts.experiments import search as script

SMALL = ("-n", 2, "--search-steps", 2, "--dear", 1, "--angle-step", 15, "--attack", "rotation:75")


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    found = experiment("search", tmp_path, *SMALL)
    rows = {(r["attack"], r["way"]): r for r in found["rows"]}
    assert set(rows) == {("rotation:75", way) for way in script.WAYS}
    for (_, way), r in rows.items():
        assert (r["marked"], r["unmarked"]) == (1, 1) and r["false"] == 0
        assert r["inversions"] == {"without": 1, "search": 2}.get(way, r["inversions"]) and r["seconds"] > 0
        assert 0 <= r["AUC low"] <= r["AUC"] <= r["AUC high"] <= 1
    turned = rows["rotation:75", "search"]
    assert turned["mean score marked"] > rows["rotation:75", "without"]["mean score marked"] + 0.15
    assert turned["mean score marked"] > turned["mean score unmarked"] + 0.05
    assert found["grid"] == 24 * 10 and found["tests"] > 64 * 64
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.*[ls]")}
    experiment("search", tmp_path, *SMALL)
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.*[ls]")}


def test_both_search_where_the_ordinary_test_does_not_suffice():
    def columns(*p: float) -> dict[str, np.ndarray]:
        return {"p": np.array(p), "seconds": np.ones(len(p)), "inversions": np.ones(len(p))}

    found = script.both(columns(4e-4, 6e-4, 0.9), columns(1.0, 1e-6, 0.7), 1e-3)
    assert found["p"].tolist() == [8e-4, 2e-6, 1.0] and found["inversions"].tolist() == [1, 2, 2]
    assert found["seconds"].tolist() == [1, 2, 2] and found["score"].tolist() == [-8e-4, -2e-6, -1.0]


def test_pictures_of_others_carry_no_mark(tmp_path):
    done = CliRunner().invoke(script.main, ["-o", str(tmp_path), "--images", str(tmp_path)])
    assert done.exit_code == 2 and "--images" in done.output
