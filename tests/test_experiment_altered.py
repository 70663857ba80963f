"""Means worked by hand; the small setting, end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ringmark.data.scenes import scene
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.attacks.chains import parse


@pytest.fixture(scope="module")
def script(scripts):
    return scripts("study_altered")


def test_mean_by_hand(script):
    found = script.mean_of(np.array([0.1, 0.3]))
    assert found["cosine"] == pytest.approx(0.2)
    assert (
        found["high"] - 0.2 == pytest.approx(0.2 - found["low"]) == pytest.approx(12.706 * 0.1, rel=1e-4)
    )  # t of 1 degree


def test_the_residual_of_an_altered_picture_falls_slower(script, tmp_path):
    model = LatentModel.from_pretrained("pocket")
    painted = [torch.from_numpy(scene(i).pixels).permute(2, 0, 1) / 127.5 - 1 for i in range(4)]
    with torch.inference_mode():
        decoded = model.decode(model.encode(torch.stack(painted).float())).clamp(-1, 1)
    altered = script.attacked(model, decoded, parse("contrast:1.5"), 0)
    plain, altered = (script.falls(model, x, tmp_path) for x in (decoded, altered))
    assert altered.mean() > 1.3 * plain.mean()


def test_small_setting(script, tmp_path):
    options = ["-n", "2", "--steps", "2", "--attack", "noise:0.1", "-o", str(tmp_path)]
    done = CliRunner().invoke(script.main, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = {(r["attack"], r["way"]): r for r in json.loads((tmp_path / "study_altered.json").read_text())["rows"]}
    assert set(rows) == {(a, w) for a in ("clean", "noise:0.1") for w in script.WAYS}
    for attack in ("clean", "noise:0.1"):
        kept = rows[attack, "guarded"]["kept"]
        like = {0: "Anderson, 2 steps", 1: "encoder"}.get(kept)
        assert like is None or rows[attack, "guarded"]["cosine"] == pytest.approx(
            rows[attack, like]["cosine"], abs=1e-4
        )
    assert all((tmp_path / f"study_altered.{kind}").stat().st_size for kind in ("csv", "png", "svg"))


def test_what_is_refused(script, tmp_path):
    for options, said in ((["--images", str(tmp_path)], "--images"), (["--attack", "melt:3"], "'melt'")):
        done = CliRunner().invoke(script.main, [*options, "-o", str(tmp_path)])
        assert done.exit_code == 2 and said in done.output
