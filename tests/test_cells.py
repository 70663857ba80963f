"""The numbers of a cell: rates are there where there are enough unmarked images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from ringmark.errors import EvaluationError
from ringmark.watermark.evaluation.cells import CLEAN, Cell
from ringmark.watermark.evaluation.plots import StrengthDisplay, roc_figure, strength_figure
from ringmark.watermark.evaluation.rates import tpr_at
from ringmark.watermark.schemes.base import published_statistics

DISTANCE = published_statistics()["published_distance"]


def cell(attack: str, marked, unmarked, **changes) -> Cell:
    marked, unmarked = np.asarray(marked, float), np.asarray(unmarked, float)
    groups = ([f"m{i}" for i in range(len(marked))], [f"u{i}" for i in range(len(unmarked))])
    whole = Cell(
        key="abcd",
        scheme="rand",
        attack=attack,
        method="encoder",
        statistic=DISTANCE.label,
        marked=marked,
        unmarked=unmarked,
        groups=groups,
        p=None,
        published=DISTANCE,
        seconds=0.5,
        megabytes=np.nan,
    )
    return replace(whole, **changes)


def test_rates_are_there_where_there_are_enough_unmarked_images():
    rng = np.random.default_rng(0)
    marked, unmarked = rng.normal(1, 1, 50), rng.normal(0, 1, 200)
    row = cell(CLEAN, marked, unmarked, p=(np.full(50, 0.005), np.linspace(0.005, 1, 200))).row
    assert row["tpr_0.01"] == tpr_at(marked, unmarked, 0.01).tpr and row["tpr_0.001"] is None
    assert row["split_0.01_tpr"] == np.mean(marked >= row["split_0.01_threshold"])
    assert (row["p_0.01_tpr"], row["p_0.001_tpr"], row["p_0.01_fpr"]) == (1.0, 0.0, 0.005 * 2)
    assert row["megabytes"] is None
    assert cell(CLEAN, marked, unmarked[:196]).row["split_0.01_threshold"] is None
    assert cell(CLEAN, marked, unmarked[:98]).row["tpr_0.01"] is None


def test_the_interval_of_the_auc_is_the_one_that_holds_where_prompts_recur() -> None:
    rng = np.random.default_rng(0)
    marked, unmarked = (np.repeat(rng.normal(shift, 1, 20), 4) for shift in (1, 0))
    alone, unshared = cell(CLEAN, marked, unmarked), (np.arange(80) // 4, np.arange(80))
    row, together = alone.row, replace(alone, groups=unshared).row
    assert (row["auc_low"], row["auc_high"]) == (row["delong_low"], row["delong_high"])
    assert (together["auc_low"], together["auc_high"]) == (together["bootstrap_low"], together["bootstrap_high"])
    assert together["auc_high"] - together["auc_low"] > 1.2 * (row["auc_high"] - row["auc_low"])
    few = replace(alone, groups=(np.arange(80) // 5, np.arange(80)))  # 16 prompts are too few to resample
    assert few.row["auc_low"] is None and few.row["auc"] == row["auc"] and few.row["delong_low"] == row["delong_low"]
    figure = strength_figure([StrengthDisplay("blur", "", {"": [(1.0, few), (2.0, alone)]})])
    assert figure.axes and "AUC 0.7" in roc_figure([few.curve]).axes[0].get_legend().get_texts()[0].get_text()


def test_intervals_of_recurring_prompts_cover_the_truth() -> None:
    truth, covered = stats.norm.cdf(1.5 / 2**0.5), 0
    prompts = (np.arange(80) // 4, np.arange(80) // 4 + 20)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        drawn, own = np.repeat(rng.normal(0, 0.9**0.5, (2, 20)), 4, 1), rng.normal(0, 0.1**0.5, (2, 80))
        marked, unmarked = drawn + own
        low, high = cell(CLEAN, marked + 1.5, unmarked, groups=prompts).curve.auc_interval
        covered += low <= truth <= high
    assert covered >= stats.binom.ppf(0.001, 60, 0.92)  # DeLong's cover two thirds


def test_scores_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(EvaluationError) as error:
        _ = cell(CLEAN, [1, np.nan], [0, 1]).row
    assert error.value.code == "evaluation.scores"
