"""The table of samplers, its small setting end to end."""

from __future__ import annotations

import pytest

from scripts.experiments import samplers as script


def test_every_sampler_of_the_model_has_a_row(bench):
    rows = script.plans(bench())
    assert set(rows) == {*script.SAMPLERS, script.ETA}
    assert rows["lcm"][1:3] == (script.LCM_STEPS, 1.0) and rows[script.ETA][0] == "ddim"


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    chosen = ("--sampler", "ddim", "--sampler", "euler-a", "--sampler", script.ETA)
    rows = experiment("samplers", tmp_path, "-n", 2, "--steps", 6, *chosen)["rows"]
    assert [r["sampler"] for r in rows] == ["ddim", "euler-a", script.ETA]
    assert [r["kind"] for r in rows] == ["deterministic", "adds noise", "adds noise"]
    assert rows[0]["found"] == 2 and rows[0]["median p"] < 1e-10 < min(r["median p"] for r in rows[1:])
