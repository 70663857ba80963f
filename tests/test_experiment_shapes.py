"""What the bench of shapes counts, on maps of known cost; its small setting, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ringmark.inversion.memory import stored_bytes


@pytest.fixture(scope="module")
def script(scripts):
    return scripts("bench_shapes")


def run(script, out: Path, *options: object) -> dict:
    small = ("--width", 0.0625, "--scale", 0.2, "--shape", "LaVie", "-o", out)
    done = CliRunner().invoke(script.main, [*map(str, small + options)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert all((out / f"bench_shapes.{kind}").stat().st_size for kind in ("csv", "png", "svg"))
    return json.loads((out / "bench_shapes.json").read_text())


def test_what_autograd_stores_is_counted_once_and_without_the_weights():
    z = torch.randn(7, 5)
    weight = torch.randn(5, 3)
    assert stored_bytes(torch.tanh, z) == 7 * 5 * 4  # its own output
    assert stored_bytes(lambda z: z.square() + z.exp() * 0, z) == 2 * 7 * 5 * 4  # z and exp(z)
    assert stored_bytes(lambda z: z @ weight, z, [weight]) == 0 < stored_bytes(lambda z: z @ weight, z)
    assert stored_bytes(torch.tanh, torch.empty(7, 5, device="meta")) == 7 * 5 * 4


def test_the_architecture_is_stable_diffusions(script):
    vae = script.autoencoder(1.0, "float32", "meta")
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    z = torch.empty(1, 4, 64, 64, device="meta")
    assert vae.decode(z).sample.shape == (1, 3, 512, 512)


@pytest.mark.parametrize(
    "method, at_once, calls",
    [("gradient-free", 1, 3), ("gradient-free", 3, 1), ("gradient", 3, 1), ("gradient, lean", 3, 1)],
)
def test_one_iteration_decodes_every_frame_once(script, method, at_once, calls):
    vae = script.autoencoder(1 / 16, "float32", "cpu")
    seen, decode = [], vae.decode
    vae.decode = lambda z, **options: (seen.append(len(z)), decode(z, **options))[1]
    case = script.Case(script.Shape("small", 3, 4, 4), method, at_once, "float32", 1 / 16, "cpu")
    assert script.iterate(vae, case) > 0
    assert seen == [at_once] * calls


def test_gradients_cost_a_graph_that_grows_with_the_frames(script, tmp_path):
    found = run(script, tmp_path)
    rows = {(r["method"], r["mode"]): r for r in found["rows"]}
    whole, single = rows["gradient", "whole batch"], rows["gradient", "frame by frame"]
    assert all(r["fits"] and r["seconds"] > 0 for r in rows.values())
    assert whole["stored MB"] == pytest.approx(16 * single["stored MB"], rel=0.01)
    assert whole["MB"] > 0.9 * whole["stored MB"] and whole["MB"] > rows["gradient-free", "whole batch"]["MB"]
    best = next(
        r
        for r in found["ratios"]
        if (r["ours"], r["rival"], r["gradient"]) == ("frame by frame", "gradient", "whole batch")
    )
    assert best["memory saved"] == pytest.approx(1 - rows["gradient-free", "frame by frame"]["MB"] / whole["MB"])
    assert 0.5 < best["memory saved"] < 1 and best["memory saved, with weights"] < best["memory saved"]


def test_what_does_not_fit_is_said_and_bounded_from_below(script, tmp_path):
    found = run(script, tmp_path, "--limit", 0.1)
    refused = [r for r in found["rows"] if not r["fits"]]
    assert [(r["method"], r["mode"]) for r in refused] == [("gradient", "whole batch")]
    assert refused[0]["MB"] == refused[0]["stored MB"] > 0.1 * 2**10 and refused[0]["seconds"] is None
    unbounded = lambda r: (r["rival"], r["gradient"]) == ("gradient", "whole batch")
    assert all(r["at least"] == unbounded(r) for r in found["ratios"])


def test_a_measurement_that_runs_out_of_memory_is_no_crash(script):
    case = script.Case(script.Shape("small", 16, 8, 12), "gradient", 16, "float32", 1 / 16, "cpu")
    assert all(v.isnan() for v in script.apart(case, 0.02).values())
