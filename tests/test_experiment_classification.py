"""How the classification embeds and counts, worked by hand; its small setting, end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from identity import of_shape, secret

from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.schemes.base import make_key
from ringmark.watermark.schemes.fourier import Placement
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.statistics import published_distance
from scripts.experiments import classification as script
from scripts.experiments.benchmark import by_verifier

SHAPE, PLACE = (4, 32, 32), Placement((3,), (6, 10))


@pytest.fixture(scope="module")
def scheme():
    placed = {"channels": PLACE.channels, "radii": PLACE.radii}
    return TreeRing(make_key("tree-ring", **of_shape(SHAPE), secret=secret(3), **placed))


def test_a_weak_mark_is_between_none_and_the_schemes_own(scheme):
    noise = initial_noise(list(range(40)), SHAPE)
    assert torch.allclose(script.Weak(scheme, 0.0).embed(noise), noise, atol=1e-5)
    assert torch.allclose(script.Weak(scheme, 1.0).embed(noise), scheme.embed(noise), atol=1e-5)
    marked = script.Weak(scheme, 0.5).embed(noise)
    bins, key = scheme.masked(marked)
    before, _ = scheme.masked(noise)
    assert torch.allclose(bins, 0.75**0.5 * before + 0.5 * key, atol=1e-3)
    assert float(marked.var()) == pytest.approx(1, abs=0.01)  # still unit normal to the eye of the model
    assert torch.equal(marked[:, :3], noise[:, :3])


def test_mcnemar_by_hand():
    one, other = np.array([1, 1, 1, 1, 1, 0, 1], bool), np.array([0, 0, 0, 0, 0, 1, 1], bool)
    assert script.mcnemar(one, other) == (5, 1, pytest.approx(2 * (1 + 6) / 2**6))
    assert script.mcnemar(other, one)[2] == script.mcnemar(one, other)[2]
    assert script.mcnemar(one, one) == (0, 0, 1.0)


def test_confusion_and_interval():
    truth, chosen = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 1, 1, 2, 0])
    fit = 1.0 * (chosen == np.arange(3)[:, None])
    row = script.score("some", "any", truth, fit)
    assert row["confusion"] == [[1, 1, 0], [0, 2, 0], [1, 0, 1]] and row["correct"] == 4
    assert row["low"] < 4 / 6 < row["high"]
    # Of 6 × 12 pairs of an own score and another's, 4 × 10 are in order, 4 × 2 and 2 × 10 tied, 2 × 2 turned about.
    assert row["AUC"] == pytest.approx((40 + 28 / 2) / 72)
    assert row["AUC low"] <= row["AUC"] <= row["AUC high"]


def test_true_noise_is_always_recognised(pocket, bench):
    schemes = list(map(TreeRing, script.make_keys(bench(seed=5), PLACE)))
    noise = torch.cat([script.Weak(s, 0.6).embed(initial_noise([k, k + 9], SHAPE)) for k, s in enumerate(schemes)])
    for statistic, fit in script.fits(pocket, schemes, noise).items():
        assert fit.argmax(0).tolist() == [0, 0, 1, 1, 2, 2], statistic
    nearest = [published_distance(*(x.numpy() for x in s.masked(noise))) for s in schemes]
    assert np.argmin(nearest, 0).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.slow
def test_fits_over_all_stages_are_those_of_thorough_verdicts(bench):
    small = bench(seed=5, number=1, steps=4)
    keys = [small.key(Placement((0,), (4, 10)), seed=k) for k in range(script.KEYS)]
    schemes = [TreeRing(key) for key in keys]
    images = script.drawn(small, [script.Weak(s, 0.3) for s in schemes])
    assert small.calibration is None and script.by_stages(small, keys, images) == {}  # none for four steps
    small = bench(seed=5, number=1)
    fit = script.by_stages(small, keys, images)
    verifiers = [Verifier(small.recoverer, [key], calibration=small.calibration, thorough=True) for key in keys]
    p = [by_verifier(verifier)(images) for verifier in verifiers]
    assert np.exp(-fit["all stages"]).clip(max=1) == pytest.approx(np.array(p))
    assert list(fit) == ["latents", "3 steps", "full", "all stages"]
    assert fit["all stages"].argmax(0).tolist() == [0, 1, 2]


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    options = ("-n", 1, "--its", 2, "--steps", 4, "--strength", 1, "--channel", 0, "--no-costs")
    found = experiment("classification", tmp_path, *options)
    assert len(found["rows"]) == 2 * 5 and len(found["pairs"]) == 2 * 10
    for row in found["rows"]:
        table = np.array(row["confusion"])
        assert (table.sum(1) == 1).all() and np.trace(table) == row["correct"] and row["of"] == 3
        assert row["low"] <= row["share"] <= row["high"]
    correct = {(r["statistic"], r["method"]): r["correct"] for r in found["rows"]}
    assert correct["whitened cosine", "Anderson"] == 3  # a whole mark in a good channel
    for pair in found["pairs"]:
        gain = correct[pair["statistic"], pair["one"]] - correct[pair["statistic"], pair["other"]]
        assert pair["only one right"] - pair["only other right"] == gain
