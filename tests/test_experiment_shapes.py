"""What the bench of shapes counts, on maps of known cost; its small setting, end to end."""

from __future__ import annotations

import pytest
import torch

from ringmark.inversion.memory import stored_bytes
from scripts.experiments import shapes as script

SMALL = ("--width", 0.0625, "--scale", 0.2, "--shape", "LaVie")


def test_what_autograd_stores_is_counted_once_and_without_the_weights():
    z = torch.randn(7, 5)
    weight = torch.randn(5, 3)
    assert stored_bytes(torch.tanh, z) == 7 * 5 * 4  # its own output
    assert stored_bytes(lambda z: z.square() + z.exp() * 0, z) == 2 * 7 * 5 * 4  # z and exp(z)
    assert stored_bytes(lambda z: z @ weight, z, [weight]) == 0 < stored_bytes(lambda z: z @ weight, z)
    assert stored_bytes(torch.tanh, torch.empty(7, 5, device="meta")) == 7 * 5 * 4


def test_the_architecture_is_stable_diffusions():
    vae = script.autoencoder(1.0, "float32", "meta")
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    z = torch.empty(1, 4, 64, 64, device="meta")
    assert vae.decode(z).sample.shape == (1, 3, 512, 512)


@pytest.mark.parametrize(
    "method, at_once, calls",
    [("gradient-free", 1, 3), ("gradient-free", 3, 1), ("gradient", 3, 1), ("gradient, lean", 3, 1)],
)
def test_one_iteration_decodes_every_frame_once(method, at_once, calls):
    vae = script.autoencoder(1 / 16, "float32", "cpu")
    seen, decode = [], vae.decode
    vae.decode = lambda z, **options: (seen.append(len(z)), decode(z, **options))[1]
    case = script.Case(
        shape=script.Shape(name="small", frames=3, height=4, width=4),
        method=method,
        at_once=at_once,
        dtype="float32",
        width=1 / 16,
        device="cpu",
    )
    assert script.iterate(vae, case) > 0
    assert seen == [at_once] * calls


def measured(case, limit):
    """In place of a measurement: a megabyte and a second a frame that goes through at once, ten for a gradient."""
    cost = case.at_once * (10.0 if case.method == script.GRADIENT else 1.0)
    return {"seconds": torch.tensor(cost), "MB": torch.tensor(cost)}


def test_what_is_reported_of_measurements(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "apart", measured)
    found = experiment("shapes", tmp_path, *SMALL)
    rows = {(r["method"], r["mode"]): r for r in found["rows"]}
    whole, single = rows["gradient", "whole batch"], rows["gradient", "frame by frame"]
    assert all(r["fits"] for r in rows.values()) and whole["MB"] == 160
    assert whole["stored MB"] == pytest.approx(16 * single["stored MB"], rel=0.01)
    assert rows["gradient, lean", "whole batch"]["stored MB"] is None
    ratios = {(r["ours"], r["rival"], r["gradient"]): r for r in found["ratios"]}
    best, weights = ratios["frame by frame", "gradient", "whole batch"], found["weights_MB"]["float32"]
    assert best["memory saved"] == pytest.approx(1 - 1 / 160) and best["time ratio"] == pytest.approx(1 / 160)
    assert best["memory saved, with weights"] == pytest.approx(1 - (1 + weights) / (160 + weights))


def test_what_does_not_fit_is_said_and_bounded_from_below(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "apart", measured)
    found = experiment("shapes", tmp_path, *SMALL, "--limit", 0.1)
    refused = [r for r in found["rows"] if not r["fits"]]
    assert [(r["method"], r["mode"]) for r in refused] == [("gradient", "whole batch")]
    assert refused[0]["MB"] == refused[0]["stored MB"] > 0.1 * 2**10 and refused[0]["seconds"] is None
    for r in found["ratios"]:
        assert r["at least"] == ((r["rival"], r["gradient"]) == ("gradient", "whole batch"))


@pytest.mark.slow
def test_measurements_in_processes_of_their_own(experiment, tmp_path):
    """How much a kernel takes is the processor's business."""
    rows = experiment("shapes", tmp_path, *SMALL)["rows"]
    assert len(rows) == 6 and all(r["fits"] and r["seconds"] > 0 for r in rows)


@pytest.mark.slow
def test_a_measurement_that_runs_out_of_memory_is_no_crash():
    case = script.Case(
        shape=script.Shape(name="small", frames=16, height=8, width=12),
        method="gradient",
        at_once=16,
        dtype="float32",
        width=1 / 16,
        device="cpu",
    )
    assert all(v.isnan() for v in script.apart(case, 0.02).values())
