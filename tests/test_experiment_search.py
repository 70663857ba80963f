"""The study's small setting, end to end; what is found by both tests together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ringmark.data.cuts import boxes
from ringmark.data.images import from_array
from scripts.experiments import search as script


def outcome(*p: float) -> dict[str, torch.Tensor]:
    return {"p": torch.tensor(p), "seconds": torch.ones(len(p)), "calls": torch.ones(len(p))}


def test_both_search_where_the_ordinary_test_does_not_suffice():
    searched = outcome(1.0, 1e-6, 0.7)
    searched["p"] = searched["p"][:, None]
    row = script.row("turned", outcome(4e-4, 6e-4, 0.9), searched)
    assert (row["without count"], row["with count"], row["images"]) == (2, 2, 3)
    assert row["with low"] < 2 / 3 < row["with high"] and "found of 3: 2" in script.summary(row)


def test_rates_of_unmarked_pictures():
    row = script.false_row({**outcome(*np.zeros(4)), "p": torch.tensor([[0.04, 1], [1, 1], [0.009, 1], [1, 1.0]])}, 0)
    assert (row["images"], row["keys"], row["0.05"], row["0.01"], row["0.001"]) == (4, 2, 2 / 8, 1 / 8, 0)


def test_every_change_changes_and_is_repeated():
    image = torch.from_numpy(np.stack([np.mgrid[-1:1:32j, -1:1:32j][0], *np.mgrid[-1:1:32j, -1:1:32j]])).float()[None]
    for name, change in script.CHANGES.items():
        after = script.changed(change, image.expand(2, -1, -1, -1), [0])
        assert torch.equal(after, script.changed(change, image.expand(2, -1, -1, -1), [0]))
        same = after.shape[1:] == image.shape[1:] and bool((after - image).abs().max() < 0.01)
        assert (name == "as it is") is same


def test_pictures_on_a_sheet_and_in_a_screenshot_are_cut_out():
    others = [from_array(np.random.default_rng(i).uniform(-1, 1, (3, 64, 64))) for i in range(9)]
    rng = np.random.default_rng(0)
    assert len(boxes(script.on_sheet(others[:8], others[8], rng), least=32)) == 9
    for _ in range(4):
        assert len(boxes(script.in_screenshot(others[0], rng), least=32)) == 1


@pytest.mark.slow
def test_small_setting(experiment, house, tmp_path):
    out = tmp_path / "search"
    found = experiment(
        "search", out, house / "images/marked", house / "my.key", house / "images/unmarked", "-n", 1, "--keys", 2
    )
    assert [row["change"] for row in found["rows"]] == [*script.CHANGES, script.SHEET]
    assert all(row["images"] == 1 and row["search seconds"] > 0 for row in found["rows"])
    assert (found["false"]["images"], found["false"]["keys"]) == (1, 2)
