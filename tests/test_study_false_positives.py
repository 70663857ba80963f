"""Rates, intervals and halves worked by hand; the small setting, end to end."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from identity import MODEL

from ringmark.inversion.decoder import Inverter
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.detector import Detector
from ringmark.watermark.embed import initial_noise


@pytest.fixture(scope="module")
def script(scripts):
    return scripts("study_false_positives")


@pytest.fixture(scope="module")
def keys(script):
    return script.families(MODEL, 2, 0)


def test_the_families_are_those_the_text_names(keys):
    about = {name: [key.metadata for key in some] for name, some in keys.items()}
    assert all({m["pattern"] for m in about[name]} == {name} for name in ("rand", "ring", "zeros"))
    assert all((m["mask"], m["radii"], len(m["channels"])) == ("published", [1, 5], 1) for m in about["published"])
    assert [len({key.fingerprint for key in some}) for some in keys.values()] == [2, 2, 2, 1]


def test_the_threshold_grows_with_the_side(script, keys):
    """77 for latents of 64x64 is 38.5 for these, of 32x32: no distance of white noise, about 32 √(π/2) = 40, is far off."""
    noise = initial_noise(list(range(60)), MODEL.latent_shape)
    plain = Detector(MODEL, [], steps=2)
    looking = plain.with_calibration(Calibration.measure(noise, plain.settings(), {"drawn": 60}))
    found = script.tested(looking, keys["rand"][0], 2 * noise[:5])
    assert (found["threshold 77"] == 1).all()
    assert (script.tested(looking, keys["rand"][0], 0.1 * noise[:5])["threshold 77"] == 0).all()  # nothing but the key


def test_every_image_is_tested_on_the_null_of_the_other_half(script, keys):
    noise = initial_noise(list(range(100)), MODEL.latent_shape)
    plain, key = Detector(MODEL, [], steps=2), keys["rand"][0]
    (found,) = script.by_halves(plain, noise, [key], noise)
    odd = Calibration.measure(noise[1::2], plain.settings(), {"given": 50})
    expected = script.tested(plain.with_calibration(odd), key, noise[::2])
    for name in script.TESTS:
        assert np.array_equal(found[name][::2], expected[name])
    assert not np.array_equal(found["verdict"], script.by_halves(plain, noise, [key], noise.flip(-1))[0]["verdict"])


def test_rates_by_hand(script):
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


def test_end_to_end_with_halves_and_an_attack(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "Detector", partial(Detector, inverter=Inverter.named("encoder")))  # the quick one
    rng = np.random.default_rng(0)
    (tmp_path / "photographs").mkdir()
    for i in range(38):
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC).save(tmp_path / f"photographs/{i}.png")
    run = [str(tmp_path / "photographs"), "-o", str(tmp_path / "out"), "--keys", "2", "--steps", "1"]
    result = CliRunner().invoke(script.main, [*run, "--halves", "--attack", "flip"])
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / "out" / "study_false_positives.json").read_text())
    assert len(stored["rows"]) == 2 * 4 * 4 and len(stored["keys"]) == 2 * 4 * (3 * 2 + 1)
    assert (tmp_path / "out" / "study_false_positives.png").stat().st_size > 5000
    given = CliRunner().invoke(script.main, [*run, "--halves", "--calibration", "my.cal"])
    assert given.exit_code == 2 and "leave out one" in given.output


def test_a_true_p_value_is_found_true_and_a_false_one_not(script, keys):
    noise = initial_noise(list(range(400)), MODEL.latent_shape)
    colour = torch.linspace(0.5, 1.5, 400)[:, None, None, None]  # images of different scales: the cosine forgives them
    plain = Detector(MODEL, [], steps=2)
    found = script.by_halves(plain, noise * colour, keys["rand"], noise * colour)
    rows = {row["test"]: row for row in script.pooled({}, found, 0)}
    assert rows["verdict"]["KS p least"] > 0.01 and rows["verdict"]["0.05 held"] == 2
    assert rows["threshold 77"]["0.05 held"] == 0
