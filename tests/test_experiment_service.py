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


@linux
def test_clients_count_answers_and_refusals() -> None:
    with served(limits=Limits(waiting=2)) as address:
        port = urlsplit(address).port
        assert port
        load = asyncio.run(script.loaded(os.getpid(), port, [MARKED, PLAIN], clients=8, seconds=0.4))
    assert set(load.statuses) == {200, 429} and not load.errors
    assert load.statuses[200] == len(load.seconds) > 0
    assert load.memory[0][1] > 10 and load.memory[-1][0] >= 0.4


def test_what_is_reported() -> None:
    rows = [script.row("service", 30, 10.0, 5.0), script.row("engine", 40, 10.0, 8.0)] * 2
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
    assert [r["what"] for r in found["rows"]] == ["service", "engine"] and all(r["pictures"] for r in found["rows"])
