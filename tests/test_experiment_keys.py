"""Time against the number of keys: what is measured; the small setting, end to end."""

from __future__ import annotations

import pytest

from scripts.experiments import keys as script
from scripts.experiments.common import Bench


def test_keys_are_distinct_and_reproducible(tmp_path):
    bench = Bench("keys", tmp_path, seed=3)
    ring = script.keys_of(bench, 5)
    assert len({key.fingerprint for key in ring}) == 5
    assert [key.secret for key in ring] == [key.secret for key in script.keys_of(bench, 5)]
    assert ring[0].metadata["bands"] == bench.key(seed=0).metadata["bands"]


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    found = experiment("keys", tmp_path, "-n", 2, "--keys", 1, "--keys", 10, "--rounds", 1, figure=False)
    assert [row["keys"] for row in found["rows"]] == [1, 10] and found["references"] > 0
    assert all(row["search s"] > 0 for row in found["rows"])
    assert all(row["open s"] > 0 and row["first s"] > row["ms an image, alone"] / 1000 > 0 for row in found["rows"])
