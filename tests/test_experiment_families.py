"""The table of families, on one of them."""

from __future__ import annotations

from scripts.experiments import families as script


def test_a_tiny_pipeline_is_loaded_marked_walked_and_inverted(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SIDES", ((16, 24),))
    (row,) = experiment("families", tmp_path, "--pipeline", "flux.1-schnell")["rows"]
    assert (row["family"], row["pipeline"], row["multiple"]) == ("flux.1", "FluxPipeline", 16)
    assert row["walk"] < 1e-4 and row["exact dB"] < -50 < row["naive dB"] and row["p"] < 1e-100
    heads, _, cells = script.markdown([row]).splitlines()
    assert heads.count("|") == cells.count("|") and "16 × f8" in cells and "1e-300" in cells
