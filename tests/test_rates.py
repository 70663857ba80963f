"""Curves and intervals against what is worked by hand, and against their own promise to cover."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ringmark.errors import EvaluationError
from ringmark.watermark.evaluation.rates import (
    auc_interval,
    bootstrap_interval,
    confusion,
    delong_variance,
    roc,
    split_operating_point,
    tpr_at,
)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def width(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]


def clopper_pearson(k: int, n: int) -> tuple[float, float]:
    low = stats.beta.ppf(0.025, k, n - k + 1) if k else 0.0
    return low, stats.beta.ppf(0.975, k + 1, n - k) if k < n else 1.0


def test_a_list_worked_by_hand():
    curve = roc([0.9, 0.8, 0.4], [0.5, 0.4, 0.1], name="by hand")
    assert curve.auc == pytest.approx((3 + 3 + 1 + 0.5) / 9)  # of nine pairs one is a tie
    point = tpr_at([0.9, 0.8, 0.4], [0.5, 0.4, 0.1], 0.01)
    assert point.tpr == pytest.approx(2 / 3) and point.tpr_interval == pytest.approx(clopper_pearson(2, 3))
    assert curve.point is None and curve.needed == 99  # three unmarked images know nothing of 1 %
    assert curve.fpr.tolist() == pytest.approx([0, 0, 0, 1 / 3, 2 / 3, 1])
    assert curve.tpr.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3, 1, 1])
    assert curve.thresholds.tolist() == [np.inf, 0.9, 0.8, 0.5, 0.4, 0.1]
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


@given(scores, scores, st.sampled_from([0.01, 0.2, 0.5, 1.0]))
@settings(max_examples=8, deadline=None)
def test_curves_rise_and_tpr_is_the_best_threshold_allowed(marked, unmarked, limit):
    curve = roc(marked, unmarked, fpr_limit=limit)
    for rate in (curve.fpr, curve.tpr):
        assert rate[0] == 0 and rate[-1] == 1 and (np.diff(rate) >= 0).all()
    for fpr, tpr, threshold in zip(curve.fpr, curve.tpr, curve.thresholds, strict=True):
        rates = [np.mean(np.array(values) >= threshold) for values in (unmarked, marked)]
        assert rates == pytest.approx([fpr, tpr])
    for zero_too in (0.0, limit):
        thresholds = [t for t in [*marked, *unmarked, 99] if np.mean(np.array(unmarked) >= t) <= zero_too]
        best = max(np.mean(np.array(marked) >= t) for t in thresholds)
        assert tpr_at(marked, unmarked, zero_too).tpr == pytest.approx(best)
    assert curve.auc_interval[0] <= curve.auc_interval[1] and curve.fpr_limit == limit
    assert (curve.point is None) == (len(unmarked) < curve.needed)


def test_separable_classes():
    marked, unmarked = np.arange(100, 140), np.arange(60)
    curve = roc(marked, unmarked)
    assert curve.auc == 1 and tpr_at(marked, unmarked, 0.01).tpr == 1
    # Forty independent pairs, all in order.
    assert curve.auc_interval == pytest.approx(clopper_pearson(40, 40))
    assert curve.auc_interval == pytest.approx((0.025 ** (1 / 40), 1))
    assert tpr_at(marked, unmarked, 0.01).tpr_interval == pytest.approx(clopper_pearson(40, 40))


def test_reversed_classes():
    curve, point = roc(np.arange(60), np.arange(100, 140)), tpr_at(np.arange(60), np.arange(100, 140), 0.01)
    assert curve.auc == 0 and point.tpr == 0
    assert curve.auc_interval == pytest.approx(clopper_pearson(0, 40))
    assert point.tpr_interval == pytest.approx(clopper_pearson(0, 60))


def test_one_image_of_each_kind_proves_little():
    assert roc([1], [0]).auc_interval == pytest.approx((0.025, 1))


def test_scores_that_are_all_the_same():
    curve = roc(np.ones(8), np.ones(9))
    assert curve.auc == 0.5 and tpr_at(np.ones(8), np.ones(9), 0.01).tpr == 0
    # Their spread is 0, but they say nothing: the interval is that of the largest variance there can be.
    assert curve.auc_interval[0] < 0.25 and sum(curve.auc_interval) == pytest.approx(1)


def test_tpr_at_one_percent_of_two_hundred():
    # Above these scores are 0, 1, 2, 2 and 3 of 200 unmarked ones: 1 % is two of them.
    point = roc([250, 198.5, 197.5, 197.25, 196.5], np.arange(200)).point
    assert point.tpr == pytest.approx(4 / 5) and point.tpr_interval == pytest.approx(clopper_pearson(4, 5))
    exact = stats.binomtest(4, 5).proportion_ci(method="exact")
    assert point.tpr_interval == (exact.low, exact.high)
    assert point.fpr == 0.01 and point.fpr_interval == pytest.approx(clopper_pearson(2, 200))
    assert roc([250, 198.5, 197.5], np.arange(200), fpr_limit=0.0099).point.tpr == pytest.approx(2 / 3)
    assert roc([197], np.arange(200), fpr_limit=0.01).point.tpr == 0  # a tie with the third is a false positive too


@pytest.mark.parametrize(("limit", "needed"), [(0.01, 99), (0.001, 999), (0.5, 1), (1, 0)])
def test_a_rate_needs_enough_unmarked_images(limit, needed):
    enough = roc([5000], np.arange(max(1, needed)), fpr_limit=limit)
    assert enough.needed == needed and enough.point.tpr == 1 and enough.summary()["tpr_at"] == 1
    if needed > 1:
        few = roc([5000], np.arange(needed - 1), fpr_limit=limit)
        assert few.point is None and few.summary()["tpr_at"] is None and few.summary()["unmarked_needed"] == needed


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.1, np.nan])
def test_a_rate_is_between_0_and_1(limit):
    with pytest.raises(EvaluationError) as error:
        roc([1], [0], fpr_limit=limit)
    assert error.value.code == "evaluation.fpr"


def test_the_interval_of_the_fpr_covers_that_of_the_threshold():
    # Uniform scores: the true FPR of a threshold t is 1 − t.
    rng, covered = np.random.default_rng(10), 0
    for _ in range(400):
        point = tpr_at([2.0], rng.random(150), 0.02)
        covered += point.fpr_interval[0] <= 1 - point.threshold <= point.fpr_interval[1]
    assert covered >= stats.binom.ppf(0.001, 400, 0.95)


@pytest.mark.parametrize("negatives", [100, 300, 700, 1000])
def test_a_limit_that_is_met_exactly_is_met(negatives):
    allowed = negatives // 100
    assert roc([negatives - allowed - 0.5], np.arange(negatives), fpr_limit=0.01).point.tpr == 1
    assert roc([negatives - allowed - 1.5], np.arange(negatives), fpr_limit=0.01).point.tpr == 0


@pytest.mark.parametrize("marked, unmarked", [([], [1.0]), ([1.0], []), ([], [])])
def test_both_classes_are_needed(marked, unmarked):
    with pytest.raises(EvaluationError, match=f"{len(marked)} and {len(unmarked)}") as error:
        roc(marked, unmarked)
    assert error.value.code == "evaluation.classes"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_every_score_must_be_a_number(bad):
    for classes in (([1, bad], [0, 0.5]), ([1, 2], [0, bad])):
        with pytest.raises(EvaluationError) as error:
            roc(*classes)
        assert error.value.code == "evaluation.scores"


@pytest.mark.parametrize("shift", [0.3, 1.5])
def test_the_bootstrap_covers_the_truth(shift):
    truth, covered = stats.norm.cdf(shift / 2**0.5), 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        low, high = bootstrap_interval(rng.normal(shift, 1, 40), rng.normal(0, 1, 50), draws=100, seed=seed)
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
        wide = auc_interval(marked, unmarked, level=0.99)
        assert wide[0] < low and high < wide[1]
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_a_monotone_change_of_score_changes_nothing():
    rng = np.random.default_rng(1)
    marked, unmarked = rng.normal(1, 1, 60), rng.normal(0, 1, 120)
    one, other = roc(marked, unmarked).summary(), roc(np.exp(marked), np.exp(unmarked)).summary()
    assert other.pop("threshold") == pytest.approx(np.exp(one.pop("threshold"))) and one == other


def test_a_summary_is_json_without_the_curve():
    summary = json.loads(json.dumps(roc([2, 3], [1, 2]).summary()))
    assert summary["auc"] == 0.875 and not {"fpr", "tpr"} & set(summary)
    points = json.loads(json.dumps(roc([2, 3], [1, 2]).points(), allow_nan=False))
    assert points == {"fpr": [0, 0, 0.5, 1], "tpr": [0, 0.5, 1, 1], "threshold": [None, 3, 2, 1]}


def textbook_variance(marked, unmarked) -> float:
    """DeLong, DeLong and Clarke-Pearson (1988): from every pair, ties half."""
    psi = np.sign(np.subtract.outer(marked, unmarked)) / 2 + 0.5
    return np.var(psi.mean(1), ddof=1) / len(marked) + np.var(psi.mean(0), ddof=1) / len(unmarked)


def test_delongs_variance_by_hand():
    # Against 1 and 3, the scores 2 and 4 come out at 1/2 and 1; against 2 and 4, 1 and 3 at 1 and 1/2: 1/8 twice.
    assert delong_variance([2, 4], [1, 3]) == pytest.approx(1 / 16 + 1 / 16)
    low, high = auc_interval([2, 4], [1, 3])
    half = 1.959963985 * 8**-0.5 / (3 / 16)
    assert (low, high) == pytest.approx(tuple(1 / (1 + np.exp(-(np.log(3) + s * half))) for s in (-1, 1)))


@given(st.lists(st.integers(0, 6), min_size=2, max_size=12), st.lists(st.integers(0, 6), min_size=2, max_size=12))
@settings(max_examples=50, deadline=None)
def test_midranks_give_the_textbooks_variance(marked, unmarked):
    variance = delong_variance(marked, unmarked)
    assert variance == pytest.approx(textbook_variance(marked, unmarked))
    assert variance == pytest.approx(delong_variance(-np.array(unmarked), -np.array(marked)))


@given(scores, scores, st.sampled_from([0.5, 0.95, 0.999]))
@settings(max_examples=100, deadline=None)
def test_any_interval_holds_the_auc_within_0_and_1(marked, unmarked, level):
    auc = roc(marked, unmarked).auc
    low, high = auc_interval(marked, unmarked, level=level)
    assert 0 <= low <= auc <= high <= 1 and low < high
    mirrored = auc_interval(unmarked, marked, level=level)
    assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]))
    low, high = bootstrap_interval(marked, unmarked, level=level, draws=20)
    assert 0 <= low <= high <= 1


@pytest.mark.parametrize("m, n", [(1, 1), (1, 50), (8, 3), (200, 100)])
def test_separate_classes_have_the_exact_interval_of_as_many_pairs(m, n):
    expected = (clopper_pearson(min(m, n), min(m, n))[0], 1.0)
    for interval in (auc_interval, bootstrap_interval):
        assert interval(np.arange(m) + 1000, np.arange(n)) == pytest.approx(expected)
        assert interval(np.arange(n), np.arange(m) + 1000) == pytest.approx((0, 1 - expected[0]))


@pytest.mark.parametrize("shift", [0.5, 1.5, 2.5])
def test_delongs_interval_covers_the_truth(shift):
    truth, covered = stats.norm.cdf(shift / 2**0.5), 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        low, high = auc_interval(rng.normal(shift, 1, 40), rng.normal(0, 1, 60))
        covered += low <= truth <= high
    assert stats.binom.ppf(0.001, 400, 0.95) <= covered <= stats.binom.ppf(0.999, 400, 0.95)


@pytest.mark.parametrize("shift", [0.5, 1.5])
def test_delong_and_bootstrap_agree(shift):
    rng = np.random.default_rng(5)
    marked, unmarked = rng.normal(shift, 1, 200), rng.normal(0, 1, 300)
    exact, drawn = auc_interval(marked, unmarked), bootstrap_interval(marked, unmarked)
    assert np.allclose(exact, drawn, atol=0.1 * (exact[1] - exact[0]))


def test_groups_of_one_change_nothing():
    rng = np.random.default_rng(6)
    marked, unmarked = rng.normal(1, 1, 30), rng.normal(0, 1, 40)
    alone = bootstrap_interval(marked, unmarked, draws=200, groups=(range(30), range(30, 70)))
    assert alone == bootstrap_interval(marked, unmarked, draws=200)


@pytest.mark.parametrize("shared", [False, True])
def test_images_of_one_prompt_count_as_one(shared):
    rng, copies = np.random.default_rng(7), 4
    marked, unmarked = rng.normal(1, 1, 60), rng.normal(0, 1, 60)
    once = width(bootstrap_interval(marked, unmarked, groups=(range(60), range(60)) if shared else None))
    many = [np.repeat(x, copies) for x in (marked, unmarked)]
    prompts = [np.repeat(np.arange(60) + (0 if shared else 100 * i), copies) for i in range(2)]
    assert width(bootstrap_interval(*many, groups=prompts)) == pytest.approx(once, rel=0.1)
    assert width(bootstrap_interval(*many)) < 0.6 * once
    curve = roc(*many, groups=prompts)
    assert width(curve.auc_interval) == pytest.approx(once, rel=0.1)


def test_pairs_that_rise_together_are_known_better_together():
    rng = np.random.default_rng(8)
    prompt = rng.normal(0, 3, 100)
    marked, unmarked = prompt + rng.normal(1, 0.1, 100), prompt + rng.normal(0, 0.1, 100)
    paired = bootstrap_interval(marked, unmarked, groups=(range(100), range(100)))
    apart = bootstrap_interval(marked, unmarked)
    assert paired[1] - paired[0] < 0.5 * (apart[1] - apart[0])


def test_separate_groups_are_counted_as_groups():
    groups = (np.repeat([0, 1, 2], 10), np.repeat([3, 4], 20))
    assert bootstrap_interval(np.arange(30) + 99, np.arange(40), groups=groups)[0] == pytest.approx(0.025 ** (1 / 2))


@given(scores, scores, st.sampled_from([0.01, 0.2, 0.5, 1.0]))
@settings(max_examples=30, deadline=None)
def test_the_point_of_a_curve(marked, unmarked, limit):
    point, curve = tpr_at(marked, unmarked, limit), roc(marked, unmarked, fpr_limit=limit)
    assert curve.point in (None, point)
    assert point.fpr == np.mean(np.array(unmarked) >= point.threshold) <= limit
    assert point.tpr == np.mean(np.array(marked) >= point.threshold)
    assert point.tpr_interval == pytest.approx(clopper_pearson(round(point.tpr * len(marked)), len(marked)))
    assert (point.positives, point.negatives, point.fpr_limit) == (len(marked), len(unmarked), limit)


def test_a_split_keeps_choosing_and_scoring_apart():
    # Of the unmarked halves one has the larger scores: a threshold chosen there is reached by its own images only.
    unmarked = np.arange(400.0)
    point = split_operating_point([500.0, 100], unmarked, 0.05, seed=1)
    choosing, scored = np.split(np.random.default_rng(1).permutation(unmarked), 2)
    assert (1 + (choosing >= point.threshold).sum()) / 201 <= 0.05 < (2 + (choosing >= point.threshold).sum()) / 201
    assert point.fpr == np.mean(scored >= point.threshold) and point.negatives == 200
    assert point.tpr == 0.5 and point.positives == 2
    assert point == split_operating_point([500.0, 100], unmarked, 0.05, seed=1)


@pytest.mark.parametrize("limit", [0.2, 0.05, 0.01])
def test_a_threshold_chosen_on_one_half_holds_on_the_other(limit):
    rng = np.random.default_rng(9)
    points = [split_operating_point(rng.normal(3, 1, 5), rng.normal(size=199), limit, seed) for seed in range(400)]
    rates = np.array([p.fpr for p in points])
    assert rates.mean() <= limit + 3 * rates.std() / 20
    flattered = np.array([tpr_at([3.0], rng.normal(size=199), limit).fpr for _ in range(5)])
    assert (flattered <= limit).all()


def test_too_few_to_choose_a_threshold():
    with pytest.raises(EvaluationError) as error:
        split_operating_point([1, 2], np.arange(196), 0.01, 0)
    assert error.value.code == "evaluation.few" and error.value.details == {"needed": 197}
    assert split_operating_point([1000, 2000], np.arange(197), 0.01, 0).tpr == 1
    for act, code in (
        (lambda: split_operating_point([], [1, 2, 3], 0.5, 0), "evaluation.classes"),
        (lambda: split_operating_point([1], [1], 1.0, 0), "evaluation.few"),
        (lambda: tpr_at([np.nan], [1, 2], 0.1), "evaluation.scores"),
    ):
        with pytest.raises(EvaluationError) as error:
            act()
        assert error.value.code == code


def test_confusion_by_hand():
    found = confusion([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0], 4)
    assert found.table.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert (found.right, found.number, found.accuracy) == (4, 6, 4 / 6)
    # Clopper–Pearson's ends are those where 4 of 6 or more, or fewer, have probability 2.5 %.
    low, high = found.interval
    assert stats.binom.sf(3, 6, low) == pytest.approx(0.025) and stats.binom.cdf(4, 6, high) == pytest.approx(0.025)
    assert confusion([1, 0], [1, 0], 2).interval[1] == 1


@pytest.mark.parametrize(
    ("truth", "chosen"), [([], []), ([0], [0, 1]), ([0], [3]), ([-1], [0]), ([0.0], [0.0]), ([[0]], [[0]])]
)
def test_confusion_refuses(truth, chosen):
    with pytest.raises(EvaluationError) as error:
        confusion(truth, chosen, 3)
    assert error.value.code == "evaluation.confusion"
