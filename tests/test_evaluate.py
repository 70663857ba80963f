"""Curves and intervals against what is worked by hand, and against their own promise to cover."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from watermark.errors import EvaluationError
from watermark.evaluate import auc_interval, roc


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def clopper_pearson(k: int, n: int) -> tuple[float, float]:
    low = stats.beta.ppf(0.025, k, n - k + 1) if k else 0.0
    return low, stats.beta.ppf(0.975, k + 1, n - k) if k < n else 1.0


def test_a_list_worked_by_hand():
    curve = roc([0.9, 0.8, 0.4], [0.5, 0.4, 0.1], name="by hand")
    assert curve.auc == pytest.approx((3 + 3 + 1 + 0.5) / 9)  # of nine pairs one is a tie
    assert curve.tpr_at == pytest.approx(2 / 3) and curve.tpr_at_interval == pytest.approx(clopper_pearson(2, 3))
    assert curve.fpr.tolist() == pytest.approx([0, 0, 0, 1 / 3, 2 / 3, 1])
    assert curve.tpr.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3, 1, 1])
    assert (curve.name, curve.positives, curve.negatives) == ("by hand", 3, 3)


scores = st.lists(st.integers(0, 6), min_size=1, max_size=12)


@given(scores, scores)
@settings(max_examples=8, deadline=None)
def test_auc_is_the_share_of_pairs_in_order_ties_counted_half(marked, unmarked):
    pairs = np.subtract.outer(marked, unmarked)
    curve = roc(marked, unmarked)
    assert curve.auc == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    assert roc(unmarked, marked).auc == pytest.approx(1 - curve.auc)
    assert np.trapezoid(curve.tpr, curve.fpr) == pytest.approx(curve.auc)


@given(scores, scores, st.sampled_from([0.0, 0.01, 0.2, 0.5, 1.0]))
@settings(max_examples=8, deadline=None)
def test_curves_rise_and_tpr_is_the_best_threshold_allowed(marked, unmarked, limit):
    curve = roc(marked, unmarked, fpr_limit=limit)
    for rate in (curve.fpr, curve.tpr):
        assert rate[0] == 0 and rate[-1] == 1 and (np.diff(rate) >= 0).all()
    thresholds = [t for t in [*marked, *unmarked, 99] if np.mean(np.array(unmarked) >= t) <= limit]
    assert curve.tpr_at == pytest.approx(max(np.mean(np.array(marked) >= t) for t in thresholds))
    assert curve.auc_interval[0] <= curve.auc_interval[1] and curve.fpr_limit == limit


def test_separable_classes():
    marked, unmarked = np.arange(100, 140), np.arange(60)
    curve = roc(marked, unmarked)
    assert curve.auc == 1 and curve.tpr_at == 1
    # Forty independent pairs, all in order.
    assert curve.auc_interval == pytest.approx(clopper_pearson(40, 40))
    assert curve.auc_interval == pytest.approx((0.025 ** (1 / 40), 1))
    assert curve.tpr_at_interval == pytest.approx(clopper_pearson(40, 40))


def test_reversed_classes():
    curve = roc(np.arange(60), np.arange(100, 140))
    assert curve.auc == 0 and curve.tpr_at == 0
    assert curve.auc_interval == pytest.approx(clopper_pearson(0, 40))
    assert curve.tpr_at_interval == pytest.approx(clopper_pearson(0, 60))


def test_one_image_of_each_kind_proves_little():
    assert roc([1], [0]).auc_interval == pytest.approx((0.025, 1))


def test_scores_that_are_all_the_same():
    curve = roc(np.ones(8), np.ones(9))
    assert curve.auc == 0.5 and curve.tpr_at == 0 and curve.auc_interval == (0.5, 0.5)


def test_tpr_at_one_percent_of_two_hundred():
    # Above these scores are 0, 1, 2, 2 and 3 of 200 unmarked ones: 1 % is two of them.
    curve = roc([250, 198.5, 197.5, 197.25, 196.5], np.arange(200))
    assert curve.tpr_at == pytest.approx(4 / 5) and curve.tpr_at_interval == pytest.approx(clopper_pearson(4, 5))
    exact = stats.binomtest(4, 5).proportion_ci(method="exact")
    assert curve.tpr_at_interval == (exact.low, exact.high)
    assert roc([250, 198.5, 197.5], np.arange(200), fpr_limit=0.0099).tpr_at == pytest.approx(2 / 3)
    assert roc([197], np.arange(200), fpr_limit=0.01).tpr_at == 0  # a tie with the third is a false positive too


@pytest.mark.parametrize("negatives", [100, 300, 700, 1000])
def test_a_limit_that_is_met_exactly_is_met(negatives):
    allowed = negatives // 100
    assert roc([negatives - allowed - 0.5], np.arange(negatives), fpr_limit=0.01).tpr_at == 1
    assert roc([negatives - allowed - 1.5], np.arange(negatives), fpr_limit=0.01).tpr_at == 0


@pytest.mark.parametrize("marked, unmarked", [([], [1.0]), ([1.0], []), ([], [])])
def test_both_classes_are_needed(marked, unmarked):
    with pytest.raises(EvaluationError, match=f"not {len(marked)} and {len(unmarked)}"):
        roc(marked, unmarked)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_every_score_must_be_a_number(bad):
    for classes in (([1, bad], [0, 0.5]), ([1, 2], [0, bad])):
        with pytest.raises(EvaluationError, match="not numbers"):
            roc(*classes)


@pytest.mark.parametrize("shift", [0.3, 1.5])
def test_the_bootstrap_covers_the_truth(shift):
    truth, covered = stats.norm.cdf(shift / 2**0.5), 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        low, high = auc_interval(rng.normal(shift, 1, 40), rng.normal(0, 1, 50), draws=100, seed=seed)
        covered += low <= truth <= high
    assert covered >= 85  # of 500 repetitions 91 to 94 % do


def test_the_interval_holds_the_estimate_narrows_and_repeats():
    rng = np.random.default_rng(0)
    widths = []
    for n in (20, 150):
        marked, unmarked = rng.normal(1, 1, n), rng.normal(0, 1, n)
        curve = roc(marked, unmarked, seed=3)
        low, high = curve.auc_interval
        assert low < curve.auc < high and curve.auc_interval == roc(marked, unmarked, seed=3).auc_interval
        wide = auc_interval(marked, unmarked, level=0.99, seed=3)
        assert wide[0] < low and high < wide[1]
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_a_monotone_change_of_score_changes_nothing():
    rng = np.random.default_rng(1)
    marked, unmarked = rng.normal(1, 1, 60), rng.normal(0, 1, 60)
    assert roc(marked, unmarked).summary() == roc(np.exp(marked), np.exp(unmarked)).summary()


def test_a_summary_is_json_without_the_curve():
    summary = json.loads(json.dumps(roc([2, 3], [1, 2]).summary()))
    assert summary["auc"] == 0.875 and not {"fpr", "tpr"} & set(summary)
