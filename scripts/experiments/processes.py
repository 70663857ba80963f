"""Work in new processes; memory and processor time of a process and all below it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

import psutil

Result = TypeVar("Result")


class Processors:
    """Processor time of this process and all below it; of those that have ended, what was last seen of it."""

    def __init__(self) -> None:
        self._seconds: dict[psutil.Process, float] = {}

    def seconds(self) -> float:
        """The time until now, of which each process keeps its own."""
        for process in family():
            with suppress(psutil.Error):
                self._seconds[process] = sum(process.cpu_times()[:2])
        return sum(list(self._seconds.values()))


def family() -> list[psutil.Process]:
    """This process and all below it."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def alone(work: Callable[..., Result], *arguments: object) -> Result:
    """What the function returns in a new process, which has imported nothing yet."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def memory(group_of: Callable[[str], str]) -> Counter[str]:
    """Resident megabytes of this process ("driver"), of the groups of processes below it, by name, and of "all".

    Pages that processes share are divided among them (PSS), where the system says so.
    """
    found: Counter[str] = Counter()
    for process in family():
        with suppress(psutil.Error):
            used = process.memory_full_info()
            group = "driver" if process.pid == os.getpid() else group_of(process.name())
            found.update({name: getattr(used, "pss", used.rss) / 2**20 for name in (group, "all")})
    return found


@contextmanager
def sampled(sample: Callable[[], Result], every: float) -> Iterator[list[Result]]:
    """A sample, and more of them while the block runs, in a thread, with so many seconds between two."""
    samples = [sample()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(every):
            samples.append(sample())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield samples
    finally:
        done.set()
        watcher.join()
