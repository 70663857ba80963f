"""Engines: where pictures are read and judged. `Local` does both in this process, `ray_engine` on a cluster.

An engine is a pipe that is pulled from its end: `judge` asks for pictures, those come from `read`, and that asks for
items. Between the two the caller drops what need not be judged; an empty group gives it its turn. Nothing is read much
further ahead than it is judged, so memory does not depend on the number of items. An engine keeps no records: the
caller writes down what is found, and what an interrupted run had in work is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ringmark.data.ahead import ahead
from ringmark.data.batches import finished
from ringmark.data.images import Sample, SizesOf
from ringmark.data.items import Item
from ringmark.data.lines import Record
from ringmark.data.tensor_files import Tensors
from ringmark.errors import ImageError

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Engine", "Finding", "Judge", "Local", "ReadItem", "kind_of", "views_of"]

T = TypeVar("T")

Finding = tuple[Record, Tensors]
"""The record on a picture, and tensors to keep with it."""


class Judge(Protocol):
    """What finds something in pictures; its findings depend on its settings."""

    def settings(self) -> Record: ...

    def sizes_of(self, picture: tuple[int, int], /) -> Sequence[tuple[int, int]]:
        """The sizes (H, W) to which a picture of this size is fitted."""

    def __call__(self, pictures: list[list[Sample]], /) -> list[Finding]:
        """What is found in each picture, which is given at its sizes."""


@dataclass(frozen=True)
class ReadItem:
    """An item that has been read: a digest of its pixels, or the error, or nothing if it was skipped.

    Pictures of one `kind` can share a batch. `views` are the engine's own.
    """

    item: Item
    content: str = ""
    kind: Hashable = None
    error: ImageError | None = None
    skipped: bool = False
    views: Any = None


class Engine(Protocol):
    """Reads and judges pictures, to be used in a `with` block."""

    def read(self, items: Iterable[Item], skip: Callable[[Item], bool], /) -> Iterator[ReadItem]:
        """Each item as it was read; those that need not be read are skipped."""

    def judge(self, pictures: Iterable[ReadItem | None], /) -> Iterator[list[tuple[ReadItem, Finding | ImageError]]]:
        """What is found in each picture that was read, in groups as they are finished; at None an empty group."""

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


class Local:
    """Reads in `workers` threads beside the computation, at most two batches ahead; see `ahead`."""

    def __init__(self, judge: Judge, *, batch: int, workers: int) -> None:
        self._judge, self._batch, self._workers = judge, batch, workers

    def read(self, items: Iterable[Item], skip: Callable[[Item], bool]) -> Iterator[ReadItem]:
        def attempt(item: Item) -> list[Sample] | ImageError | None:
            return None if skip(item) else views_of(self._judge.sizes_of, item)

        for item, views in ahead(attempt, items, self._workers, 2 * self._batch):
            if views is None:
                yield ReadItem(item, skipped=True)
            elif isinstance(views, ImageError):
                yield ReadItem(item, error=views)
            else:
                yield ReadItem(item, content=views[0].content, kind=kind_of(views), views=views)

    def judge(self, pictures: Iterable[ReadItem | None]) -> Iterator[list[tuple[ReadItem, Finding | ImageError]]]:
        def found(group: list[ReadItem]) -> list[tuple[ReadItem, Finding | ImageError]]:
            return list(zip(group, self._judge([picture.views for picture in group]), strict=True))

        return finished(pictures, attrgetter("kind"), found, self._batch)

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def views_of(sizes_of: SizesOf, item: Item) -> list[Sample] | ImageError:
    """The picture at its sizes, or the error that prevents that."""
    try:
        return item.read(sizes_of)
    except ImageError as error:
        return error


def kind_of(views: list[Sample]) -> Hashable:
    """What pictures that share a batch have in common: their sizes' number, and the first of them."""
    return views[0].image.size, len(views)
