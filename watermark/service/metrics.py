"""What Prometheus is told. Nothing here depends on a p-value or names a picture."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters and histograms of one service."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        PlatformCollector(registry)
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "ringmark_requests", "Requests by route and status.", ["method", "route", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "ringmark_request_seconds", "Time to answer.", ["route"], buckets=SECONDS, registry=registry
        )
        self.verdicts = Counter("ringmark_verdicts", "Pictures judged, by verdict.", ["verdict"], registry=registry)
        self.unreadable = Counter("ringmark_unreadable", "Pictures not read, by error.", ["code"], registry=registry)
        self.batch_pictures = Histogram(
            "ringmark_batch_pictures", "Pictures judged together.", buckets=BATCHES, registry=registry
        )
        self.batch_seconds = Histogram(
            "ringmark_batch_seconds", "Time to judge a batch.", buckets=SECONDS, registry=registry
        )
        self.waiting = Gauge("ringmark_pictures_waiting", "Pictures read or queued.", registry=registry)
        self.job_pictures = Gauge("ringmark_job_pictures_waiting", "Pictures of jobs not judged.", registry=registry)

    def watch(self, waiting: Callable[[], float], job_pictures: Callable[[], float]) -> None:
        """Ask these for the numbers of waiting pictures."""
        self.waiting.set_function(waiting)
        self.job_pictures.set_function(job_pictures)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
