"""Walks of known maps; the convergence script's small setting, end to end."""

from __future__ import annotations

import csv
from itertools import islice

import pytest
import torch
from click.testing import CliRunner

from ringmark.inversion.methods import Adam, Anderson, ForwardStep, InertialKM
from ringmark.inversion.metrics import Walk, trace
from ringmark.inversion.solve import norms, solve
from scripts.experiments import convergence as script

RATES = torch.tensor([0.4, 0.8, 1.6])
ROOT = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 4.0]])
START = ROOT + torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, 2.0]])


def linear(z, rows):
    return RATES * (z - ROOT[rows])


@pytest.mark.parametrize("method", [ForwardStep(0.5), InertialKM(), Adam(horizon=20), Anderson()])
def test_a_trace_goes_where_the_driver_goes(method):
    """Before anything stops, the driver evaluates T at the same points."""
    sizes = torch.stack([norms(t) for _, t in islice(trace(linear, START, method, 20), 4)])
    assert torch.allclose(sizes, solve(linear, START, method, max_steps=3).residuals, rtol=1e-5)
    assert len(list(trace(linear, START, method, 20))) == 21


def test_a_walk_of_a_linear_map():
    """T = Λ (z − z*): β_k lies between the inverse eigenvalues; the inequality of Theorem 1 holds if 0 < ρ < 2β."""
    walk = Walk.along(linear, START, ForwardStep(0.7), steps=300, at=10, truth=ROOT)
    assert walk.distances.shape == walk.betas.shape == (11, 2) and (walk.end < 1e-5).all()
    assert (walk.lowest >= 1 / 1.6 - 1e-5).all() and (walk.betas[:-1] <= 1 / 0.4 + 1e-5).all()
    assert torch.allclose(walk.betas, walk.true_betas, rtol=1e-4)
    assert (walk.slack(0.7) > -1e-6).all()
    known = 2 * 0.7 * (walk.betas[:-1] - walk.lowest) * (walk.sizes[:-1] / walk.distances[:-1]).square()
    assert torch.allclose(walk.slack(0.7), known, atol=1e-5)


def test_the_inequality_is_that_of_plain_steps_only():
    walk = Walk.along(linear, START, Adam(lr=0.01, horizon=None), steps=2000, at=10)
    assert (walk.slack(0.7) < -1e-3).all()


def test_a_path_that_climbs_is_not_cocoercive():
    walk = Walk.along(lambda z, rows: -linear(z, rows), START, ForwardStep(0.1), steps=20, at=5, truth=ROOT)
    assert (walk.true_lowest < 0).all() and (walk.true_betas < 0).all()


def test_steps_after_arrival_do_not_count():
    """With ρ = 1 and T = z − z* one step arrives; 0/0 thereafter says nothing."""
    walk = Walk.along(lambda z, rows: z - ROOT[rows], START, ForwardStep(), steps=20, at=5)
    assert walk.moving.sum(0).tolist() == [1, 1] and torch.allclose(walk.lowest, torch.ones(2, dtype=torch.float64))


def test_a_path_that_overflows_has_no_minimum():
    walk = Walk.along(lambda z, rows: -z.sign() * z.square() ** 2, START, ForwardStep(), steps=30, at=20)
    assert walk.lowest.isnan().all()


def test_shares_and_correlations():
    betas = torch.tensor([[1.0, 1.0, -1.0], [0.2, 1.0, 1.0], [9.0, 9.0, 9.0]])  # the last row is where the walk ends
    moving = torch.ones(2, 3, dtype=torch.bool)
    assert script.shares(betas, moving, 0.5) == pytest.approx({"steps": 4 / 6, "images": 1 / 3})
    assert script.shares(betas, moving, 0.0) == pytest.approx({"steps": 5 / 6, "images": 2 / 3})
    x = torch.tensor([1.0, 2.0, 3.0, torch.nan])
    assert script.rank_correlation(x, -(x**3)) == pytest.approx({"rho": -1.0, "p": 0.0, "n": 3}, abs=1e-6)
    assert script.rank_correlation(x, torch.ones(4))["rho"] is None


def test_what_theorems_ask_for():
    for name, walker in script.walkers(100).items():
        method = walker.method
        if isinstance(method, InertialKM):
            assert method.lam * (1 - method.alpha + 2 * method.alpha**2) < (1 - method.alpha) ** 2, name
    steps = {name: script.step_of(w.method) for name, w in script.walkers(100).items()}
    assert steps["km-paper"] == pytest.approx(0.001) == steps["km-paper-none"]
    assert steps["km"] == pytest.approx(0.5) == steps["km-none"] and steps["adam"] is None
    assert set(steps) == set(script.TITLES)


@pytest.mark.slow
def test_the_small_setting(experiment, tmp_path, monkeypatch):
    methods = ("forward", "km", "km-none", "adam", "anderson")
    options = ["-n", 2, "--walk", 4, "--at", 2, "--steps", 2]
    options += [word for name in methods for word in ("--method", name)]
    found = experiment("convergence", tmp_path, *options)
    rows = list(csv.DictReader((tmp_path / "convergence.csv").open()))
    assert len(rows) == 2 * len(methods) and {r["method"] for r in rows} == set(methods)
    about = {m["method"]: m for m in found["methods"]}
    for name in ("forward", "km-none"):
        assert about[name]["theorem 1"]["steps at which the inequality holds"] == 1
    assert about["km"]["theorem 1"] is None and about["adam"]["above rho/2"] is None
    # From the encoder every method starts at the same residual; a plain step of 1 leaves the least of the paper's
    left = {name: about[name]["residual left"]["median"] for name in methods}
    assert left["forward"] < left["km"] < left["adam"] < 1 and left["km"] < left["km-none"]
    assert found["momentum"][0]["momentum"] == "km" and found["momentum"][0]["residual ratio"]["median"] < 1
    for row in rows:
        assert 0 < float(row["distance_to_end"]) < float(row["first_distance_to_end"])
    monkeypatch.setattr(script.Walk, "along", None)  # a second run walks nothing
    assert experiment("convergence", tmp_path, *options) == found


def test_the_end_lies_beyond(tmp_path):
    done = CliRunner().invoke(script.main, ["-o", str(tmp_path), "--walk", "5", "--at", "5"])
    assert done.exit_code == 2 and "--at" in done.output
