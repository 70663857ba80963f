"""The load on the service: what clients count, and what is reported."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from urllib.parse import urlsplit

import pytest
from serving import MARKED, PLAIN
from test_service_page import served

from ringmark.watermark.service.service import Limits
from scripts.experiments import service as script

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_clients_count_answers_and_refusals() -> None:
    load, requests = script.Load(), map(script.request, [MARKED, PLAIN] * 6)

    async def send(port: int) -> None:
        await asyncio.gather(*(script.client(port, requests, load) for _ in range(8)))

    with served(limits=Limits(waiting=2)) as address:
        port = urlsplit(address).port
        assert port
        asyncio.run(send(port))
        judged = script.judged_by(port)
    assert set(load.statuses) <= {200, 429} and load.statuses.total() == 12 and not load.errors
    assert 0 < load.statuses[200] == len(load.seconds) == judged - 1, "one more than is asked, to warm up"


@linux
def test_memory_and_time_of_a_process() -> None:
    assert script.resident(os.getpid()) > 10 and script.processor_seconds(os.getpid()) > 0


def test_what_is_reported() -> None:
    rows = [script.row("service", 3.0, 6.0), script.row("engine", 4.0, 5.0)] * 2
    loads = [
        script.Load(seconds=[1.0] * 99, statuses=Counter({200: 99}), memory=[(1.0, 100.0), (2.0, 130.0)]),
        script.Load(seconds=[3.0], statuses=Counter({200: 1, 429: 2}), memory=[(1.0, 120.0), (2.0, 110.0)]),
    ]
    found = script.summary(rows, loads)
    assert found["ratio"] == pytest.approx(0.75) and found["ratio by processor time"] == pytest.approx(6 / 5)
    assert found["median seconds"] == 1 and 1 < found["99th percentile seconds"] < 3
    assert found["statuses"] == {"200": 100, "429": 2} and found["errors"] == {}
    assert (found["first MB"], found["last MB"], found["most MB"]) == (100, 110, 130)


@linux
@pytest.mark.slow
def test_a_small_run(experiment, tmp_path) -> None:
    options = ("-n", 2, "--steps", 4, "--clients", 4, "--seconds", 20, "--rounds", 1)
    found = experiment("service", tmp_path, *options)
    assert set(found["statuses"]) <= {"200", "429"} and not found["errors"]
    assert [r["what"] for r in found["rows"]] == ["service", "engine"] and all(r["per second"] for r in found["rows"])
