"""Scores against many keys, outcomes worked by hand; the small setting, end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ringmark.watermark.embed import initial_noise
from ringmark.watermark.null import Null
from ringmark.watermark.statistics import published_distance
from scripts.experiments import identification as script
from scripts.experiments.common import score_and_p, share


@pytest.fixture
def schemes(bench):
    return script.make_schemes(bench(seed=3), 5)


def test_all_keys_at_once_are_scored_as_one_by_one(pocket, schemes):
    noise = initial_noise(list(range(6)), pocket.latent_shape)
    noise = torch.cat([schemes[1].embed(noise[:3]) + 0.5 * noise[:3], noise[3:]])
    null = Null.of_model(pocket)
    cosine, p, distance = script.scores(null, schemes, noise)
    for k, scheme in enumerate(schemes):
        score, p_value = score_and_p(scheme, null, noise)
        assert np.allclose(cosine[:, k], score, atol=1e-12) and np.allclose(p[:, k], p_value, rtol=1e-6)
        assert np.allclose(distance[:, k], published_distance(*(x.numpy() for x in scheme.masked(noise))))
    assert (cosine[:3].argmax(1) == 1).all() and (distance[:3].argmin(1) == 1).all()


def test_keys_of_a_seed_are_the_same_and_can_be_told_apart(pocket, bench, schemes):
    again = script.make_schemes(bench(seed=3), 5)
    assert all(torch.equal(a.spectrum, b.spectrum) for a, b in zip(schemes, again, strict=True))
    marks = torch.cat([s.embed(torch.zeros(1, *pocket.latent_shape)) for s in schemes])
    _, p, _ = script.scores(Null.of_model(pocket), schemes, marks)
    assert np.diag(p).max() < 1e-300 and p[~np.eye(5, dtype=bool)].min() > 1e-3


def test_rings_begin_with_the_own_key_and_larger_ones_hold_the_smaller():
    assert script.members(4, 3, 8).tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert script.members(3, 2, 2).tolist() == [[0, 1], [1, 0], [0, 1]]  # more images than keys: key i mod 2
    small, large = script.members(5, 4, 16), script.members(5, 16, 16)
    assert (large[:, :4] == small).all() and (np.sort(large) == np.arange(16)).all()


def test_outcomes_by_hand():
    cosine = np.array([[0.9, 0.1, 0.0], [0.8, 0.5, 0.0], [0.1, 0.7, 0.0], [0.2, 0.3, 0.1], [0.3, 0.2, 0.1]])
    found = script.outcomes(cosine, -cosine[:, [0, 2, 1]], cosine >= 0.5)
    assert found == {
        "cosine finds the key": 3,
        "distance finds the key": 3,
        "right key named": 2,  # the first two
        "wrong key named": 1,  # the third
        "no key named": 2,
        "falsely accused": 2,  # the second too: a wrong key is named beside the right one
    }
    assert found["right key named"] + found["wrong key named"] + found["no key named"] == 5


def test_p_is_corrected_for_the_ring_and_not_for_all_keys():
    p = np.full((2, 4), 0.5)
    p[0, 0], p[1, 1], p[1, 0] = 4e-4, 1e-5, 1e-3  # image 1 carries key 1
    unmarked = np.full((3, 4), 0.5)
    unmarked[0, 3], unmarked[1, 1] = 2e-4, 6e-4
    rows = {}
    for keys in (2, 4):
        for row in script.count("clean", (-p, p, p), (-unmarked, unmarked, unmarked), keys, 1e-3):
            rows[keys, row["outcome"]] = row
    assert rows[2, "right key named"]["count"] == 2  # 2 x 4e-4 <= 1e-3
    assert rows[4, "right key named"]["count"] == 1 and rows[4, "no key named"]["count"] == 1
    assert rows[4, "cosine finds the key"]["count"] == 2
    assert rows[2, "unmarked accused"]["count"] == 0  # key 3 is not in image 0's ring of two, and 2 x 6e-4 > 1e-3
    assert rows[4, "unmarked accused"]["count"] == 1
    assert rows[4, "unmarked accused"]["low"] < 1 / 3 < rows[4, "unmarked accused"]["high"]


def test_clopper_pearson():
    assert share(0, 64)["high"] == pytest.approx(1 - 0.025 ** (1 / 64)) and share(0, 64)["low"] == 0
    assert share(64, 64)["low"] == pytest.approx(0.025 ** (1 / 64))


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    options = ("-n", 2, "--unmarked", 1, "--keys", 2, "--keys", 16, "--steps", 4, "--attack", "blur:1")
    found = experiment("identification", tmp_path, *options)
    rows = {(r["attack"], r["keys"], r["outcome"]): r for r in found["rows"]}
    assert len(rows) == 2 * 2 * 7 and found["settings"]["keys_in_all"] == 16
    for keys in (2, 16):
        assert rows["clean", keys, "cosine finds the key"]["count"] == 2
        assert rows["clean", keys, "right key named"]["count"] == 2
    for attack in ("clean", "blur:1"):  # the more keys, the stricter the rule
        assert rows[attack, 2, "no key named"]["count"] <= rows[attack, 16, "no key named"]["count"]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.*[ls]")}
    experiment("identification", tmp_path, *options)
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.*[ls]")}


def test_what_is_refused(tmp_path):
    for options, said in ((["--images", str(tmp_path)], "--images"), (["--attack", "melt:3"], "'melt'")):
        done = CliRunner().invoke(script.main, [*options, "-o", str(tmp_path)])
        assert done.exit_code == 2 and said in done.output
