"""What was computed once is kept by what it is made from."""

from __future__ import annotations

import os

import pytest
import torch

from ringmark.data.cache import cached, cached_rows


def constant(value):
    return lambda: {"x": torch.tensor(value)}


def test_a_cache_keeps_what_was_made_first_for_each_key(tmp_path):
    assert cached(tmp_path, ["a", torch.ones(2)], constant(1.0))["x"] == 1
    assert cached(tmp_path, ["a", torch.ones(2)], constant(2.0))["x"] == 1
    assert cached(tmp_path, ["a", torch.zeros(2)], constant(3.0))["x"] == 3
    for path in tmp_path.iterdir():
        assert os.name != "posix" or path.stat().st_mode & 0o077 == 0
        path.write_bytes(b"torn")
    assert cached(tmp_path, ["a", torch.ones(2)], constant(4.0))["x"] == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_types_and_shapes_come_back(tmp_path, dtype):
    made = {"x": torch.arange(6).reshape(2, 3).T.to(dtype), "scalar": torch.tensor(1, dtype=dtype)}
    cached(tmp_path, ["k"], lambda: made)
    kept = cached(tmp_path, ["k"], lambda: pytest.fail("made twice"))
    assert all(torch.equal(kept[name], made[name]) and kept[name].dtype == dtype for name in made)


def test_only_missing_rows_are_made(tmp_path):
    asked = []

    def double(rows):
        asked.append(rows.flatten().tolist())
        return {"double": 2 * rows, "sum": rows.sum(1)}

    rows = torch.arange(8.0).reshape(4, 2)
    cached_rows(tmp_path, ["k"], rows[1:3], double)
    found = cached_rows(tmp_path, ["k"], rows, double)
    assert torch.equal(found["double"], 2 * rows) and torch.equal(found["sum"], rows.sum(1))
    assert asked == [[2, 3, 4, 5], [0, 1, 6, 7]]
