"""The service without HTTP: pictures in, answers out, within limits; and the work on jobs."""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ringmark.data.batches import chunks
from ringmark.data.images import Sample, from_array, read_samples
from ringmark.errors import ImageError, RingmarkError, ServiceError
from ringmark.watermark.service.access import Access, Caller
from ringmark.watermark.service.answers import Answer, Problem, Refusal, answer
from ringmark.watermark.service.batching import Batcher, Late
from ringmark.watermark.service.fetch import Fetcher
from ringmark.watermark.service.jobs import Jobs, Picture, Webhook
from ringmark.watermark.service.metrics import Metrics

if TYPE_CHECKING:
    from ringmark.watermark.detect.verifier import Verifier

__all__ = ["Limits", "Service"]

LOG = logging.getLogger(__name__)

DECODERS = 2
MARGIN = 0.5  # of the deadline that the pictures before one may take
FORM_BYTES = 1 << 16  # around the pictures of a request
CALLS = 8  # of webhooks at a time
IDLE_SECONDS = 1  # between looks for webhooks that are due, and after a failure


@dataclass(frozen=True)
class Limits:
    """How much is accepted: pictures that wait, pictures of a job and of all jobs, bytes of a picture; and how long
    a request may take to arrive (`body_seconds`) and then to be answered (`deadline`). `batch` pictures are judged
    together.
    """

    waiting: int = 128
    deadline: float = 30.0
    max_bytes: int = 32 << 20
    body_seconds: float = 30.0
    batch: int = 8
    job_pictures: int = 256
    waiting_in_jobs: int = 10_000

    @property
    def max_body(self) -> int:
        """The bytes of a request with one picture."""
        return self.max_bytes + FORM_BYTES

    @property
    def max_job(self) -> int:
        """The bytes of a request with the pictures of a job."""
        return 4 * self.max_bytes + FORM_BYTES


class Service:
    """Judges pictures for callers; `run` is its lifetime.

    Pictures are decoded in a few threads by the reader of files, and judged by a Batcher. Jobs take at most a batch of
    the places at a time, so other requests do not wait for all of a job.
    """

    def __init__(
        self,
        verifier: Verifier,
        *,
        access: Access,
        limits: Limits = Limits(),
        fetcher: Fetcher | None = None,
        jobs: Jobs | None = None,
    ) -> None:
        self.verifier, self.access, self.limits = verifier, access, limits
        self.fetcher, self.jobs, self.metrics = fetcher, jobs, Metrics()
        self.waiting = 0
        self.folder = Path()
        """Where uploads lie while they are decoded."""
        self.batcher: Batcher
        self._decoders = ThreadPoolExecutor(DECODERS, "ringmark-decode")
        self._stopping = asyncio.Event()
        self._work = asyncio.Event()
        self.metrics.watch(lambda: self.waiting, lambda: jobs.count() if jobs else 0)

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Starts the threads and resumes jobs; at the end, finishes the pictures in work."""
        with tempfile.TemporaryDirectory(prefix="ringmark-") as folder:
            self.folder = Path(folder)
            self.batcher = Batcher(self.verifier, self.limits.batch, self.metrics)
            await self._warm_up()
            tasks = [asyncio.create_task(self._judge_jobs(self.jobs))] if self.jobs else []
            if self.jobs and self.fetcher:
                tasks.append(asyncio.create_task(self._call_webhooks(self.jobs, self.fetcher)))
            try:
                yield
            finally:
                self._stopping.set()
                self._work.set()
                await asyncio.gather(*tasks)
                await asyncio.to_thread(self.batcher.close)
                self._decoders.shutdown()
                if self.jobs:
                    self.jobs.close()

    async def _warm_up(self) -> None:
        """Judge a picture of noise, so that the time of the next ones is known."""
        height, width = self.verifier.recoverer.model.image_size
        noise = np.random.default_rng(0).uniform(-1, 1, (3, height, width))
        await asyncio.wrap_future(self.batcher.submit([Sample("noise", from_array(noise))]))

    def charge(self, caller: Caller, pictures: int) -> None:
        """Count pictures against the caller's rate. Raises Refusal."""
        seconds = self.access.wait(caller, pictures)
        if seconds:
            raise Refusal(429, "rate.exceeded", f"more than {caller.per_minute} pictures per minute", seconds)

    def check_room(self) -> None:
        """Raises Refusal if no further picture can wait, or be judged in time."""
        expected = self.waiting * self.batcher.seconds
        if self.waiting >= self.limits.waiting or expected > self.limits.deadline * MARGIN:
            raise Refusal(429, "service.busy", "too many pictures are waiting", expected)

    async def judge(self, path: Path, left: Callable[[], Coroutine[None, None, object]]) -> Answer:
        """The answer for the picture in a file. Raises ImageError, or Refusal if there is no room or no time.

        Once `left()` is done, because the client has left, the rest of the work is skipped.
        """
        self.check_room()
        deadline = time.monotonic() + self.limits.deadline
        self.waiting += 1
        try:
            work = asyncio.ensure_future(self._judged(path, deadline))
            leaving = asyncio.ensure_future(left())
            await asyncio.wait({work, leaving}, timeout=self.limits.deadline, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                raise Refusal(499, "request.left", "the client has left") if leaving.done() else Late
            leaving.cancel()
            return await work
        except Late:
            seconds = self.limits.deadline
            raise Refusal(504, "service.late", f"there was no verdict within {seconds:g} s", seconds) from None
        finally:
            self.waiting -= 1

    async def _judged(self, path: Path, deadline: float = float("inf")) -> Answer:
        judged = await asyncio.wrap_future(self.batcher.submit(await self._decoded(path), deadline))
        found = answer(judged, self.verifier)
        self.metrics.verdicts.labels(found.verdict).inc()
        return found

    async def _decoded(self, path: Path) -> list[Sample]:
        read = partial(read_samples, path, self.verifier.sizes_of, id="picture")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._decoders, read)
        except ImageError as error:
            self.metrics.unreadable.labels(error.code).inc()
            raise

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def has_work(self) -> None:
        """Wake the loop that judges jobs."""
        self._work.set()

    async def _judge_jobs(self, jobs: Jobs) -> None:
        while not self._stopping.is_set():
            try:
                await self._judge_waiting(jobs)
            except Exception:  # of the database, such as a full disk
                LOG.exception("jobs cannot be judged for the moment")
                await self._idle()

    async def _judge_waiting(self, jobs: Jobs) -> None:
        """Judge a batch of the pictures of jobs, or wait for one."""
        self._work.clear()
        pictures = await asyncio.to_thread(jobs.waiting, self.limits.batch)
        if not pictures:
            await self._work.wait()
        await _all(self._judge_one(jobs, picture) for picture in pictures)

    async def _judge_one(self, jobs: Jobs, picture: Picture) -> None:
        try:
            if picture.url is not None:
                await self.fetch(picture.url, jobs.file(picture))
            found: Answer | Problem = await self._judged(jobs.file(picture))
        except RingmarkError as error:
            found = Problem(code=error.code, message=error.fact)
        except Exception:
            LOG.exception("a picture of job %s failed", picture.job)
            found = Problem(code="service.failed", message="the picture could not be judged")
        await asyncio.to_thread(jobs.finish, picture, found)

    async def fetch(self, url: str, path: Path) -> None:
        """Fetch a picture into a file. Raises ServiceError if it cannot be fetched, or if URLs are not allowed."""
        if not self.fetcher:
            raise ServiceError("url.forbidden", "may not be fetched by this service", subject="the URL")
        with open(path, "wb") as file:
            await self.fetcher.fetch(url, file, self.limits.max_bytes)

    async def _call_webhooks(self, jobs: Jobs, fetcher: Fetcher) -> None:
        while not self._stopping.is_set():
            try:
                await self._call_due(jobs, fetcher)
            except Exception:
                LOG.exception("webhooks cannot be called for the moment")
            await self._idle()

    async def _call_due(self, jobs: Jobs, fetcher: Fetcher) -> None:
        """Call the webhooks that are due, a few at a time; once the service stops, the rest wait for the next start."""
        for few in chunks(await asyncio.to_thread(jobs.webhooks), CALLS):
            if self._stopping.is_set():
                return
            await _all(self._call(jobs, fetcher, webhook) for webhook in few)

    async def _idle(self) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), IDLE_SECONDS)

    async def _call(self, jobs: Jobs, fetcher: Fetcher, webhook: Webhook) -> None:
        """Say that a job is done, and no more: whoever has its token can fetch it."""
        try:
            await fetcher.post(webhook.url, json.dumps({"id": webhook.job, "state": "done"}).encode())
            success = True
        except ServiceError as error:
            LOG.warning("the webhook of job %s failed: %s", webhook.job, error.fact)
            success = False
        await asyncio.to_thread(jobs.called, webhook, success=success)


async def _all(work: Iterable[Coroutine[None, None, None]]) -> None:
    """Finish all the work, and then raise the first failure, if any."""
    for failure in await asyncio.gather(*work, return_exceptions=True):
        if failure:
            raise failure
