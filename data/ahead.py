"""Work done ahead of its consumer, in threads: in order, and no further ahead than is worth holding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Full, Queue
from threading import Event, Thread
from typing import TypeVar

__all__ = ["ahead"]

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = 0.2  # seconds until a waiting thread looks whether it is still wanted


def ahead(function: Callable[[T], R], items: Iterable[T], workers: int, depth: int = 16) -> Iterator[tuple[T, R]]:
    """Each of `items` with `function` of it, in order.

    A thread goes through `items`, and `workers` others call `function`, until `depth` results wait. Pillow, hashing and
    reading release the interpreter, so threads do work beside the consumer. Without workers, everything happens when it
    is asked for. An error of `items` or of `function` is raised in its turn.
    """
    if not workers:
        yield from ((item, function(item)) for item in items)
        return
    ready: Queue[tuple[T, Future[R]] | BaseException | None] = Queue(depth)
    stopped = Event()
    pool = ThreadPoolExecutor(workers)
    Thread(target=_feed, args=(function, items, pool, ready, stopped), daemon=True).start()
    try:
        while (entry := ready.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry[0], entry[1].result()
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _feed(
    function: Callable[[T], R],
    items: Iterable[T],
    pool: ThreadPoolExecutor,
    ready: Queue[tuple[T, Future[R]] | BaseException | None],
    stopped: Event,
) -> None:
    """Put each item and its future, at last None or an error, until `stopped`."""

    def put(entry: tuple[T, Future[R]] | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(entry, timeout=PATIENCE)
            except Full:
                continue

    try:
        for item in items:
            if stopped.is_set():
                return
            put((item, pool.submit(function, item)))
        put(None)
    except BaseException as error:
        put(error)
