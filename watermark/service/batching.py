"""One thread that owns the model and judges the pictures of all requests in batches."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

from ringmark.watermark.service.metrics import Metrics

if TYPE_CHECKING:
    from ringmark.data.images import Sample
    from ringmark.watermark.detect.verdict import Judged
    from ringmark.watermark.detect.verifier import Verifier

__all__ = ["Batcher", "Late"]

LOG = logging.getLogger(__name__)

WAIT_SECONDS = 0.005
MEMORY = 0.7  # of the mean time per picture, per batch


class Late(Exception):
    """A picture's deadline passed before its turn came."""


class _Waiting(NamedTuple):
    views: Sequence[Sample]
    deadline: float
    judged: Future[Judged]


class Batcher:
    """Judges pictures in batches of at most `batch`, in the order in which they come.

    A batch starts as soon as it is full, or WAIT_SECONDS after its first picture. Pictures whose future has been
    cancelled or whose deadline has passed are skipped. If a batch fails, its pictures are judged one by one, so that
    one picture cannot spoil the others.
    """

    def __init__(self, verifier: Verifier, batch: int, metrics: Metrics) -> None:
        self.verifier, self.batch, self.metrics = verifier, batch, metrics
        self.seconds = 0.0
        """The recent mean time per picture."""
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ringmark-judge", daemon=True)
        self._thread.start()

    def submit(self, views: Sequence[Sample], deadline: float = float("inf")) -> Future[Judged]:
        """Judge a picture, given at its sizes. The future raises Late past `deadline`, on the monotonic clock."""
        judged: Future[Judged] = Future()
        self._queue.put(_Waiting(views=views, deadline=deadline, judged=judged))
        return judged

    def close(self) -> None:
        """Judge what has been submitted, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        running = True
        while running:
            group, running = self._gather()
            wanted = [each for each in group if _is_wanted(each)]
            if wanted:
                started = time.monotonic()
                self._judge(wanted)
                self._measure(len(wanted), time.monotonic() - started)

    def _gather(self) -> tuple[list[_Waiting], bool]:
        """The next batch, and whether more may come."""
        group: list[_Waiting] = []
        first = self._queue.get()
        until = time.monotonic() + WAIT_SECONDS
        while first is not None:
            group.append(first)
            if len(group) == self.batch:
                return group, True
            try:
                first = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return group, True
        return group, False

    def _judge(self, group: list[_Waiting]) -> None:
        try:
            judged = list(self.verifier.scan([each.views for each in group], len(group)))
        except Exception as error:
            if len(group) == 1:
                LOG.exception("a picture cannot be judged")
                group[0].judged.set_exception(error)
                return
            for each in group:
                self._judge([each])
            return
        for each, found in zip(group, judged, strict=True):
            each.judged.set_result(found)

    def _measure(self, number: int, seconds: float) -> None:
        self.metrics.batch_pictures.observe(number)
        self.metrics.batch_seconds.observe(seconds)
        recent = self.seconds or seconds / number
        self.seconds = MEMORY * recent + (1 - MEMORY) * seconds / number


def _is_wanted(waiting: _Waiting) -> bool:
    """Whether someone still waits for a picture; from then on its future cannot be cancelled."""
    if not waiting.judged.set_running_or_notify_cancel():
        return False
    if time.monotonic() > waiting.deadline:
        waiting.judged.set_exception(Late())
        return False
    return True
