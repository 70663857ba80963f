"""Audits become curves: labels find their records, a record counts once, what shows nothing counts as unmarked."""

from __future__ import annotations

import json

import pytest

from ringmark.data.results import Results
from ringmark.errors import EvaluationError
from ringmark.watermark.tasks.roc import curves, roc_of_files


def record(name: str, marked: float, **more) -> dict:
    return {"sample_id": name, "log10_p": -marked, "published_distance": -marked} | more


def results(path, *records: dict, **settings):
    with Results(path, settings) as store:
        for one in records:
            store.append(one)
    return path


def labels(path, **named: int):
    path.parent.mkdir(exist_ok=True)
    path.write_text("path,label\n" + "".join(f"{name}.png,{label}\n" for name, label in named.items()))
    return path


def test_what_shows_nothing_is_the_least_marked_of_all():
    truth = {"m1": True, "m2": True, "u1": False, "u2": False}
    sure = [record("m1", 3.0), record("u1", 1.0), record("u2", 2.0)]
    for shows, auc in ((True, 1.0), (False, 0.5)):
        found = curves([*sure, record("m2", 9.0, shows=shows)], truth, name="")
        assert [curve.auc for curve in found.values()] == [auc, auc]
    # Below all others at any threshold, but as marked as another image that shows nothing.
    blank = [record("m1", 3.0), record("m2", 9.0, shows=False), record("u1", 1.0), record("u2", 8.0, shows=False)]
    assert [curve.auc for curve in curves(blank, truth, name="").values()] == [(2 + 0.5) / 4] * 2


@pytest.mark.parametrize("log10_p", [None, float("nan"), float("inf"), "7", [1.0], True])
def test_a_p_that_is_no_number_is_named(log10_p):
    truth = {"m\n": True, "u": False}
    with pytest.raises(EvaluationError, match=r"m\\n.*log10_p") as error:
        curves([record("m\n", 1.0) | {"log10_p": log10_p}, record("u", 0.0)], truth, name="")
    assert error.value.code == "evaluation.number"
    with pytest.raises(EvaluationError, match="null") as error:
        curves([{"sample_id": "u"}, record("m\n", 1.0)], truth, name="")
    assert error.value.code == "evaluation.number"
    nothing = record("m\n", 1.0, shows=False) | {"log10_p": log10_p}
    assert curves([nothing, record("u", 0.0)], truth, name="")["log10_p"].auc == 0


def test_images_rank_by_p_whatever_test_it_is_of():
    """The score of a mark that the search found is a cosine, and those of other images are not."""
    found = [record(f"m{i}", 9.0, score=0.4, by_search=True) for i in range(4)]
    unmarked = [record(f"u{i}", i / 50, score=i / 50) for i in range(99)]
    curve = curves([*found, *unmarked], {r["sample_id"]: "by_search" in r for r in [*found, *unmarked]})["log10_p"]
    assert curve.auc == 1 and curve.point.tpr == 1


def test_images_whose_corrected_p_is_1_are_tied():
    p = {"m1": -3.0, "m2": 0.0, "u1": 0.0, "u2": 0.0, "u3": -1.0}
    some = [{"sample_id": name, "log10_p": log10_p, "score": i} for i, (name, log10_p) in enumerate(p.items())]
    curve = curves(some, {name: name[0] == "m" for name in p})["log10_p"]
    assert curve.auc == (3 + 2 / 2) / 6 and curve.fpr.tolist() == pytest.approx([0, 0, 1 / 3, 1])


def test_audits_of_other_settings_are_not_taken_together(tmp_path):
    one = results(tmp_path / "one.jsonl", record("a.png", 1.0), steps=25, folder="a", keys=["0"])
    other = results(tmp_path / "other.jsonl", record("b.png", 0.0), steps=10, folder="b", keys=["1"])
    with pytest.raises(EvaluationError, match=r"other\.jsonl.*one\.jsonl.*steps was 25, is 10") as error:
        roc_of_files([one, other], [labels(tmp_path / "labels.csv", a=1, b=0)])
    assert error.value.code == "evaluation.settings" and "keys was" in str(error.value)
    same = results(tmp_path / "same.jsonl", record("b.png", 0.0), steps=25, folder="b", keys=["0"])
    assert len(roc_of_files([one, same], [labels(tmp_path / "labels.csv", a=1, b=0)]).curves) == 2


def test_a_file_that_was_not_read_is_in_no_curve():
    some = [record("m", 1.0), record("u", 0.0), {"sample_id": "broken", "error": "no image"}]
    score = curves(some, {"m": True, "u": False, "broken": True}, name="audit")["log10_p"]
    assert (score.positives, score.negatives, score.name) == (1, 1, "audit log10_p")


def test_audits_are_taken_together_but_no_record_twice(tmp_path):
    one = results(tmp_path / "one.jsonl", record("a.png", 1.0), record("b.png", 0.0))
    other = results(tmp_path / "other.jsonl", record("c.png", 2.0))
    truth = labels(tmp_path / "labels.csv", a=1, b=0, c=1, d=1)
    report = roc_of_files([one, other, one], [truth])
    assert (report.curves["log10_p"].positives, report.curves["log10_p"].negatives) == (2, 1)
    assert report.coverage()[0] == "3 of 3 records labelled"
    again = results(tmp_path / "again.jsonl", record("a.png", 1.0))
    with pytest.raises(EvaluationError, match=r"again\.jsonl.*a\.png.*one\.jsonl") as error:
        roc_of_files([one, again], [truth])
    assert error.value.code == "evaluation.twice"


def test_what_is_left_out_is_named(tmp_path):
    broken = {"sample_id": "broken.png", "error": "no image"}
    more = [record(f"{i}.png", 0.0) for i in range(25)]
    audit = results(tmp_path / "audit.jsonl", record("a.png", 1.0), record("b.png", 0.0), broken, *more)
    report = roc_of_files([audit], [labels(tmp_path / "labels.csv", a=1, b=0, broken=1, lost=0)])
    assert (report.unread, report.unmatched) == (["broken.png"], ["lost.png"])
    assert report.unlabelled == [f"{i}.png" for i in range(25)]
    _, unlabelled, unread, unmatched = report.coverage()
    assert "0.png, 1.png" in unlabelled and unlabelled.endswith("19.png and 5 more")
    assert "broken.png" in unread and "lost.png" in unmatched


def test_a_scheme_without_a_published_distance_has_one_curve(tmp_path):
    plain = [{"sample_id": f"{name}.png", "log10_p": log10_p} for name, log10_p in (("a", -1.0), ("b", 0.0))]
    report = roc_of_files([results(tmp_path / "audit.jsonl", *plain)], [labels(tmp_path / "labels.csv", a=1, b=0)])
    assert list(report.curves) == ["log10_p"] and len(report.record()) == 1 and "published" not in report.table()


def test_a_statistic_that_only_some_records_have_has_no_curve():
    """The best keys of an audit may be of several schemes."""
    some = [record("m", 1.0), {"sample_id": "u", "log10_p": 0.0}]
    assert list(curves(some, {"m": True, "u": False})) == ["log10_p"]


def audit_of(tmp_path, unmarked: int):
    records = [record(f"m{i}.png", 500.0 + i) for i in range(3)] + [record(f"u{i}.png", i) for i in range(unmarked)]
    truth = labels(tmp_path / "labels.csv", **{r["sample_id"][:-4]: int(r["sample_id"][0] == "m") for r in records})
    return roc_of_files([results(tmp_path / "audit.jsonl", *records)], [truth])


@pytest.mark.parametrize("unmarked", [2, 24, 98])
def test_a_rate_that_nobody_can_know_is_left_out(tmp_path, unmarked):
    report = audit_of(tmp_path, unmarked)
    assert f"needs at least 99 unmarked images, not {unmarked}" in report.table()
    row = report.table().splitlines()[2]
    assert "1.000 [" in row and row.count("[") == 1  # the AUC alone
    one = report.record()[0]
    assert (one["tpr_at"], one["threshold"], one["fpr_at"], one["unmarked_needed"]) == (None, None, None, 99)


def test_the_threshold_at_the_asked_rate_and_the_points_of_the_curve(tmp_path):
    report = audit_of(tmp_path, 100)
    p, distance = json.loads(json.dumps(report.record(), allow_nan=False))
    assert not p["larger_if_marked"] and not distance["larger_if_marked"]
    # Of the unmarked log10_p 0 … -99 one may be reached.
    assert p["threshold"] == pytest.approx(-98) == distance["threshold"]
    assert (p["tpr_at"], p["fpr_at"]) == (1, 0.01) and p["fpr_at_interval"][1] == pytest.approx(0.0545, abs=1e-4)
    points = p["points"]
    assert points["threshold"][:4] == [None, -502, -501, -500] and len(points["fpr"]) == 104
    assert points["tpr"][:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert "needs at least" not in report.table() and report.table().count("≤ -98") == 2


def test_parquet_results_give_the_same_curves(tmp_path):
    pytest.importorskip("pyarrow")
    given = [record(f"{i}.png", float(i % 7), shows=i != 3) for i in range(20)] + [{"sample_id": "x", "error": "no"}]
    truth = labels(tmp_path / "pictures" / "labels.csv", **{str(i): i % 2 for i in range(20)})
    lines, parts = results(tmp_path / "r.jsonl", *given), results(tmp_path / "r.parquet", *given)
    one, other = roc_of_files([lines], [truth]), roc_of_files([parts], [truth])
    assert one.record() == other.record() and set(one.curves) == {"log10_p", "published_distance"}
