"""`ringmark roc` and `ringmark evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shell import QUICK, refused, run

from ringmark.watermark.tasks import quality


def test_roc_from_an_audit(house: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    run("audit", house / "images", "--key", house / "my.key", "-o", results, *QUICK)
    labels = [x for kind in ("marked", "unmarked") for x in ("--labels", house / "images" / kind / "labels.csv")]
    said = run("roc", results, results, *labels, "-o", tmp_path / "roc.png", "--json")
    curves = json.loads(said.stdout)
    assert said.stderr == f"4 of 4 records labelled\ncurves drawn into {tmp_path / 'roc.png'}\n"
    assert curves[0]["tpr_at"] is None and curves[0]["unmarked_needed"] == 99
    assert curves[0]["points"]["tpr"][-1] == 1 and curves[0]["points"]["threshold"][0] is None
    (tmp_path / "copy.jsonl").write_bytes(results.read_bytes())
    message = refused("roc", results, tmp_path / "copy.jsonl", *labels)
    assert all(part in message for part in ("copy.jsonl", "results.jsonl", "marked/0000000.png"))
    assert curves[0]["auc"] == 1.0 and (curves[0]["positives"], curves[0]["negatives"]) == (2, 2)
    assert (tmp_path / "roc.png").stat().st_size > 10_000
    assert "marked and unmarked" in refused("roc", results, *labels[:2])
    (tmp_path / "labels.csv").write_text("path,label\nelsewhere.png,1\n")
    (tmp_path / "more.csv").write_text("path,label\nelsewhere.png,1\nmarked/0000000.png,1\nunmarked/0000002.png,0\n")
    partly = run("roc", results, "--labels", tmp_path / "more.csv")
    assert "2 of 4 records labelled" in partly.stdout and "at least 99 unmarked images, not 1" in partly.stdout
    assert "2 without a label: marked/0000001.png, unmarked/0000003.png" in partly.stderr
    assert "1 labelled but without a record: elsewhere.png" in partly.stderr
    assert "no label matches" in refused("roc", results, "--labels", tmp_path / "labels.csv")
    assert "Missing option '--labels'" in run("roc", results, code=2).stderr


@pytest.mark.slow
def test_evaluate_compares_methods_and_attacks(tmp_path: Path, monkeypatch) -> None:
    train = quality.train_classifiers
    monkeypatch.setattr(quality, "train_classifiers", lambda *_: train(20, 5, quality.SCENE_SIZE))
    args = ["evaluate", "-o", tmp_path / "out", "-n", 2, *QUICK]
    found = json.loads(run(*args, "--json").stdout)
    assert {(row["method"], row["attack"]) for row in found["rows"]} == {("encoder", "clean"), ("operator", "clean")}
    for name in ("evaluation.csv", "evaluation.json", "evaluation.md", "scores.csv", "roc-clean.png", "roc-clean.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    more = run(*args, "--methods", "encoder", "--methods", " forward", "--attacks", "flip, blur:1").stdout
    rows = [[cell.strip() for cell in line.split("|")] for line in more.splitlines()]
    pairs = {(row[3], row[4]) for row in rows if len(row) > 4}
    assert {(a, m) for a in ("clean", "flip", "blur:1") for m in ("encoder", "forward")} <= pairs
    assert len((tmp_path / "out" / "gains.csv").read_text().splitlines()) == 1 + 6
    assert more.endswith(f"0 files refused; tables and plots in {tmp_path / 'out'}\n")
    message = refused(*args, "-n", 3)
    assert str(tmp_path / "out") in message and "number was 2, is 3" in message
    own = ["--key", tmp_path / "out/evaluation.key"]
    unmarked = tmp_path / "out/images/unmarked"
    assert "unmarked was null, is images/unmarked" in refused(*args, *own, "--unmarked", unmarked)
    assert "unknown decoder inversion" in refused(*args, "--methods", "magic")
    assert "--key" in refused(*args, "--marked", unmarked)
    assert "2 of 2 images as unmarked" in refused(*args[:2], tmp_path / "o", *own, "--marked", unmarked)
