"""Scores of many keys by one matrix product: equal to those of one key at a time, in score, p, rank and verdict."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from identity import MODEL, key
from scipy import stats
from test_detector import coloured, judged, on

from ringmark.watermark import bank as bank_module
from ringmark.watermark.bank import Bank
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.detector import Detector
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.statistics import agreement, conformal_p, corrected, may_be_undecided, undecided

WHITE = Null.white(MODEL.latent_shape)


@pytest.mark.parametrize("pattern", ["rand", "ring", "zeros"])
def test_scores_of_many_keys_are_those_of_each(pattern, monkeypatch):
    monkeypatch.setattr(bank_module, "BLOCK", 3)  # several blocks
    schemes = [TreeRing(key(seed, pattern)) for seed in range(8)]
    noise = torch.cat([schemes[5].embed(initial_noise([1], MODEL.latent_shape)), coloured(9, 3)])
    null = Calibration.measure(coloured(0, 40), {"model": MODEL.identity}, {"drawn": 40}).null
    bank = Bank(schemes, null)
    scores = bank.scores(bank.test.observe(noise))
    for k, scheme in enumerate(schemes):
        test = scheme.on(null)
        alone = test.score(test.observe(noise))
        assert scores[:, k] == pytest.approx(alone, abs=1e-7)
        assert test.log10_p(scores[:, k]) == pytest.approx(test.log10_p(alone), rel=1e-5, abs=1e-6)


def one_by_one(detector: Detector, noise: torch.Tensor) -> list[tuple]:
    """Outcome, p, score and conformal p of each image and key, each key by itself and with the ranks of all."""
    columns = []
    for each in detector.keys:
        score, log10_p = detector.statistic(each.fingerprint, noise)
        references = detector.reference_scores(each.fingerprint)
        ranks = conformal_p(score, references)
        open_ = undecided(10**log10_p, ranks, len(references), detector.alpha / detector.number_of_tests)
        joint = corrected(log10_p, detector.number_of_tests)
        present = [None if doubt else p <= detector.alpha for doubt, p in zip(open_, 10**joint, strict=True)]
        columns.append((present, joint, score, np.minimum(1, ranks * detector.number_of_tests)))
    return columns


@pytest.mark.parametrize("alpha, number", [(1e-3, 300), (0.05, 60), (0.4, 60)])
def test_verdicts_by_one_product_are_those_of_each_key_with_all_its_ranks(alpha, number):
    keys = [key(seed, "rand") for seed in range(6)] + [key(1, "ring"), key(2, "ring"), key(1, "zeros")]
    noise, new = coloured(0, number), coloured(1000, 16)
    zero = torch.zeros(1, *MODEL.latent_shape, dtype=torch.float64)
    marks = [TreeRing(each).embed(zero) for each in keys[:4]]
    noise[:6] += 0.6 * marks[0]  # marks among the unmarked contradict a small p
    noise -= 0.5 * marks[1]  # and a key that they all lack is contradicted by a large p
    for i, mark in enumerate(marks):
        new[4 * i : 4 * i + 3] += 0.4 * mark
    detector = on(noise, keys, alpha=alpha)
    found = judged(detector, new)
    expected = one_by_one(detector, new.float())
    seen: set = set()
    for k, (present, log10_p, score, ranks) in enumerate(expected):
        verdicts = [each.verdicts[k] for each in found]
        assert [v.present for v in verdicts] == present
        assert [v.log10_p for v in verdicts] == pytest.approx(log10_p, rel=1e-5, abs=1e-6)
        assert [v.score for v in verdicts] == pytest.approx(score, abs=1e-6)
        assert [v.conformal_p for v in verdicts] == pytest.approx(ranks)
        assert all(("contradicts" in v.sentence()) == (v.present is None) for v in verdicts)
        seen |= set(present)
    assert seen == {True, False, None}


def test_ranks_are_looked_at_only_where_they_could_matter():
    keys = [key(seed, "rand") for seed in range(200)]
    detector = on(coloured(0, 100), keys)
    noise = TreeRing(keys[7]).embed(coloured(1000, 4).float())
    assert [j.best.key for j in judged(detector, noise)] == [keys[7].fingerprint] * 4
    assert detector._references.cache_info().misses < 10


def test_p_of_the_best_of_many_keys_is_corrected_for_their_number():
    keys = [key(seed, "rand") for seed in range(300)]
    noise = initial_noise(list(range(400)), MODEL.latent_shape)
    p = np.array([each.best.p_value for each in judged(Detector(keys, null=WHITE), noise)])
    # Of independent tests, K min p is at most u with probability 1 − (1 − u/K)^K.
    assert stats.kstest(1 - (1 - p[p < 1] / 300) ** 300, "uniform", (0, 1 - (1 - 1 / 300) ** 300)).pvalue > 0.01
    assert (p <= 0.05).mean() < 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


@pytest.mark.parametrize("n", [19, 100, 999])
def test_a_p_that_no_rank_contradicts_needs_none(n):
    p = np.concatenate([np.geomspace(1e-12, 0.5, 80), np.linspace(0.5, 1, 20)])
    for most in (0, 1, 5):
        ranks = [(k + 1) / (n + 1) for k in range(most + 1)]
        possible = np.any([~agreement(p, np.full(len(p), rank), n) for rank in ranks], axis=0)
        assert (may_be_undecided(p, most, n) == possible).all()
