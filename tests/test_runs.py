"""Audits become curves: labels find their records, a record counts once, what shows nothing counts as unmarked."""

from __future__ import annotations

import pytest

from ringmark.data.results import Results
from ringmark.errors import EvaluationError
from ringmark.watermark.tasks.audit import curves, curves_of_files


def record(name: str, score: float, **more) -> dict:
    return {"sample_id": name, "score": score, "published_distance": -score} | more


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
        assert [curve.auc for curve in found] == [auc, auc]
    # Below all others at any threshold, but as marked as another image that shows nothing.
    blank = [record("m1", 3.0), record("m2", 9.0, shows=False), record("u1", 1.0), record("u2", 8.0, shows=False)]
    assert [curve.auc for curve in curves(blank, truth, name="")] == [(2 + 0.5) / 4] * 2


@pytest.mark.parametrize("score", [None, float("nan"), float("inf"), "7", [1.0], True])
def test_a_score_that_is_no_number_is_named(score):
    truth = {"m\n": True, "u": False}
    with pytest.raises(EvaluationError, match=r"record of m\\n: its score is .*, not a number; audit"):
        curves([record("m\n", 1.0) | {"score": score}, record("u", 0.0)], truth, name="")
    with pytest.raises(EvaluationError, match="its score is null"):
        curves([{"sample_id": "u"}, record("m\n", 1.0)], truth, name="")
    nothing = record("m\n", 1.0, shows=False) | {"score": score}
    assert curves([nothing, record("u", 0.0)], truth, name="", statistics=("score",))[0].auc == 0


def test_audits_of_other_settings_are_not_taken_together(tmp_path):
    one = results(tmp_path / "one.jsonl", record("a.png", 1.0), steps=25, folder="a", keys=["0"])
    other = results(tmp_path / "other.jsonl", record("b.png", 0.0), steps=10, folder="b", keys=["1"])
    with pytest.raises(EvaluationError, match=r"other.jsonl: .* than .*one.jsonl \(keys, steps\)"):
        curves_of_files([one, other], [labels(tmp_path / "labels.csv", a=1, b=0)], 0.01)
    same = results(tmp_path / "same.jsonl", record("b.png", 0.0), steps=25, folder="b", keys=["0"])
    assert len(curves_of_files([one, same], [labels(tmp_path / "labels.csv", a=1, b=0)], 0.01)[0]) == 2


def test_a_file_that_was_not_read_is_in_no_curve():
    some = [record("m", 1.0), record("u", 0.0), {"sample_id": "broken", "error": "no image"}]
    (score, _) = curves(some, {"m": True, "u": False, "broken": True}, name="audit")
    assert (score.positives, score.negatives, score.name) == (1, 1, "audit score")


def test_audits_are_taken_together_but_no_record_twice(tmp_path):
    one = results(tmp_path / "one.jsonl", record("a.png", 1.0), record("b.png", 0.0))
    other = results(tmp_path / "other.jsonl", record("c.png", 2.0))
    truth = labels(tmp_path / "labels.csv", a=1, b=0, c=1, d=1)
    (score, _), said = curves_of_files([one, other, one], [truth], 0.01)
    assert (score.positives, score.negatives) == (2, 1)
    assert said == "3 of 3 records labelled; 1 labels fit no record (d.png)"
    again = results(tmp_path / "again.jsonl", record("a.png", 1.0))
    with pytest.raises(EvaluationError, match=r"again.jsonl: has a record of a.png, and so has .*one.jsonl"):
        curves_of_files([one, again], [truth], 0.01)
