"""AUC and the paired bootstrap against what can be worked out; a table by hand, end to end."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner

from ringmark.watermark.evaluation.rates import roc
from scripts.experiments import study_gain as script


def scores(shift: float, seed: int = 0, n: int = 60, prompts: int = 60):
    rng = np.random.default_rng(seed)
    named = [str(i % prompts) for i in range(n)]
    return script.Scores(rng.normal(shift, size=(2, n)), rng.normal(size=(2, n)), (named, named))


def test_the_auc_is_that_of_the_roc():
    rng = np.random.default_rng(0)
    marked, unmarked = rng.integers(0, 9, 40), rng.integers(0, 7, 30)  # with ties
    assert script.auc(marked, unmarked) == pytest.approx(roc(marked, unmarked).auc)


def test_a_pair_has_a_narrower_interval_than_strangers():
    one = scores(1.0)
    better = one._replace(marked=one.marked + 0.2)
    paired, strange = script.gain(better, one, 300, 0), script.gain(scores(1.2, 1), one, 300, 0)
    width = lambda found: found["high"] - found["low"]
    assert 0 < paired["low"] < paired["gain"] < paired["high"] and width(paired) < width(strange) / 3
    assert script.gain(one, one, 50, 0) == pytest.approx(
        script.gain(one, one, 50, 0) | {"gain": 0, "low": 0, "high": 0}
    )


def test_images_of_one_prompt_are_drawn_together():
    drawn = script.resampled(["a", "b", "a", "c"], np.random.default_rng(3))
    counts = np.bincount(drawn, minlength=4)
    assert counts[0] == counts[2] and counts[0] + counts[1] + counts[3] == 3
    few, many = (script.gain(scores(1, prompts=p), scores(0.5, 1, prompts=p), 300, 0) for p in (6, 60))
    assert few["gain"] == many["gain"] and few["high"] - few["low"] != many["high"] - many["low"]


def test_end_to_end(tmp_path):
    with (tmp_path / "scores.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["key", "attack", "method", "image", "label", "prompt", "score", "published_distance"])
        for key, attack, i in ((k, a, i) for k in ("aa11", "bb22") for a in ("clean", "flip") for i in range(8)):
            score = "" if key == "bb22" and i == 0 else i // 4 if key == "aa11" else i % 2
            table.writerow([key, attack, "encoder", f"{i}.png", i // 4, f"prompt {i}", score, 1 - i // 4])
    run = lambda *options: CliRunner().invoke(script.main, [str(tmp_path), *options, "--draws", "20"])
    found = json.loads(run("--of", "aa11,encoder,published_distance", "--over", "bb22,encoder,score").output)
    assert (found["of"], found["over"], found["attacks"], found["marked"]) == (1, 0.5 + 1 / 16, ["flip"], 4)
    for wrong, said in (
        ("aa11,encoder", "KEY,METHOD,COLUMN"),
        ("cc,encoder,score", "not one way of this"),
        (",encoder,score", "not one way of this"),  # but two
    ):
        result = run("--of", wrong, "--over", "bb22,encoder,score")
        assert result.exit_code == 2 and said in result.output
    whole = (tmp_path / "scores.csv").read_text().splitlines(keepends=True)
    more = ["aa11,blur:4,encoder,0.png,1,prompt 0,1,0\n", "aa11,blur:4,encoder,4.png,0,prompt 4,0,1\n"]
    (tmp_path / "scores.csv").write_text("".join(whole + more))
    assert "missing under some attack" in run("--of", "aa,encoder,score", "--over", "bb,encoder,score").output
    (tmp_path / "scores.csv").write_text("".join(line for line in whole if ",flip," not in line))
    assert "without attacks" in run("--of", "aa,encoder,score", "--over", "bb,encoder,score").output
