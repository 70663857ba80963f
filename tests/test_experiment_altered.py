"""Means worked by hand; the small setting, end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ringmark.data.scenes import scene
from ringmark.watermark.attacks.chains import parse
from scripts.experiments import altered as script


def test_mean_by_hand():
    found = script.mean_of(np.array([0.1, 0.3]))
    assert found["cosine"] == pytest.approx(0.2)
    assert (
        found["high"] - 0.2 == pytest.approx(0.2 - found["low"]) == pytest.approx(12.706 * 0.1, rel=1e-4)
    )  # t of 1 degree


@pytest.mark.slow
def test_an_altered_picture_keeps_a_smaller_share(pocket, bench):
    painted = [torch.from_numpy(scene(i).pixels).permute(2, 0, 1) / 127.5 - 1 for i in range(4)]
    with torch.inference_mode():
        decoded = pocket.decode(pocket.encode(torch.stack(painted).float())).clamp(-1, 1)
    altered = bench().attacked(decoded, parse("noise:0.1"))
    plain, altered = (script.shares(pocket, x)["share"] for x in (decoded, altered))
    assert altered.mean() < 0.5 * plain.mean()


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    found = experiment("altered", tmp_path, "-n", 2, "--steps", 2, "--attack", "noise:0.1")
    rows = {(r["attack"], r["way"]): r for r in found["rows"]}
    assert set(rows) == {(a, w) for a in ("clean", "noise:0.1") for w in script.WAYS}


def test_what_is_refused(tmp_path):
    for options, said in ((["--images", str(tmp_path)], "--images"), (["--attack", "melt:3"], "'melt'")):
        done = CliRunner().invoke(script.main, [*options, "-o", str(tmp_path)])
        assert done.exit_code == 2 and said in done.output
