"""Counts of an audit do not depend on how its records are split, and discoveries are Benjamini and Hochberg's."""

from __future__ import annotations

import math
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, false_discovery_control

from ringmark.watermark.evaluation import tally as module
from ringmark.watermark.evaluation.tally import COLUMNS, Counts, PValues, Tally, folder_of

ALPHA = 1e-3
MONDAY = datetime(2026, 11, 23, tzinfo=timezone.utc)


def record(name: str, p: float | None = 0.5, **more: Any) -> dict[str, Any]:
    present = more.get("present", p is not None and p <= ALPHA)
    base = {"sample_id": name, "present": present, "key": "k1", "p_value": p, "log10_p": p and math.log10(p)}
    return dict.fromkeys(COLUMNS) | base | {"model": "pocket", "carries": ["k1"] if present else []} | more


def tally_of(records: list[dict[str, Any]], rows: int = 1000) -> Tally:
    tally = Tally(ALPHA)
    for first in range(0, len(records), rows):
        tally.add(pd.DataFrame(records[first : first + rows]))
    return tally


def values(p: np.ndarray, alpha: float = ALPHA) -> PValues:
    made = PValues(alpha)
    made.add(np.log10(p))
    return made


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 400), st.floats(0, 0.9), st.sampled_from([0.01, 0.05, 0.2, 0.5]))
def test_discoveries_are_those_of_benjamini_and_hochberg_within_a_bin(
    seed: int, n: int, marked: float, level: float
) -> None:
    rng = np.random.default_rng(seed)
    p = np.where(rng.random(n) < marked, 10 ** -rng.gamma(2, 3, n), rng.random(n))
    found = values(p).discoveries(level, n)
    exact = int((false_discovery_control(p) <= level).sum())
    assert found.number <= exact <= found.most
    assert found.number == (0 if found.threshold is None else (p <= found.threshold * (1 + 1e-12)).sum())


def test_in_a_large_audit_the_bins_cost_nothing_that_matters() -> None:
    rng = np.random.default_rng(1)
    p = np.concatenate([rng.random(99_000), 10 ** -rng.gamma(2, 2, 1000)])
    found = values(p).discoveries(0.05, len(p))
    exact = int((false_discovery_control(p) <= 0.05).sum())
    assert found.most - found.number <= 2 and found.number <= exact <= found.most and exact > 300


def test_inconclusive_and_unreadable_images_are_no_discoveries_and_only_the_first_count_as_tests() -> None:
    records = [record("a", 1e-9), record("b", 1e-9, present=None), record("c", None, error="is damaged", code="x.y")]
    found = tally_of(records).discoveries(0.05)
    assert (found.number, found.tests) == (1, 2)


def test_no_p_value_is_a_discovery_of_an_empty_audit() -> None:
    found = Tally(ALPHA).discoveries(0.05)
    assert (found.number, found.threshold, found.most) == (0, None, 0)


def test_shares_compare_p_above_alpha_with_the_uniform() -> None:
    p = np.array([1e-9, 1e-3, 0.002, 0.02, 0.03, 0.3, 0.9, 1.0])
    by_limit = {share.limit: share for share in values(p).shares()}
    assert [by_limit[limit].number for limit in (0.01, 0.05, 0.5)] == [1, 3, 4]
    half = by_limit[0.5]
    assert half.of == 6 and half.expected == pytest.approx(0.499 / 0.999)
    assert half.interval == pytest.approx(tuple(binomtest(4, 6).proportion_ci(method="exact")))
    assert values(p, alpha=0.6).shares() == [] and values(np.array([1e-9])).shares() == []


@pytest.fixture
def records() -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    made = []
    for i in range(700):
        name = f"{'abc'[i % 3]}/{i}.png" if i % 10 else f"{i}.png"
        stamp = int((MONDAY + timedelta(days=int(rng.integers(30)))).timestamp()) * 10**9
        more: dict[str, Any] = {"mtime_ns": stamp, "seconds": 0.5, "size": i}
        if i % 50 == 7:
            more |= {"present": None, "notes": ["contradiction"]}
        made.append(record(name, float(rng.random() ** 4), **more))
    return made + [record("c/x.png", None, error="c/x.png: is damaged", code="image.damaged", mtime_ns=None)]


@pytest.mark.parametrize("rows", [1, 64])
def test_the_split_into_tables_changes_nothing(records: list[dict[str, Any]], rows: int) -> None:
    whole, parts = tally_of(records), tally_of(records, rows)
    for name in ("outcomes", "keys", "seconds", "images", "judged"):
        assert getattr(whole, name) == getattr(parts, name)
    for name in ("folders", "models", "weeks", "codes", "inconclusive", "significant", "near"):
        assert str(getattr(whole, name).rows()) == str(getattr(parts, name).rows())
    assert (whole.tested.fine == parts.tested.fine).all() and str(whole.examples) == str(parts.examples)


def test_records_are_counted_by_folder_key_week_and_error(records: list[dict[str, Any]]) -> None:
    tally = tally_of(records)
    folders = {row["name"]: row for row in tally.folders.rows()}
    assert folders[""]["images"] == 70 and folders["c"]["unreadable"] == 1
    assert sum(row["present"] for row in folders.values()) == tally.outcomes["present"] == tally.keys["k1"] > 20
    weeks = [row["name"] for row in tally.weeks.rows() if row["name"]]
    assert sorted(weeks) == [str((MONDAY + timedelta(weeks=i)).date()) for i in range(5)]
    assert [(row["name"], row["images"]) for row in tally.codes.rows()] == [("image.damaged", 1)]
    assert [row.name for row in tally.examples["image.damaged"]] == ["c/x.png"]


@pytest.mark.parametrize(
    ("name", "folder"),
    [("a/b/c.png", "a"), ("c.png", ""), ("/data/a/c.png", "/data"), ("s3://bucket/a/b.png", "s3://bucket/a")]
    + [("https://host/c.png", "https://host"), ("", "")],
)
def test_folders_are_the_first_below_the_source(name: str, folder: str) -> None:
    assert folder_of(name) == folder


def test_lists_hold_the_most_telling_records(records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LISTED", 8)
    tally = tally_of(records, 50)
    judged = [r for r in records if r["present"] is not None and not r.get("error")]
    present = sorted((r for r in judged if r["present"]), key=lambda r: r["p_value"])
    near = sorted(judged, key=lambda r: abs(r["log10_p"] + 3))
    assert [row.name for row in tally.significant.rows()] == [r["sample_id"] for r in present[:8]]
    assert [row.name for row in tally.near.rows()] == [r["sample_id"] for r in near[:8]]
    assert [row.notes for row in tally.inconclusive.rows()] == [["contradiction"]] * 8


def test_names_beyond_the_limit_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NAMES", 3)
    counts = Counts()
    counts.add([str(i % 6) for i in range(60)], ["present", "absent"] * 30)
    rows = counts.rows()
    assert [(row["name"], row["images"]) for row in rows] == [("others", 30), ("0", 10), ("1", 10), ("2", 10)]
    assert counts.rows(2)[1] == {"name": "3 others", "images": 30, "present": 20, "absent": 10} | {
        "inconclusive": 0,
        "unreadable": 0,
    }


def test_values_of_wrong_types_count_as_missing() -> None:
    wrong = [5, "x", True, [1], {"a": 1}, 10**400, math.nan, None, -math.inf]
    names = [name for name in COLUMNS if name != "sample_id"]
    tally = tally_of([record(f"{i}", **{name: value for name in names}) for i, value in enumerate(wrong)])
    assert tally.images == 9
    assert all(isinstance(row.notes, list) for row in tally.inconclusive.rows())
    assert {row["name"] for row in tally.weeks.rows()} == {""}
