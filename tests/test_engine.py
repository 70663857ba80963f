"""Engines read and judge pictures; the local one in this process."""

from __future__ import annotations

import pickle
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from engines import Mean, items, records_of
from shell import refused

from ringmark.data.batches import chunks
from ringmark.data.engine import Local
from ringmark.data.ray_engine import JOINING, QUIET, Cluster, _connect
from ringmark.errors import EngineError, ImageError
from ringmark.watermark.cli.remedies import explained


def test_chunks_are_in_order_and_the_last_may_be_short():
    assert list(chunks(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]] and not list(chunks([], 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_local_engine_reads_in_order_and_judges_in_batches(tmp_path, workers):
    engine, sources = Local(Mean(), batch=4, workers=workers), items(tmp_path, 10)
    read = list(engine.read(sources, lambda item: item.id == "3.png"))
    assert [picture.item for picture in read] == sources
    assert [picture.item.id for picture in read if picture.error] == ["broken.png"]
    assert [picture.item.id for picture in read if picture.skipped] == ["3.png"]
    groups = list(engine.judge(picture if picture.content else None for picture in read))
    assert [picture.item for group in groups for picture, _ in group] == [p.item for p in read if p.content]
    assert all(picture.content == finding[0]["content"] for group in groups for picture, finding in group)


def test_equal_pixels_are_judged_once_and_broken_files_recorded(tmp_path):
    records = records_of(Local(Mean(), batch=4, workers=0), items(tmp_path, 10), tmp_path / "results.jsonl")
    assert len(records) == 11 and records["broken.png"]["code"] == "image.unknown-format"
    assert records["9.png"]["same_as"] == "0.png" and records["9.png"]["mean"] == records["0.png"]["mean"]
    assert len({record["mean"] for record in records.values() if "mean" in record}) == 9


def test_errors_travel_between_processes():
    error = ImageError("image.tiny", "has only 1 x 1 pixels", subject="a.png", needed=16)
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is ImageError and (str(other), other.details) == (str(error), {"needed": 16})
    assert np.all([getattr(other, name) == getattr(error, name) for name in ("code", "fact", "subject")])


def test_an_audit_on_ray_says_if_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match="ray is not installed"):
        Cluster()
    message = refused("audit", tmp_path, "--key", "my.key", "-o", tmp_path / "r.jsonl", "--engine", "ray")
    assert message == 'Error: engine ray: ray is not installed; install it with: pip install "ringmark[ray]"'


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_cannot_be_reached_is_an_error_at_once(monkeypatch, scheme):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    for name in QUIET | JOINING:
        monkeypatch.setenv(name, "1")  # so that it is not set for other tests
    waiting = SimpleNamespace(is_initialized=lambda: False, init=lambda *_, **__: pytest.fail("Ray would wait"))
    monkeypatch.setitem(sys.modules, "ray", waiting)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    message = (
        f"the Ray cluster at {scheme}127.0.0.1:{port}: cannot be reached (Connection refused); check --ray-address"
    )
    with pytest.raises(EngineError) as caught:
        _connect(f"{scheme}127.0.0.1:{port}")
    assert explained(caught.value).startswith(message) and caught.value.code == "engine.unreachable"
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(EngineError, match=r"at nowhere:6379: cannot be reached \(Name or service not known\)"):
        _connect("nowhere:6379")
