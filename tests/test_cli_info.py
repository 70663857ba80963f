"""`ringmark invert`, `ringmark info` and `ringmark demo`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from shell import QUICK, pictures, run


def test_invert_writes_what_it_found(house: Path, tmp_path: Path) -> None:
    run("invert", pictures(house)[0], "-o", tmp_path / "noise.safetensors", *QUICK)
    tensors = load_file(tmp_path / "noise.safetensors")
    assert tensors["latents"].shape == tensors["noise"].shape == (4, 32, 32)
    with safe_open(tmp_path / "noise.safetensors", "numpy") as file:
        facts = json.loads(file.metadata()["ringmark"])
    assert facts["evaluations"] == 2 * len(facts["residuals"]) == 2  # of the picture and of its rendering
    at = facts["residuals"].index(facts["residual"])
    assert facts["pixel_residuals"][at] == min(facts["pixel_residuals"])


def test_info_names_the_model() -> None:
    assert json.loads(run("info", "--json").stdout)["latent shape"] == "4x32x32"


@pytest.mark.slow
def test_demo_does_the_whole_job(tmp_path: Path) -> None:
    out = run("demo", "-o", tmp_path / "demo", "-n", 2).stdout
    assert "AUC" in out and "carries key" in out
    for name in ("my.key", "explain.png", "results.jsonl", "roc.png"):
        assert (tmp_path / "demo" / name).exists()
