"""Evaluations as tables and plots."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from test_cells import cell

from ringmark.data.files import is_ours
from ringmark.watermark.evaluation.cells import CLEAN, Evaluation
from ringmark.watermark.evaluation.gain import compare_ways
from ringmark.watermark.evaluation.plots import write_plots
from ringmark.watermark.evaluation.report import gain_table, pivot, summary, write_tables
from ringmark.watermark.evaluation.tables import interval_text, markdown, write_table


def test_the_pivot_has_the_mean_over_attacks():
    cells = [cell(CLEAN, [3, 4], [1, 2]), cell("flip", [1, 4], [2, 3]), cell("blur:1", [2, 4], [1, 3])]
    head, _, row = ([c.strip() for c in line.strip("|").split("|")] for line in pivot(cells, "auc").splitlines())
    assert head == ["key", "scheme", "statistic", "method", "clean", "flip", "blur:1", "mean"]
    assert [text.split()[0] for text in row[4:]] == ["1.000", "0.500", "0.750", "0.625"]
    assert pivot(cells, "tpr_0.01").splitlines()[-1].count("[") == 0
    assert "mean" not in pivot(cells[:1], "auc")


def test_a_pivot_keeps_keys_and_attacks_in_order_and_gaps_empty() -> None:
    cells = [
        cell("flip", [3, 4], [1, 2], key="bb"),
        cell("blur:1", [3, 4], [1, 2], key="bb"),
        cell("blur:1", [3, 4], [1, 2], key="aa"),
    ]
    head, _, *rows = ([c.strip() for c in line.strip("|").split("|")] for line in pivot(cells, "auc").splitlines())
    assert head[4:] == ["flip", "blur:1", "mean"] and [row[0] for row in rows] == ["bb", "aa"]
    assert rows[1][4] == "" and rows[1][-1] == "1.000"


def test_names_that_look_like_numbers_stay_as_they_are() -> None:
    text = markdown([{"key": "1e345678", "AUC": None}, {"key": "00000012", "AUC": float("nan")}])
    assert "1e345678" in text and "00000012" in text and "nan" not in text.lower() and "None" not in text


def test_an_interval_that_is_not_known_is_left_out() -> None:
    row = {"a": 0.5, "a_low": 0.25, "a_high": 0.75, "b": 0.5, "b_low": None, "b_high": None, "c": None}
    assert [interval_text(row, name) for name in "abc"] == ["0.500 [0.250, 0.750]", "0.500", ""]


def test_a_csv_file_holds_what_it_was_given(tmp_path) -> None:
    rows = [
        {"image": "a,b.png", "n": 3, "x": 0.1 + 0.2, "y": None},
        {"image": "\udcff.png", "n": 4, "x": float("nan"), "y": 1e-300},
    ]
    write_table(tmp_path / "table.csv", rows)
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {"image": "a,b.png", "n": "3", "x": "0.30000000000000004", "y": ""}
    assert second == {"image": "\\udcff.png", "n": "4", "x": "", "y": "1e-300"}


SETTINGS = {
    "model": {"name": "tiny"},
    "steps": 2,
    "inversion_steps": 3,
    "guidance": 1.0,
    "seed": 0,
    "marked": None,
    "unmarked": None,
    "images": "drawn",
    "calibrations": {"encoder": None, "operator": "abcd"},
    "calibration_unfit": {"encoder": "made with other steps"},
}


def records(method: str, better: float) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "key": "abcd",
            "attack": attack,
            "method": method,
            "image": f"{'abcd' if label else 'unmarked'}/{i}.png",
            "label": label,
            "prompt": f"prompt {i}",
            "score": rng.normal() + better * label,
            "published_distance": -rng.normal() - label,
        }
        for attack in ("flip", "blur:1")
        for label in (1, 0)
        for i in range(30)
    ]


def evaluation() -> Evaluation:
    rng = np.random.default_rng(0)
    p = (np.full(30, 0.001), np.linspace(0.01, 1, 30))
    cells = [
        cell(attack, rng.normal(1, 1, 30), rng.normal(0, 1, 30), method=method, **default)
        for attack in ("flip", "blur:1", "blur:3")
        for method in ("encoder", "operator")
        for default in ({"statistic": "whitened cosine", "p": p, "published": None}, {})
    ]
    images = records("encoder", 0.5) + records("operator", 2.0)
    gains = compare_ways(images, ["flip", "blur:1"], draws=100)
    return Evaluation(
        settings=SETTINGS, cells=cells, images=images, quality=[], refused=["x.png: no image"], gains=gains
    )


def test_gains_are_in_every_table(tmp_path) -> None:
    made = evaluation()
    write_tables(made, tmp_path)
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record == json.loads(json.dumps(made.record())) and len(record["gains"]) == 4 * 3 // 2
    with (tmp_path / "gains.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (
        rows[1]["of_method"] == "operator" and rows[1]["over_column"] == "score" and rows[1]["attacks"] == "flip blur:1"
    )
    assert float(rows[1]["gain"]) == made.gains[1].gain > float(rows[1]["low"]) > 0
    report = (tmp_path / "evaluation.md").read_text()
    assert "## Gain in mean AUC" in report and gain_table(made.gains) in report
    assert len(gain_table(made.gains).splitlines()) == 2 + 3  # each way over the first
    assert "at least 99 are needed" in report and "encoder: made with other steps" in report
    assert len(summary(made).splitlines()) == 2 + 3 * 2 and "AUC, published distance" in summary(made)
    assert "published" not in summary(replace(made, cells=[c for c in made.cells if c.is_default]))


@pytest.mark.slow
def test_a_report_names_the_drawing_where_images_were_drawn(tmp_path) -> None:
    write_tables(evaluation(), tmp_path / "drawn")
    given = replace(evaluation(), settings=SETTINGS | {"marked": "marked", "unmarked": "unmarked"})
    write_tables(given, tmp_path / "given")
    named = [("guidance 1, seed 0" in (tmp_path / name / "evaluation.md").read_text()) for name in ("drawn", "given")]
    assert named == [True, False]


def test_files_say_whose_they_are(tmp_path) -> None:
    write_tables(evaluation(), tmp_path)
    write_plots(evaluation(), tmp_path)
    plots = {p.name for p in tmp_path.iterdir() if p.suffix in (".png", ".svg")}
    of_attack = {f"{kind}-{slug}.png" for kind in ("roc", "histograms") for slug in ("flip", "blur-1", "blur-3")}
    assert plots == of_attack | {f"roc-{slug}.svg" for slug in ("flip", "blur-1", "blur-3")} | {"strengths.png"}
    for name in (*plots, "evaluation.json", "evaluation.md"):
        assert is_ours(tmp_path / name), name
    with Image.open(tmp_path / "roc-flip.png") as image:
        assert image.info["Software"] == "ringmark"
