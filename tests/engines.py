"""A judge and pictures for tests of engines: nothing is loaded, and processes die when they are told to."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ringmark.data.engine import Engine, Finding
from ringmark.data.images import Sample
from ringmark.data.items import Item, items_of
from ringmark.data.results import Results
from ringmark.watermark.tasks.audit import _Run

SETTINGS = {"judge": "mean"}


@dataclass(frozen=True)
class Mean:
    """Finds the mean of the pixels; `deadly` pictures end its process, always or, with a file `once`, the first.

    `seconds` is what it takes for each picture.
    """

    deadly: str = ""
    once: Path | None = None
    seconds: float = 0.0
    other: bool = False

    def settings(self) -> dict:
        return SETTINGS | ({"judge": "another"} if self.other else {})

    def sizes_of(self, picture: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        return (picture, (16, 16))

    def __call__(self, pictures: list[list[Sample]]) -> list[Finding]:
        return [self._find(*views) for views in pictures]

    def _find(self, sample: Sample, small: Sample) -> Finding:
        time.sleep(self.seconds)
        if sample.id == self.deadly and (not self.once or self.once.exists()):
            if self.once:
                self.once.unlink()
            os._exit(1)
        means = {"mean": float(np.mean(sample.image)), "small": float(np.mean(small.image))}
        return {"sample_id": sample.id, "content": sample.content, "present": False} | means, {}


def items(folder: Path, number: int) -> list[Item]:
    """So many pictures of two sizes, the last with the pixels of the first, and a file that is none."""
    names = [f"{i}.png" for i in range(number)] + ["broken.png"]
    if not (folder / "broken.png").exists():
        _draw(folder, number)
    return [_named(next(items_of(str(folder / name))), name) for name in names]


def _draw(folder: Path, number: int) -> None:
    random = np.random.default_rng(0)
    for i in range(number):
        pixels = random.integers(0, 256, (16 + 8 * (i % 2), 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / f"{number - 1}.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "broken.png").write_bytes(b"broken")


def _named(item: Item, name: str) -> Item:
    return Item(id=name, read=partial(_renamed, item, name), size=item.size, mtime_ns=item.mtime_ns)


def _renamed(item: Item, name: str, sizes_of) -> list[Sample]:
    return [Sample(name, view.image, content=view.content, size=view.size) for view in item.read(sizes_of)]


def deadly(item: Item) -> Item:
    """The same item, of which every reader dies."""
    return Item(id=item.id, read=_die, size=item.size, mtime_ns=item.mtime_ns)


def _die(_) -> list[Sample]:
    os._exit(1)


def records_of(engine: Engine, sources: list[Item], results: Path) -> dict[str, dict]:
    """The records of an audit, by the names of the pictures."""
    with Results(results, SETTINGS, fields=["present"]) as store, engine:
        found = [record for record, _ in _Run(engine, store, keep_noise=False).records(sources)]
        assert sorted(record["sample_id"] for record in found) == sorted(item.id for item in sources)
        return dict(store.records)
