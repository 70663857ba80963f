"""Rates by hand; an evaluation of random pictures, end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ringmark.errors import RingmarkError
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.schemes.tree_ring import make_key, recommend


@pytest.fixture(scope="module")
def script(scripts):
    return scripts("study_power")


@pytest.fixture(scope="module")
def model():
    return LatentModel.from_pretrained("pocket")


def key_of(model, pattern: str = "rand"):
    place = recommend(model.recovery, model.latent_shape)
    return make_key(model.latent_shape, place, model=model.identity, pattern=pattern, rng=np.random.default_rng(0))


def test_rates_means_and_what_beats_the_default(script):
    marked = {"own": np.r_[np.zeros(6), np.full(4, 9.0)], "other": np.full(10, 9.0)}
    unmarked = dict.fromkeys(marked, np.arange(1000) / 1000)
    strangers = dict.fromkeys(marked, np.r_[np.zeros(3), 9.0])
    rows = [row for a in ("clean", "blur:4") for row in script.rows_of({"attack": a}, marked, strangers, unmarked)]
    assert {row["0.01 accused"] for row in rows} == {0.25}
    assert [(r["statistic"], r["0.01"], r["0.001"]) for r in rows[:2]] == [("own", 0.4, 0.4), ("other", 1.0, 1.0)]
    assert rows[0]["0.01 low"] == pytest.approx(0.1216, abs=1e-4)  # Clopper and Pearson of 4 of 10
    assert [r["0.01"] for r in script.means(rows)] == [0.4, 1.0]
    assert script.beaten(rows, "own") == [f"{a} at {f}: other" for a in ("clean", "blur:4") for f in ("0.01", "0.001")]
    assert script.beaten(rows, "other") == []
    ranks = {script.CONFORMAL: np.r_[np.full(3, -0.001), np.full(7, -0.002)]}
    (row,) = script.rows_of(
        {}, ranks, ranks, {script.CONFORMAL: np.full(5, -0.001)}
    )  # ties that no threshold would cut
    assert (row["0.001"], row["0.01"]) == (0.3, 1.0)


def test_other_keys_are_alike_and_different(script, model):
    key = key_of(model)
    others = script.alike(model, key, 3, 1)
    for name in ("pattern", "mask", "channels", "radii"):
        assert {str(k.metadata[name]) for k in others} == {str(key.metadata[name])}
    assert len({k.fingerprint for k in (key, *others)}) == 4
    with pytest.raises(RingmarkError, match="only one such key"):
        script.alike(model, key_of(model, "zeros"), 1, 0)


def test_end_to_end(script, model, tmp_path):
    key, rng = key_of(model), np.random.default_rng(1)
    key.save(tmp_path / "my.key")
    for kind in (key.fingerprint[:8], "unmarked"):
        for folder in (tmp_path / "ev" / "images" / kind, tmp_path / "ev" / "attacked" / "flip" / kind):
            folder.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(rng.integers(0, 255, (128, 128, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    run = [str(tmp_path / "ev"), "--key", str(tmp_path / "my.key"), "-o", str(tmp_path / "out"), "--attacks", "flip"]
    result = CliRunner().invoke(script.main, [*run, "--steps", "1", "--others", "2"])
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / "out" / "study_power.json").read_text())
    assert {row["attack"] for row in stored["rows"]} == {"clean", "flip"}
    assert {row["unmarked scores"] for row in stored["rows"]} == {9} and {row["marked"] for row in stored["rows"]} == {
        3
    }
    more = tmp_path / "ev" / "images" / "unmarked" / "3.png"
    Image.new("RGB", (128, 128)).save(more)  # flat: nothing can be said of it, so it is the least marked
    result = CliRunner().invoke(script.main, [*run, "--steps", "1", "--others", "2"])
    stored = json.loads((tmp_path / "out" / "study_power.json").read_text())
    assert {row["unmarked scores"] for row in stored["rows"] if row["attack"] == "clean"} == {12}
    more.write_text("no image")
    result = CliRunner().invoke(script.main, [*run, "--steps", "1"])
    assert result.exit_code == 2 and "1 images cannot be used" in result.output
    more.unlink()
    result = CliRunner().invoke(script.main, [*run[:-1], "blur:4", "--steps", "1"])
    assert result.exit_code == 2 and "blur-4" in result.output
