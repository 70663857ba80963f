"""The engine that runs on a Ray cluster: pictures are read in tasks and judged in actors that load the model once.

It rests on Ray's tasks and actors, not on Ray Data, because the driver decides what happens to each picture after it
was read and before it is judged: equal pixels are judged once, and batches are those of the local engine, so records
are equal to its records. The driver alone writes them, so every picture has exactly one.

Tasks return what the driver has to know of a block of pictures (digests, errors) apart from the pixels, which go to the
actors and not through the driver. A task whose process dies is repeated. If an actor dies, its groups go to others
while a new one starts, wherever there is room. A picture that has ended `TRIES` processes when it was alone in them is
given up.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from itertools import compress, islice
from operator import attrgetter
from typing import Any, TypeAlias

from ringmark.data.batches import batches, chunks
from ringmark.data.engine import Finding, Judge, ReadItem, kind_of, views_of
from ringmark.data.images import Sample
from ringmark.data.items import Item
from ringmark.data.lines import Record
from ringmark.data.settings import differences
from ringmark.errors import EngineError, ImageError

__all__ = ["Cluster", "Ray"]

LOG = logging.getLogger(__name__)

TRIES = 3
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of results that nobody asks for
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # Ray would print to stdout that processes have ended
}
STAYING = {"RAY_idle_worker_killing_time_threshold_ms": "600000"}
"""A second by default, in which readers wait for their next block; a new process takes half a second to start."""
JOINING = {"RAY_NUM_REDIS_GET_RETRIES": "1"}  # of 40 seconds; by default Ray tries for a quarter of an hour
QUEUED = 2  # groups that an actor holds: one in work, and the next
PATIENCE = 30.0  # seconds until it is seen whether Ray still runs here, where it would be waited for without end
ANSWER = 10.0  # seconds in which a cluster has to accept a connection
SIZES = 4096  # of pictures, remembered

Size = tuple[int, int]
Seen: TypeAlias = "tuple[str, Hashable] | ImageError | _Unknown"
"""What a task says of a picture: the digest of its pixels and its kind, or why there is none."""
Row = tuple[Any, int]
"""Where the views of a picture are: the reference to a block of pictures, and the number in it."""


@dataclass(frozen=True)
class Cluster:
    """Where to run: the `address` of a cluster, "auto" for that of this machine, or None for one that is started here.

    There is an actor for each GPU, unless `gpus` is False; without GPUs, one for every `cores` CPU cores, with as many
    threads. Raises EngineError, engine.not-installed, unless Ray is installed.
    """

    address: str | None = None
    cores: int = 1
    gpus: bool = True

    def __post_init__(self) -> None:
        if find_spec("ray") is None:
            raise EngineError("engine.not-installed", "ray is not installed", subject="engine ray")


class Ray:
    """Reads in `workers` tasks for each actor, and judges in actors, for which `remake` makes their judge.

    Raises EngineError, on entry: engine.unreachable for a cluster that cannot be joined, engine.no-cores for one with
    fewer cores than an actor needs; later: engine.settings if the judge of an actor has other settings than this one,
    engine.crash if actors die before they have loaded theirs, engine.lost if this machine's part of Ray has ended.
    """

    def __init__(
        self, judge: Judge, remake: Callable[[], Judge], *, cluster: Cluster, batch: int, workers: int
    ) -> None:
        self._judge, self._remake, self._cluster = judge, remake, cluster
        self._batch, self._workers = batch, max(1, workers)
        self._sizes: dict[Size, Sequence[Size]] = {}
        self._crashes = 0
        self._actors: list[_Actor] = []

    def __enter__(self) -> Ray:
        self._owned = _connect(self._cluster.address)
        import ray
        from ray import exceptions as errors

        self._ray = ray
        self._died = errors.WorkerCrashedError, errors.RayActorError, errors.OutOfMemoryError, errors.NodeDiedError
        # Actors fill the cluster, so tasks ask for no cores; without spreading they would all run on one node.
        self._reader = ray.remote(num_cpus=0, num_returns=2, scheduling_strategy="SPREAD")(_read)
        try:
            self._number = self._room()
        except EngineError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor.handle)
        if self._owned:
            self._ray.shutdown()

    def _room(self) -> int:
        """For how many actors there is room."""
        there = self._ray.cluster_resources()
        self._gpus = int(there.get("GPU", 0)) if self._cluster.gpus else 0
        number = self._gpus or int(there.get("CPU", 0)) // self._cluster.cores
        if not number:
            fact = f"has {int(there.get('CPU', 0))} cores, and each process needs {self._cluster.cores}"
            raise EngineError("engine.no-cores", fact, subject="the Ray cluster")
        return number

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, items: Iterable[Item], skip: Callable[[Item], bool]) -> Iterator[ReadItem]:
        """Each item as it was read, block by block, those that are skipped first."""
        blocks, window = chunks(items, self._batch), deque[tuple[list[Item], _Block | None]]()
        while True:
            for block in islice(blocks, self._workers * self._number - len(window)):
                skips = list(map(skip, block))
                todo = [item for item, skipped in zip(block, skips, strict=True) if not skipped]
                window.append((list(compress(block, skips)), self._submit(todo) if todo else None))
            if not window:
                return
            skipped, read = window.popleft()
            yield from (ReadItem(item, skipped=True) for item in skipped)
            if read:
                yield from self._pictures(read)

    def _submit(self, items: list[Item]) -> _Block:
        # A block that has ended two processes is read one by one, and a picture is given up after TRIES.
        reader = self._reader.options(max_retries=1 if len(items) > 1 else TRIES - 1)
        return _Block(items, *reader.remote(items, self._sizes, os.getcwd()))

    def _pictures(self, block: _Block) -> Iterator[ReadItem]:
        """The pictures of a block, which is read again if that needs other sizes or, one by one, if it crashed."""
        try:
            seen: list[Seen] = self._get(block.seen)
        except self._died:
            if len(block.items) == 1:
                yield ReadItem(block.items[0], error=_crash(block.items[0], "read"))
                return
            for item in block.items:
                yield from self._pictures(self._submit([item]))
            return
        if unknown := {each.size for each in seen if isinstance(each, _Unknown)}:
            self._learn(unknown)
            yield from self._pictures(self._submit(block.items))
            return
        for row, (item, each) in enumerate(zip(block.items, seen, strict=True)):
            if isinstance(each, ImageError):
                yield ReadItem(item, error=each)
            elif isinstance(each, tuple):
                yield ReadItem(item, content=each[0], kind=each[1], views=(block.views, row))

    def _learn(self, unknown: set[Size]) -> None:
        """Find out at which sizes pictures of these sizes are tried; forget the oldest of too many."""
        for size in list(self._sizes)[: max(0, len(self._sizes) - SIZES)]:
            del self._sizes[size]
        self._sizes |= {size: self._judge.sizes_of(size) for size in unknown}

    # -- judging ------------------------------------------------------------------------------------------------------

    def judge(self, pictures: Iterable[ReadItem | None]) -> Iterator[list[tuple[ReadItem, Finding | ImageError]]]:
        """What is found in each picture, in groups as they are finished; at None an empty group."""
        groups = map(_Group.of, batches(pictures, attrgetter("kind"), self._batch))
        again = deque[_Group]()
        for first in groups:
            if first.pictures:
                again.append(first)
                break
            yield []
        else:
            return  # and no model is loaded
        self._actors = [self._new_actor() for _ in range(self._number)]
        while True:
            for length in range(QUEUED):
                for actor in self._actors:
                    yield from self._fill(actor, length, again, groups)
            waiting = {actor.awaited: actor for actor in self._actors if actor.awaited is not None}
            if len(waiting) < self._number and not any(actor.queue for actor in self._actors):
                return  # one has nothing to do, the others have only started
            yield from self._finish(waiting[self._first(list(waiting))], again)

    def _fill(
        self, actor: _Actor, length: int, again: deque[_Group], groups: Iterator[_Group]
    ) -> Iterator[list[tuple[ReadItem, Finding | ImageError]]]:
        """Give an actor that has started and holds so many groups the next one."""
        while actor.starting is None and len(actor.queue) == length:
            group = again.popleft() if again else next(groups, None)
            if group is None:
                return
            if group.pictures:
                actor.queue.append((self._send(actor, group), group))
            else:
                yield []

    def _send(self, actor: _Actor, group: _Group) -> Any:
        blocks = list(dict.fromkeys(picture.views[0] for picture in group.pictures))
        rows = [(blocks.index(block), row) for block, row in (picture.views for picture in group.pictures)]
        return actor.handle.find.remote(rows, *blocks)

    def _finish(self, actor: _Actor, again: deque[_Group]) -> Iterator[list[tuple[ReadItem, Finding | ImageError]]]:
        """What an actor has finished: its start, a group, or itself."""
        try:
            found = self._get(actor.awaited)
        except self._died:
            yield from self._replace(actor, again)
            return
        self._crashes = 0
        if actor.starting is not None:
            actor.starting = None
            if changed := differences(self._judge.settings(), found):
                fact = f"would use other settings ({'; '.join(changed)})"
                raise EngineError("engine.settings", fact, subject="a process of the Ray cluster")
            return
        _, group = actor.queue.popleft()
        yield list(zip(group.pictures, found, strict=True))

    def _replace(self, actor: _Actor, again: deque[_Group]) -> Iterator[list[tuple[ReadItem, Finding | ImageError]]]:
        """Start another actor for one that has died; of its groups only that in work can be the reason."""
        LOG.info("a process that tests pictures has ended; another one is started")
        if actor.starting is not None:
            self._crashes += 1
            if self._crashes >= TRIES * self._number:
                fact = "end before they have loaded the model"
                raise EngineError("engine.crash", fact, subject="the processes of the Ray cluster")
        self._actors[self._actors.index(actor)] = self._new_actor()
        first, *others = [group for _, group in actor.queue] or [_Group([])]
        first.tries += 1
        again.extendleft(reversed(others))
        if first.tries < TRIES:
            again.extend([first] if first.pictures else [])
        elif len(first.pictures) > 1:
            again.extend(_Group([picture]) for picture in first.pictures)
        else:
            yield [(picture, _crash(picture.item, "test")) for picture in first.pictures]

    def _new_actor(self) -> _Actor:
        kind = self._ray.remote(num_cpus=self._cluster.cores, num_gpus=1 if self._gpus else 0)(_Tester)
        handle = kind.remote(self._remake, os.getcwd())
        return _Actor(handle, starting=handle.settings.remote())

    def _first(self, references: list[Any]) -> Any:
        """The first of the references that has a value. Raises EngineError if this machine's part of Ray has ended."""
        while True:
            ready, _ = self._ray.wait(references, timeout=PATIENCE)
            if ready:
                return ready[0]
            here = self._ray.get_runtime_context().get_node_id()
            if not any(node["Alive"] for node in self._ray.nodes() if node["NodeID"] == here):
                raise EngineError("engine.lost", "has ended on this machine", subject="Ray")

    def _get(self, reference: Any) -> Any:
        """The value of a reference; an error that a task has raised is raised here as it was there."""
        try:
            return self._ray.get(self._first([reference]))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._died:
            raise
        except self._ray.exceptions.RayError as error:
            raise EngineError("engine.lost", f"has ended ({type(error).__name__})", subject="Ray") from error


@dataclass(frozen=True)
class _Block:
    """Items that are read in one task, and the references to what it returns."""

    items: list[Item]
    seen: Any
    views: Any


@dataclass(eq=False)
class _Group:
    """Pictures that are judged together, and how many processes have died over them."""

    pictures: list[ReadItem]
    tries: int = 0

    @classmethod
    def of(cls, numbered: list[tuple[int, ReadItem]]) -> _Group:
        return cls([picture for _, picture in numbered])


@dataclass(eq=False)
class _Actor:
    """The handle of an actor, the reference that its start waits for, and its groups, the one in work first."""

    handle: Any
    starting: Any = None
    queue: deque[tuple[Any, _Group]] = field(default_factory=deque)

    @property
    def awaited(self) -> Any:
        """The reference to what it does now, if anything."""
        if self.starting is not None:
            return self.starting
        return self.queue[0][0] if self.queue else None


def _crash(item: Item, what: str) -> ImageError:
    return ImageError("image.crash", f"crashes every process that tries to {what} it", subject=item.id)


def _connect(address: str | None) -> bool:
    """Join a cluster or start one, unless this process has done so; whether it was done here. Raises EngineError."""
    for name, value in (QUIET | (JOINING if address else STAYING)).items():  # which Ray reads when it is imported
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return False
    local = {"include_dashboard": False} if address is None else {}
    try:
        if address:
            _reach(address)
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except Exception as error:  # Ray raises bare ones
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        where = f"the Ray cluster at {address}" if address else "Ray"
        fact = f"cannot be reached ({reason.splitlines()[0]})"
        raise EngineError("engine.unreachable", fact, subject=where) from error
    return True


def _reach(address: str) -> None:
    """Connect once to HOST:PORT, since Ray takes most of a minute to see that nothing listens. Raises OSError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()


# -- in the processes of the cluster ----------------------------------------------------------------------------------


def _read(
    items: list[Item], sizes: Mapping[Size, Sequence[Size]], folder: str
) -> tuple[list[Seen], list[list[Sample]]]:
    """What is to be known of each item, and its views, which are empty if there are none."""
    _enter(folder)
    seen: list[Seen] = []
    views: list[list[Sample]] = []

    def known(size: Size) -> Sequence[Size]:
        if size not in sizes:
            raise _Unknown(size)
        return sizes[size]

    for item in items:
        try:
            read = views_of(known, item)
        except _Unknown as unknown:
            seen.append(unknown)
            views.append([])
            continue
        seen.append(read if isinstance(read, ImageError) else (read[0].content, kind_of(read)))
        views.append([] if isinstance(read, ImageError) else read)
    return seen, views


class _Unknown(Exception):
    """A picture has a size that the task has not been told about."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.size = size


class _Tester:
    """An actor: a judge, which is made when it is first needed."""

    def __init__(self, remake: Callable[[], Judge], folder: str) -> None:
        self._remake, self._folder = remake, folder

    @cached_property
    def _judge(self) -> Judge:
        _enter(self._folder)
        judge = self._remake()
        gc.freeze()  # a model and its libraries are half a million objects that are no garbage
        return judge

    def settings(self) -> Record:
        return self._judge.settings()

    def find(self, rows: list[tuple[int, int]], *blocks: list[list[Sample]]) -> list[Finding]:
        """What is found in the pictures of these rows (block, number in it)."""
        return self._judge([blocks[block][row] for block, row in rows])


def _enter(folder: str) -> None:
    """Make relative paths mean here what they mean in the driver's folder, if this machine has it."""
    with suppress(OSError):
        os.chdir(folder)
