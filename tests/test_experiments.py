"""The driver, what experiments share, and the experiments without a file of their own, in their small settings."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from scripts.experiments import autoencoders, decoder
from scripts.experiments.__main__ import main, summaries
from scripts.experiments.common import Bench, mark_in_turn


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("results")


def test_the_list_has_a_line_for_each_experiment():
    listed = CliRunner().invoke(main, ["--list"])
    assert listed.exit_code == 0 and len(listed.output.splitlines()) == len(summaries()) >= 11
    assert all(text and len(text) < 102 for text in summaries().values())
    assert summaries().keys() >= {"convergence", "pareto", "classification", "decoder", "shapes"}


@pytest.mark.parametrize("name", sorted(summaries()))
def test_every_experiment_describes_itself(name):
    described = CliRunner().invoke(main, [name, "--help"])
    assert described.exit_code == 0 and "Usage:" in described.output


def documented() -> list[list[str]]:
    """The experiments' command lines in the documentation, as words after the driver's name."""
    pages = (Path(__file__).resolve().parents[1] / "docs").rglob("*.md")
    return [
        line.split()[3:]
        for page in pages
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("    python -m scripts.experiments ")
    ]


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_documented_commands_have_their_options(words):
    command = main.get_command(None, words[0])
    known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
    assert {word for word in words if word.startswith("-")} <= known


def test_an_unknown_experiment_is_refused(tmp_path):
    assert CliRunner().invoke(main, ["nonesuch", "-o", str(tmp_path)]).exit_code == 2


def test_results_say_how_they_were_made(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoders, "METHODS", ["encoder"])
    monkeypatch.setattr(autoencoders, "TRAINING_SCENES", 2)
    found = experiment("autoencoders", tmp_path, "-n", 2, "--updates", 1)
    name = tmp_path.name  # and not where it lies
    assert found["command"] == f"python -m scripts.experiments autoencoders -o {name} -n 2 --updates 1"
    assert found["parameters"] == {"number": 2, "updates": 1} and found["n"] == 2
    assert found["versions"]["torch"] == torch.__version__ and found["processor"]
    assert {"seed", "first_seed", "threads", "cores"} <= found.keys()


def test_a_batch_is_made_once(bench):
    calls = []

    def double(rows, names):
        calls.append(names)
        return {"twice": 2 * rows}

    run, rows, names = bench(), torch.arange(5.0), list("abcde")
    for _ in range(2):
        assert run.batches(["x"], double, rows, names, name="x", batch=2)["twice"].tolist() == [0, 2, 4, 6, 8]
    assert calls == [["a", "b"], ["c", "d"], ["e"]]
    run.batches(["x"], double, rows + 1, names, name="x", batch=2)
    assert len(calls) == 6


def test_photographs_are_what_their_latents_decode_to(pocket, tmp_path):
    from ringmark.data.images import from_array, save_png
    from ringmark.data.scenes import scene

    for i in range(2):
        save_png(from_array(scene(i).pixels.transpose(2, 0, 1) / 127.5 - 1), tmp_path / f"{i}.png")
    run = Bench("test", tmp_path / "out", number=5, photographs=tmp_path)
    seen = run.pictures()
    assert seen.names == ["0.png", "1.png"] and seen.noise is None
    assert (pocket.decode(seen.latents).clamp(-1, 1) - seen.images).abs().max() < 1.5 / 255


def test_marks_are_planted_in_turn():
    class Adds:
        def __init__(self, value):
            self.value = value

        def embed(self, noise):
            return noise + self.value

    marked = mark_in_turn([Adds(1.0), Adds(2.0)], torch.zeros(5, 1, 1, 1))
    assert marked.flatten().tolist() == [1, 2, 1, 2, 1]


def test_claims_by_hand():
    rival, cheap, dear = (
        {"NMSE dB": db, "seconds": s, "evaluations": n} for db, s, n in ((-10, 8, 50), (-9.9, 0.5, 2), (-12, 1.5, 6))
    )
    rows = {"rival": rival, "Anderson, 6 steps": dear, "Anderson, 2 steps": cheap}
    exact, loose = (decoder.quick(rows, "rival", slack=slack, share=1 / 8) for slack in (0.0, 0.3))
    assert not exact["holds"] and exact["reached"].startswith("Anderson, 6 steps")  # 1.5 of 8 s is more than an eighth
    assert loose["holds"] and loose["reached"].startswith("Anderson, 2 steps")


@pytest.mark.slow
def test_the_bench_finds_anderson_ahead_and_goes_on_where_it_was(experiment, out):
    options = ("-n", 2, "--its", 5, "--timed", 1, "--rounds", 1)
    first = experiment("decoder", out, *options)
    kept = {path: path.stat().st_mtime_ns for path in (out / "kept").rglob("*.*[ls]")}
    again = experiment("decoder", out, *options)
    assert kept == {path: path.stat().st_mtime_ns for path in (out / "kept").rglob("*.*[ls]")}
    rows, same = ({row["method"]: row for row in found["rows"]} for found in (first, again))
    assert all(rows[name]["NMSE dB"] == same[name]["NMSE dB"] for name in rows)
    nmse = {name: row["NMSE dB"] for name, row in rows.items()}
    budgets = [nmse[decoder.anderson(k)] for k in (1, 2, 4, 8)]
    assert budgets == sorted(budgets, reverse=True) and budgets[0] < nmse["encoder"] - 1
    assert nmse[decoder.DEFAULT] < min(nmse[n] for n in nmse if n.startswith(("grad", "paper"))) - 2
    assert all(row["MB"] is None or row["MB"] > 0 for row in rows.values())
    holds = {claim["asked"]: claim["holds"] for claim in first["claims"]}
    assert holds["better on every image"] and holds["more accurate by default"]


@pytest.mark.slow
def test_pareto_has_every_family(experiment, out):
    found = experiment("pareto", out, "-n", 2, "--shortest", 2, "--timed", 1, "--rounds", 1)
    methods = {row["method"] for row in found["rows"]}
    assert {"encoder", "paper's Adam, 20", "gradient 0.1 scheduled, 10", "gradient 0.01 fixed, 2"} <= methods
    assert all(math.isfinite(row["NMSE dB"]) and row["seconds"] > 0 for row in found["rows"])


@pytest.mark.slow
def test_plain_autoencoders_are_inverted_too(experiment, out):
    found = experiment("autoencoders", out, "-n", 8, "--updates", 150)
    rows = {(r["autoencoder"], r["method"]): r for r in found["rows"]}
    for name in ("plain", "denoising"):
        assert rows[name, "anderson"]["NMSE dB"] < rows[name, "encoder"]["NMSE dB"] - 3
    for (_, method), row in rows.items():
        if method == "operator":
            assert row["worst change dB"] < 0.05
