"""The experiments in their small settings: they finish, go on where they were, and their results are sound."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture
def run(scripts):
    """Run a script's command in this process; its results as read back from JSON."""

    def invoke(name: str, out: Path, *options: object) -> dict:
        script = scripts(name)
        done = CliRunner().invoke(script.main, ["-o", str(out), *map(str, options)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        for suffix in ("csv", "png", "svg"):
            assert (out / f"{name}.{suffix}").stat().st_size > 100
        found = json.loads((out / f"{name}.json").read_text())
        assert len(list(csv.DictReader((out / f"{name}.csv").open()))) == len(found["rows"])
        return found

    return invoke


BENCH = ("-n", 2, "--its", 5, "--timed", 1, "--rounds", 1)


def test_the_bench_finds_ours_ahead_and_goes_on_where_it_was(run, out):
    first = run("bench_decoder", out, *BENCH)
    kept = {path: path.stat().st_mtime_ns for path in (out / "cache").iterdir()}
    again = run("bench_decoder", out, *BENCH)
    assert kept == {path: path.stat().st_mtime_ns for path in (out / "cache").iterdir()}
    rows, same = ({row["method"]: row for row in found["rows"]} for found in (first, again))
    assert all(rows[name]["NMSE dB"] == same[name]["NMSE dB"] for name in rows)
    nmse = [rows[f"ours, {k} steps"]["NMSE dB"] for k in (1, 2, 4, 8)]
    assert nmse == sorted(nmse, reverse=True) and nmse[0] < rows["encoder"]["NMSE dB"] - 1
    assert (
        rows["ours, default"]["NMSE dB"] < min(rows[n]["NMSE dB"] for n in rows if n.startswith(("grad", "paper"))) - 2
    )
    assert all(row["MB"] is None or row["MB"] > 0 for row in rows.values())
    holds = {claim["asked"]: claim["holds"] for claim in first["claims"]}
    assert holds["better on every image"] and holds["more accurate by default"]


def test_pareto_has_every_family(run, out):
    found = run("reproduce_pareto", out, "-n", 2, "--shortest", 2, "--timed", 1, "--rounds", 1)
    methods = {row["method"] for row in found["rows"]}
    assert {"encoder", "paper's Adam, 20", "gradient 0.1 scheduled, 10", "gradient 0.01 fixed, 2"} <= methods
    assert all(math.isfinite(row["NMSE dB"]) and row["seconds"] > 0 for row in found["rows"])


def test_exact_inversion_pays_on_true_latents(run, out):
    found = run("study_noise", out, "-n", 2, "--steps", 4)
    rows = {(r["latents"], r["prompt"], r["inversion"]): r for r in found["rows"]}
    naive, exact = rows["true", "true", "naive"], rows["true", "true", "exact, Anderson 3"]
    assert exact["correlation"] > naive["correlation"] and exact["noise NMSE dB"] < naive["noise NMSE dB"]
    assert naive["calls"] == 8 < exact["calls"] <= 8 * 5  # guidance calls the network twice; early steps stop early
    assert rows["ours", "empty", "naive"]["correlation"] > rows["encoder", "empty", "naive"]["correlation"]


def test_plain_autoencoders_are_inverted_too(run, out):
    found = run("study_autoencoders", out, "-n", 8, "--updates", 150)
    rows = {(r["autoencoder"], r["method"]): r for r in found["rows"]}
    for name in ("plain", "denoising"):
        assert rows[name, "anderson"]["NMSE dB"] < rows[name, "encoder"]["NMSE dB"] - 3
    for (_, method), row in rows.items():
        if method == "anderson":
            assert row["worst change dB"] < 0.05


def test_at_few_steps_no_alternative_is_better(run, out):
    found = run("study_alternatives", out, "-n", 2, "--steps", 4)
    nmse = {row["method"]: row["NMSE dB"] for row in found["rows"]}
    assert min(nmse, key=nmse.get).startswith("Anderson") and max(nmse.values()) < -12
