"""The numbers of a cell: rates are there where there are enough unmarked images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ringmark.errors import EvaluationError
from ringmark.watermark.evaluation.cells import CLEAN, Cell
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


def test_scores_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(EvaluationError) as error:
        _ = cell(CLEAN, [1, np.nan], [0, 1]).row
    assert error.value.code == "evaluation.scores"
