"""The Ray engine with a model: the pieces, and the small setting end to end."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from ringmark.data.results import Results
from scripts.experiments import cluster
from scripts.experiments.cluster import GROUPS, LOCAL, ONE, RAY, TWO, different, group_of, ratios, verdicts
from scripts.experiments.processes import Processors, memory, sampled


def test_ratios_are_taken_within_each_round():
    ticks = {LOCAL: [10, 20, 30], RAY: [11, 24, 33], ONE: [8, 8, 8], TWO: [4, 4, 5]}
    clock = np.array(list(ticks.values()), float).T
    found = ratios(np.stack([clock, 2 * clock], 2))
    assert found["overhead"]["clock"] == pytest.approx([1.1, 1.1, 1.2])
    assert found["scaling"]["processor"] == pytest.approx([2, 1.6, 2])


def test_records_differ_by_all_but_times(tmp_path):
    path = tmp_path / "r.jsonl"
    with Results(path, {}, fields=["present"]) as store:
        store.append({"sample_id": "a", "present": True, "seconds": 1.0, "mtime_ns": 5})
    found = verdicts(path)
    assert found == {"a": {"sample_id": "a", "present": True}}
    assert different(found, found) == 0 and different(found, {"a": found["a"] | {"present": False}, "b": {}}) == 2


def test_memory_is_that_of_each_group():
    assert [group_of(name) for name in ("ray::_Tester.find", "ray::_read", "ray::IDLE", "raylet")] == [
        "actors",
        "readers",
        "readers",
        "Ray",
    ]
    with sampled(lambda: memory(group_of), 1) as samples:
        pass
    assert samples[0]["all"] >= samples[0]["driver"] > 10


def test_processor_time_of_processes_that_have_ended_is_kept():
    used = Processors()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        before = used.seconds()
        child.kill()
    assert used.seconds() >= before


def test_the_measurements_become_rows_and_ratios(experiment, tmp_path, monkeypatch):
    def measured(bench, name, work, *arguments):
        if work is not cluster.timed:
            return [[2.0, 1.0]] * len(GROUPS)
        (actors, _), *_ = arguments
        return [100 / max(1, actors) + actors, 110.0]

    monkeypatch.setattr(cluster, "kept", measured)
    monkeypatch.setattr(cluster, "verdicts", lambda results: {"a": {}})
    monkeypatch.setattr(cluster, "fill", lambda folder, bench: folder)
    found = experiment("cluster", tmp_path, "--rounds", 2, "--memory", 6, figure=False)
    assert [row["ms an image"] for row in found["rows"]] == [100, 101, 101, 52]
    assert found["overhead"] == {"clock": [1.01] * 3, "processor": [1.0] * 3}
    assert found["memory"][0] == {"images": 6, "processes": "driver", "peak MB": 2.0, "late MB": 1.0}


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    pytest.importorskip("ray")
    given = ("-n", 8, "--batch", 2, "--rounds", 1, "--memory", 6)
    found = experiment("cluster", tmp_path, *given, figure=False)
    assert [(row["actors"], row["cores"]) for row in found["rows"]] == [LOCAL, RAY, ONE, TWO]
    assert all(row["processor ms an image"] > 0 and row["different"] == 0 for row in found["rows"])
    assert [row["processes"] for row in found["memory"]] == list(GROUPS)
    assert all(row["peak MB"] >= row["late MB"] >= 0 for row in found["memory"])
    assert experiment("cluster", tmp_path, *given, figure=False)["rounds"] == found["rounds"]  # kept
