"""Every command works on every family; their autoencoders are random here, so keys are not found in the pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from families import build
from PIL import Image
from shell import pictures, run

from ringmark.inversion.models.loading import quiet
from ringmark.inversion.models.pipeline import LatentModel

NAMES = ("stable-diffusion-zero-snr", "rectified-flow", "sdxl", "sd3", "flux.1-dev", "flux.2-klein", "z-image")
NAMES += ("qwen-image", "sana", "pixart-sigma")


def textured(folder: Path, side: int) -> None:
    """Unmarked pictures of noise: those that random networks draw hardly vary."""
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (20, side, side, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_command_works(name: str, tmp_path: Path) -> None:
    with quiet():
        pipe = build(name)
        pipe.save_pretrained(tmp_path / "model")
    native = LatentModel(pipe, name=name)
    side = max(128, 8 * native.factor)
    radii = "{}-{}".format(*(r * native.image_size[0] // side for r in ((1, 3) if name == "sana" else (2, 6))))
    model, drawing = ["--model", tmp_path / "model"], ["--size", f"{side}x{side}", "--steps", 2]
    reading = [*model, *drawing, "--method", "encoder", "--key", tmp_path / "my.key"]
    assert native.kind["family"] in run("info", *model).stdout
    run("keygen", *model, "--channels", "0", "--radii", radii, "-o", tmp_path / "my.key")
    run("generate", *model, *drawing, "--key", tmp_path / "my.key", "-o", tmp_path / "images/marked")
    verifying = ["verify", *pictures(tmp_path), *reading, "--json"]
    if native.channels == 4:  # more channels of these narrow autoencoders depend on each other
        textured(tmp_path / "unmarked", side)
        made = tmp_path / "made.safetensors"
        run("calibrate", tmp_path / "unmarked", *model, *drawing, "--method", "encoder", "-o", made)
        verifying += ["--calibration", made, "--alpha", 0.06]
    (verdict,) = json.loads(run(*verifying, code=(0, 1)).stdout)  # random weights show a mark only by chance
    assert 0 < verdict["p_value"] <= 1 and bool(verdict["calibration"]) == (native.channels == 4)
    run("attack", tmp_path / "images/marked", tmp_path / "attacked", "--attack", "jpeg:50")
    run("audit", tmp_path / "attacked", *reading, "-o", tmp_path / "audit.jsonl")
    assert len((tmp_path / "audit.jsonl").read_text().splitlines()) == 2
    comparing = ["--methods", "encoder", "-n", 2, "-o", tmp_path / "evaluation"]
    run("evaluate", *model, *drawing, "--key", tmp_path / "my.key", *comparing)
    assert (tmp_path / "evaluation/evaluation.json").exists()
