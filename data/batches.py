"""Batches of like items, also where kinds alternate."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import chain, islice
from typing import TypeVar

__all__ = ["batched", "batches", "chunks", "finished", "grouped"]

HELD = 4  # batches of items that are held until those before them are done

T = TypeVar("T")
R = TypeVar("R")


def chunks(items: Iterable[T], number: int) -> Iterator[list[T]]:
    """Lists of at most this number of items, in order."""
    items = iter(items)
    while group := list(islice(items, number)):
        yield group


def grouped(members: Iterable[T], labels: Iterable[Hashable]) -> list[list[T]]:
    """The members in groups of equal labels, in the order in which they come."""
    groups: dict[Hashable, list[T]] = {}
    for member, label in zip(members, labels, strict=True):
        groups.setdefault(label, []).append(member)
    return list(groups.values())


def batches(items: Iterable[T | None], label: Callable[[T], Hashable], batch: int) -> Iterator[list[tuple[int, T]]]:
    """Numbered items in lists of equal label, of `batch` items or fewer; at None an empty list.

    An item waits until there are enough others with its label. To bound what is held, a batch is cut short when its
    first item is HELD batches old.
    """
    waiting: dict[Hashable, list[tuple[int, T]]] = {}  # the oldest item is in the first list
    number = 0
    for item in items:
        if item is None:
            yield []
            continue
        group = waiting.setdefault(label(item), [])
        group.append((number, item))
        if len(group) == batch:
            yield waiting.pop(label(item))
        number += 1
        if waiting and number - next(iter(waiting.values()))[0][0] == HELD * batch:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()


def finished(
    items: Iterable[T | None], label: Callable[[T], Hashable], work: Callable[[list[T]], list[R]], batch: int
) -> Iterator[list[R]]:
    """After each of the `batches`, the results of `work` that come next in the order of the items; they may be none."""
    ready: dict[int, R] = {}
    given = 0
    for group in batches(items, label, batch):
        if group:
            numbers, members = zip(*group, strict=True)
            ready.update(zip(numbers, work(list(members)), strict=True))
        last = given
        while last in ready:
            last += 1
        yield [ready.pop(number) for number in range(given, last)]
        given = last


def batched(
    items: Iterable[T], label: Callable[[T], Hashable], work: Callable[[list[T]], list[R]], batch: int
) -> Iterator[R]:
    """The results of `work` on `batches` of the items, in the order of the items."""
    return chain.from_iterable(finished(items, label, work, batch))
