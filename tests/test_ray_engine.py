"""The engine on a Ray cluster of two nodes: equal records, whatever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from engines import Mean, deadly, items, records_of

from ringmark.data.engine import Local
from ringmark.data.ray_engine import Cluster, Ray
from ringmark.data.reader import read_records
from ringmark.errors import EngineError

pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes():
    """A cluster of two nodes of one core, on which the modules of the tests can be imported."""
    from ray.cluster_utils import Cluster as Nodes

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        nodes = _started(Nodes)
    yield nodes
    nodes.shutdown()


def _started(Nodes):
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    return nodes


@pytest.fixture
def engine(nodes):
    """An engine on the cluster, of which the actors have this judge, if it is another than the driver's."""

    def make(judge: Mean, there: Mean | None = None, **cluster) -> Ray:
        where = Cluster(address=nodes.address, **cluster)
        return Ray(judge, partial(_same, there or judge), cluster=where, batch=4, workers=2)

    return make


def _same(judge: Mean) -> Mean:
    return judge


def test_records_equal_those_of_the_local_engine(engine, tmp_path):
    sources = items(tmp_path, 30)
    local = records_of(Local(Mean(), batch=4, workers=2), sources, tmp_path / "local.jsonl")
    assert records_of(engine(Mean()), sources, tmp_path / "ray.jsonl") == local
    before = (tmp_path / "local.jsonl").read_bytes()
    assert records_of(engine(Mean()), sources, tmp_path / "local.jsonl") == local  # which needs no actor
    assert (tmp_path / "local.jsonl").read_bytes() == before


def test_a_file_that_ends_its_readers_costs_no_other(engine, tmp_path):
    sources = items(tmp_path, 12)
    sources[5] = deadly(sources[5])
    records = records_of(engine(Mean()), sources, tmp_path / "r.jsonl")
    assert len(records) == 13 and records["5.png"]["code"] == "image.crash"
    assert sum("error" in record for record in records.values()) == 2  # and broken.png


def test_an_actor_that_dies_is_replaced(engine, tmp_path):
    sources, once = items(tmp_path, 12), tmp_path / "once"
    local = records_of(Local(Mean(), batch=4, workers=0), sources, tmp_path / "local.jsonl")
    once.touch()
    dying = Mean(deadly="6.png", once=once)
    assert records_of(engine(Mean(), dying), sources, tmp_path / "r.jsonl") == local and not once.exists()


def test_a_picture_that_ends_every_actor_is_given_up_and_no_other(engine, tmp_path):
    records = records_of(engine(Mean(), Mean(deadly="6.png")), items(tmp_path, 12), tmp_path / "r.jsonl")
    assert len(records) == 13 and records["6.png"]["code"] == "image.crash"
    assert sum("error" in record for record in records.values()) == 2


def test_actors_with_other_settings_are_refused(engine, tmp_path):
    with pytest.raises(EngineError, match="judge was mean, is another"):
        records_of(engine(Mean(), Mean(other=True)), items(tmp_path, 4), tmp_path / "r.jsonl")


def test_a_cluster_without_enough_cores_is_refused(engine, tmp_path):
    with pytest.raises(EngineError, match="has 2 cores, and each process needs 3"):
        records_of(engine(Mean(), cores=3), items(tmp_path, 4), tmp_path / "r.jsonl")


DRIVER = """
import sys
from functools import partial
from pathlib import Path
sys.path.insert(0, {tests!r})
from engines import Mean, items, records_of
from test_ray_engine import _same
from ringmark.data.ray_engine import Cluster, Ray
folder, judge = Path({folder!r}), Mean(seconds=0.2)
engine = Ray(judge, partial(_same, judge), cluster=Cluster({address!r}), batch=4, workers=2)
records_of(engine, items(folder, 60), folder / "r.jsonl")
"""


def test_a_killed_driver_loses_only_what_was_in_work(nodes, engine, tmp_path):
    sources, results = items(tmp_path, 60), tmp_path / "r.jsonl"
    local = records_of(Local(Mean(), batch=4, workers=0), sources, tmp_path / "local.jsonl")
    script = DRIVER.format(tests=str(Path(__file__).parent), folder=str(tmp_path), address=nodes.address)
    driver = subprocess.Popen([sys.executable, "-c", script])
    while not results.exists() or results.read_bytes().count(b"\n") < 10:
        assert driver.poll() is None
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    before = len(read_records(results)[1])
    assert 9 <= before < 61
    assert records_of(engine(Mean()), sources, results) == local
    lines = [json.loads(line)["sample_id"] for line in results.read_text().splitlines()[1:]]
    assert len(lines) == len(set(lines)) == 61
