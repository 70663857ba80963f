"""Candidates by hand: bands of a mark, AUC and shares of images, paired differences; the small setting, end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ringmark.watermark.null import Null
from ringmark.watermark.schemes.fourier import Placement
from ringmark.watermark.schemes.tree_ring import TreeRing
from scripts.experiments import placement as script

NAMES = script.candidates((0,), (0,))


def test_auc_and_shares_by_hand():
    p = np.array([[-9.0, -1.0], [-0.5, -2.0], [-2.0, -2.0]])  # negatives: -1, -0.5, -2
    better, found = script.of_images(p, np.array([0, 1, 0]))
    assert better == pytest.approx([1, 5 / 6, 5 / 6]) and found.tolist() == [True, False, False]


def test_a_candidate_is_the_mark_limited_to_its_bands(bench, pocket):
    key, other = (bench().key(Placement((0,), (0, 12)), seed=i) for i in range(2))
    null, noise = (
        Null.of_model(pocket),
        torch.randn(3, *pocket.latent_shape, generator=torch.Generator().manual_seed(0)),
    )
    marked = TreeRing(key).embed(noise)
    spoilt = torch.fft.fft2(marked.double())
    spoilt[:, :, TreeRing(key).ring > 4] = 0  # nothing of the mark's higher rings is left
    low, high = (
        script.log10_p([key, other], [Placement((0,), radii)], null, torch.fft.ifft2(spoilt).real)
        for radii in ((1, 4), (5, 9))
    )
    assert (low[:, 0] < -20).all() and (low[:, 1] > -3).all() and (high > -3).all()


def test_candidates_are_of_all_channels_where_they_say_so():
    tried = script.candidates((0, 1, 2), (1,))
    assert tried["1-4, 5-9"] == [Placement((1,), (1, 4)), Placement((1,), (5, 9))]
    assert tried["all 2-3, 4-10"] == [Placement((0, 1, 2), (2, 3)), Placement((1,), (4, 10))]
    assert set(script.REFERENCES) <= set(tried)


def test_rows_compare_with_the_better_reference():
    rng = np.random.default_rng(0)
    own, p = np.arange(40) % 2, {name: -rng.uniform(size=(40, 2)) for name in NAMES}
    p["1-5"][np.arange(40), own] = -5
    rows = script.rows_of("none", p, own, dict.fromkeys(NAMES, 0.1), 0)
    by_name = {row["bands"]: row for row in rows}
    assert by_name["1-5"]["auc"] == by_name["1-5"]["found"] == 1 and by_name["1-5"]["auc difference"] == 0
    for row in rows:
        assert row["auc difference"] == pytest.approx(row["auc"] - 1)
        assert row["auc low"] <= row["auc difference"] <= row["auc high"]


@pytest.mark.slow
def test_end_to_end(experiment, tmp_path):
    found = experiment("placement", tmp_path, "-n", 4, "--keys", 2, "--steps", 2, "--attack", "jpeg:25")
    assert len(found["rows"]) == 2 * len(NAMES)
    shares = {row["bands"]: row["altered"] for row in found["rows"]}
    assert shares["1-9"] == pytest.approx(shares["1-4, 5-9"]) and shares["1-9"] < shares["4-10"]
