"""How the study counts, on tables worked by hand; its small setting, end to end."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ringmark.data.scenes import GROUNDS, SKIES, scene
from ringmark.inversion.methods import InertialKM


@pytest.fixture(scope="module")
def script(scripts):
    return scripts("study_sensitivity")


def test_the_range_is_the_one_around_the_best(script):
    table = lambda *gains: [
        {"parameter": "step", "method": "m", "value": v, "gain_db": g} for v, g in enumerate(gains, 1)
    ]
    found = script.works_within(table(1.5, 0.9, 1.0, 3.0, 2.0, -4.0), 3)
    assert (found["best"], found["works_from"], found["works_to"]) == (4, 3, 5)
    assert found["used_gain_db"] == 1.0 and found["tried"] == (1, 6)
    found = script.works_within(table(0.2, 0.9), None)
    assert found["works_from"] is None and found["best"] == 2 and found["used_gain_db"] is None


def test_every_caption_has_its_ground_and_sky(script):
    for seed in range(200):
        made = scene(seed, 16)
        assert script.categories(made.caption, True) == [
            f"ground: {made.attributes.ground}",
            f"sky: {made.attributes.sky}",
        ]
    assert script.categories("a cat", True) == ["other"]
    assert script.categories("birds/1.png", False) == ["birds"] and script.categories("1.png", False) == ["1"]


def test_categories_partition_the_images(script):
    names = [scene(seed, 16).caption for seed in range(60)]
    lowest = torch.arange(60.0, dtype=torch.float64)
    rows = {row["category"]: row for row in script.by_category(names, lowest, True)}
    assert rows["all"]["n"] == 60 and rows["all"]["mean"] == 29.5 and rows["all"]["minimum"] == 0
    for kind, words in (("ground", GROUNDS), ("sky", SKIES)):
        some = [rows[f"{kind}: {word}"] for word in words if f"{kind}: {word}" in rows]
        assert sum(r["n"] for r in some) == 60 and sum(r["n"] * r["mean"] for r in some) == pytest.approx(60 * 29.5)


def test_the_sweeps_hold_what_is_used_and_obey_the_theorem(script):
    for sweep in script.sweeps():
        assert sweep.used is None or sweep.used in sweep.inverters, (sweep.parameter, sweep.method)
        assert list(sweep.inverters) == sorted(sweep.inverters) and sweep.parameter in script.AXES
        for value, inverter in sweep.inverters.items():
            method = inverter.method
            if sweep.parameter == "step" and isinstance(method, InertialKM):
                assert 2 * method.lam * method.beta == pytest.approx(value)
            assert not inverter.early
    short = script.sweeps()[0].thinned(3, 2)
    assert [i.method.horizon for i in short.inverters.values()] == [2, 2, 2]


def run(script, *command):
    done = CliRunner().invoke(script.main, [str(word) for word in command], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_the_small_setting(script, tmp_path):
    small = ("-n", 2, "--paths", 3, "--steps", 3, "--at", 2, "--ddim", 2, "--its", 2, "--every", 3)
    run(script, "-o", tmp_path, *small, "--parameter", "step", "--parameter", "ridge")
    found = json.loads((tmp_path / "study_sensitivity.json").read_text())
    rows = found["rows"]
    assert found["encoder"]["gain_db"] == 0 and found["encoder"]["standard_error"] > 0
    for row in rows:
        assert row["gain_db"] == pytest.approx(found["encoder"]["nmse_db"] - row["nmse_db"], abs=1e-4)
        assert row["worst_gain_db"] <= row["gain_db"] and row["worst_db"] >= row["nmse_db"]
    gain = {(r["parameter"], r["method"], r["value"]): r["gain_db"] for r in rows}
    assert gain["step", "forward step, 12 its", 1.2] > gain["step", "forward step, 12 its", 0.05] + 1
    assert abs(gain["step", "KM, α = 0, 20 its", 0.001]) < 0.1
    # Momentum makes up for a small step: after three of ρ = 0.03 the inertial iterate has gone further
    assert gain["step", "KM, α = 0.9, 20 its", 0.03] > gain["step", "KM, α = 0, 20 its", 0.03]
    assert gain["ridge", "Anderson, 8 its", 1e-5] > 1
    table = list(csv.DictReader((tmp_path / "cocoercivity_by_category.csv").open()))
    assert table[0]["category"] == "all" and table[0]["n"] == "3"
    for suffix in ("png", "svg"):
        assert (tmp_path / f"study_sensitivity.{suffix}").exists()


def test_a_folder_is_told_by_name(script, tmp_path):
    for name, seed in (("hills/a", 0), ("hills/b", 1), ("c", 2)):
        path = tmp_path / "in" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(seed).pixels).save(path)
    command = ("-o", tmp_path, "--images", tmp_path / "in", "-n", 2, "--paths", 3, "--steps", 3, "--at", 2, "--its", 1)
    run(script, *command, "--parameter", "window", "--every", 6)
    table = {row["category"]: row for row in csv.DictReader((tmp_path / "cocoercivity_by_category.csv").open())}
    assert {name: row["n"] for name, row in table.items()} == {"all": "3", "c": "1", "hills": "2"}
    assert float(table["all"]["minimum"]) == min(float(row["minimum"]) for row in table.values())
    assert json.loads((tmp_path / "study_sensitivity.json").read_text())["source"] == "in"
