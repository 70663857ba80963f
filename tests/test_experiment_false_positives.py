"""Rates, intervals and halves worked by hand; the small setting, end to end."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ringmark.inversion.decoder import Inverter
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.embed import initial_noise
from scripts.experiments import false_positives as script

SHAPE = (4, 32, 32)


@pytest.fixture
def keys(bench):
    return script.families(bench(), 2)


@pytest.fixture
def settings(pocket):
    return Recoverer(pocket, steps=2).settings


def calibration_of(noise, settings) -> Calibration:
    return Calibration.measure(noise, settings.as_dict(), {"given": len(noise)})


def test_the_families_are_those_the_text_names(keys):
    about = {name: [key.metadata for key in some] for name, some in keys.items()}
    assert all({m["pattern"] for m in about[name]} == {name} for name in ("rand", "ring", "zeros"))
    assert all((m["mask"], m["radii"], len(m["channels"])) == ("published", [1, 5], 1) for m in about["published"])
    assert [len({key.fingerprint for key in some}) for some in keys.values()] == [2, 2, 2, 1]


def test_the_threshold_grows_with_the_side(keys, settings):
    """77 for latents of 64x64 is 38.5 for these, of 32x32, near the distance of white noise, 32 √(π/2) = 40."""
    noise = initial_noise(list(range(60)), SHAPE)
    calibration = calibration_of(noise, settings)
    assert (script.tested(calibration, keys["rand"][0], 2 * noise[:5])["threshold 77"] == 1).all()
    nothing_but_the_key = script.tested(calibration, keys["rand"][0], 0.1 * noise[:5])
    assert (nothing_but_the_key["threshold 77"] == 0).all()


def test_every_image_is_tested_on_the_null_of_the_other_half(keys, settings):
    noise, key = initial_noise(list(range(100)), SHAPE), keys["rand"][0]
    (found,) = script.by_halves(settings, noise, [key], noise)
    expected = script.tested(calibration_of(noise[1::2], settings), key, noise[::2])
    for name in script.TESTS:
        assert np.array_equal(found[name][::2], expected[name])
    turned = script.by_halves(settings, noise, [key], noise.flip(-1))[0]
    assert not np.array_equal(found["verdict"], turned["verdict"])


def test_rates_by_hand():
    p = np.array([0.0005, 0.004, 0.03, 0.5, 0.9])
    found = [{name: p for name in script.TESTS}, {name: np.ones(5) for name in script.TESTS}]
    rows = script.rows_of({}, found)
    assert [rows[0][f"{level:g}"] for level in script.LEVELS] == [0.6, 0.4, 0.2]
    row = next(r for r in script.pooled({}, found, 0) if r["test"] == "verdict")
    assert row["0.05"] == pytest.approx(0.3) and row["0.05 worst"] == 0.6
    assert row["0.05 held"] == sum(r["0.05 low"] <= 0.05 <= r["0.05 high"] for r in rows if r["test"] == "verdict") == 1
    assert row["KS p least"] < 1e-3  # that of the ones
    assert row["0.05 low"] < 0.3 < row["0.05 high"]
    low, high = script.bootstrap(np.zeros(200), 0)
    assert low == 0 and high == pytest.approx(0.0183, abs=1e-4)


@pytest.mark.slow
def test_end_to_end_with_halves_and_an_attack(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "Recoverer", partial(Recoverer, inverter=Inverter.named("encoder")))  # the quick one
    rng, folder = np.random.default_rng(0), tmp_path / "photographs"
    folder.mkdir()
    for i in range(38):
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    options = ("--keys", 2, "--steps", 1, "--halves", "--attack", "flip")
    stored = experiment("false_positives", tmp_path / "out", folder, *options)
    assert len(stored["rows"]) == 2 * 4 * 4 and len(stored["keys"]) == 2 * 4 * (3 * 2 + 1)
    assert stored["n"] == 38 and str(tmp_path) not in json.dumps(stored)


def test_halves_make_their_own_calibration(tmp_path):
    options = [str(tmp_path), "-o", str(tmp_path), "--halves", "--calibration", "my.cal"]
    given = CliRunner().invoke(script.main, options)
    assert given.exit_code == 2 and "omit it or" in given.output


def test_a_true_p_value_is_found_true_and_a_false_one_not(keys, settings):
    noise = initial_noise(list(range(400)), SHAPE)
    colour = torch.linspace(0.5, 1.5, 400)[:, None, None, None]  # images of different scales: the cosine forgives them
    found = script.by_halves(settings, noise * colour, keys["rand"], noise * colour)
    rows = {row["test"]: row for row in script.pooled({}, found, 0)}
    assert rows["verdict"]["KS p least"] > 0.01 and rows["verdict"]["0.05 held"] == 2
    assert rows["threshold 77"]["0.05 held"] == 0
