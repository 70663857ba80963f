"""Pictures of many requests are judged together, in one thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ringmark.watermark.service.batching import Batcher, Late
from ringmark.watermark.service.metrics import Metrics


class Counting:
    """A verifier that hands back what it is given, and remembers how; `gate` holds it up."""

    def __init__(self, broken: tuple[str, ...] = ()) -> None:
        self.groups: list[list[str]] = []
        self.threads: set[str] = set()
        self.gate, self.broken = threading.Event(), broken

    def scan(self, pictures: list[Any], batch: int) -> Iterator[str]:
        self.gate.wait()
        self.groups.append([views[0] for views in pictures])
        self.threads.add(threading.current_thread().name)
        for views in pictures:
            if views[0] in self.broken:
                raise RuntimeError(views[0])
            yield f"judged {views[0]}"


@pytest.fixture
def verifier() -> Counting:
    return Counting()


def test_waiting_pictures_are_judged_together_and_in_order(verifier: Counting) -> None:
    batcher = Batcher(verifier, 3, Metrics())  # type: ignore[arg-type]
    first = batcher.submit(["a"])
    while not first.running():
        time.sleep(0.001)
    rest = [batcher.submit([name]) for name in "bcdef"]
    verifier.gate.set()
    assert [future.result() for future in [first, *rest]] == [f"judged {name}" for name in "abcdef"]
    assert verifier.groups == [["a"], ["b", "c", "d"], ["e", "f"]]
    assert len(verifier.threads) == 1
    batcher.close()


def test_what_nobody_waits_for_is_skipped(verifier: Counting) -> None:
    batcher = Batcher(verifier, 8, Metrics())  # type: ignore[arg-type]
    first = batcher.submit(["a"])
    while not first.running():
        time.sleep(0.001)
    gone, late, kept = batcher.submit(["b"]), batcher.submit(["c"], deadline=0.0), batcher.submit(["d"])
    assert gone.cancel()
    verifier.gate.set()
    assert kept.result() == "judged d"
    with pytest.raises(Late):
        late.result()
    assert verifier.groups == [["a"], ["d"]]
    batcher.close()


def test_one_picture_does_not_spoil_the_others() -> None:
    verifier = Counting(broken=("b",))
    batcher = Batcher(verifier, 3, Metrics())  # type: ignore[arg-type]
    first = batcher.submit(["x"])
    while not first.running():
        time.sleep(0.001)
    futures = [batcher.submit([name]) for name in "abc"]
    verifier.gate.set()
    assert futures[0].result() == "judged a" and futures[2].result() == "judged c"
    with pytest.raises(RuntimeError):
        futures[1].result()
    batcher.close()


def test_what_was_submitted_is_judged_before_the_end(verifier: Counting) -> None:
    batcher = Batcher(verifier, 2, Metrics())  # type: ignore[arg-type]
    futures = [batcher.submit([name]) for name in "abcde"]
    verifier.gate.set()
    batcher.close()
    assert [future.result(0) for future in futures] == [f"judged {name}" for name in "abcde"]
