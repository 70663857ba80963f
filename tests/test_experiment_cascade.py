"""The walk by hand and as the verifier walks it; p of unmarked noise; the small setting, end to end."""

from __future__ import annotations

import numpy as np
import pytest

from ringmark.inversion.recover import Recoverer
from ringmark.watermark.embed import initial_noise
from scripts.experiments import cascade as script

WEIGHTS = [0.1, 0.2, 0.7]


def test_walks_by_hand():
    #             found at once, found second, found last, given up, walked in vain
    p = [
        np.array([1e-5, 0.5, 0.5, 0.5, 0.05]),
        np.array([1.0, 1e-4, 0.1, 0.3, 0.1]),
        np.array([1, 1, 1e-4, 1e-9, 0.35]),
    ]
    joint, stages = script.walked(p, WEIGHTS)
    assert joint == pytest.approx([1e-4, 5e-4, 1e-4 / 0.7, 1.0, 0.5]) and stages.tolist() == [1, 2, 3, 2, 3]
    alone, once = script.walked(p[:1], [1.0])
    assert np.array_equal(alone, p[0]) and set(once) == {1}


def test_p_of_the_walk_holds_its_level_however_the_stages_depend_on_each_other():
    rng = np.random.default_rng(0)
    same = rng.uniform(size=20000)
    for p in ([same] * 3, list(rng.uniform(size=(3, 20000))), [same, 1 - same, same]):
        joint, _ = script.walked(p, WEIGHTS)
        for level in (0.05, 0.01, 0.001):
            assert (joint <= level).mean() <= level + 3 * (level / 20000) ** 0.5


def test_rows_by_hand():
    p = [np.full(4, 0.5), np.full(4, 0.15), np.array([1e-4, 8e-4, 0.5, 0.5])]
    row = script.found_row("none", p, WEIGHTS, np.array([1.0, 2.0, 10.0]), 0)
    assert (row["walk"], row["alone"], row["difference"], row["ends at 3"]) == (0.25, 0.5, -0.25, 1.0)
    assert row["time"] == pytest.approx(13 / 11) and row["difference low"] <= -0.25 <= row["difference high"]
    rows = script.false_rows([x[:, None] for x in p], WEIGHTS, ["a", "b", "c"], 0)
    assert [row["p of"] for row in rows] == ["a", "b", "c", "walk"] and rows[2]["0.001"] == 0.5


def test_weights_are_those_of_the_verifier(pocket):
    stages = [*script.early_stages(Recoverer(pocket, steps=25)), Recoverer(pocket, steps=25)]
    assert script.weights_of(stages) == pytest.approx(WEIGHTS)


def test_halves_are_tested_under_each_other(bench, pocket):
    stage, noise = Recoverer(pocket, steps=1), initial_noise(list(range(60)), pocket.latent_shape)
    keys = [bench().key(seed=i) for i in range(2)]
    p = script.by_halves(stage, keys, noise)
    other = script.p_values(script.calibration_of(stage, noise[1::2]), keys, noise[::2])
    assert p.shape == (60, 2) and np.array_equal(p[::2], other)


@pytest.mark.slow
def test_end_to_end(experiment, smooth_pictures, tmp_path):
    folder = smooth_pictures(40)
    found = experiment("cascade", tmp_path / "out", folder, "-n", 2, "--keys", 2, "--steps", 4)
    assert [row["attack"] for row in found["rows"]] == ["unmarked", "clean", *script.SIX]
    assert all(0 <= row["walk"] <= 1 and row["time"] > 0 for row in found["rows"])
