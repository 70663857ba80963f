"""Whether one combination of key, method and statistic is better than another: the paired difference of mean AUCs.

All keys of an evaluation mark the same noises for the same prompts and are compared with the same unmarked images
under the same attacks, so most random variation is common to both AUCs. The interval is that of a bootstrap over
prompts, resampled separately for marked and unmarked images, with the same draws for both ways and for all attacks.
With Ψ (m, n) the share of attacks under which a marked image scores above an unmarked one, a mean AUC is
wᵀ Ψ v / (Σw Σv), where w and v count how often each image was drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from ringmark.watermark.evaluation.rates import GROUPS, Array, Groups, Interval
from ringmark.watermark.schemes.base import published_statistics

__all__ = ["Gain", "Scores", "Way", "compare_ways", "compared_columns", "paired_gain", "resampled", "ways_of"]

SEED = 700_000  # seed of the bootstrap in published measurements


class Way(NamedTuple):
    """A way to detect marks: a key, a decoder inversion and a column of scores.csv."""

    key: str
    method: str
    column: str

    def __str__(self) -> str:
        return ", ".join(self)


class Scores(NamedTuple):
    """Scores of marked (attacks, m) and unmarked images (attacks, n), larger if marked, and the prompts of both."""

    marked: Array
    unmarked: Array
    prompts: Groups

    def in_order(self) -> Array:
        """Ψ (m, n): for each pair the share of attacks under which marked > unmarked; ties count half."""
        order = np.zeros((self.marked.shape[1], self.unmarked.shape[1]))
        for marked, unmarked in zip(self.marked, self.unmarked, strict=True):
            order += (np.greater.outer(marked, unmarked) + 0.5 * np.equal.outer(marked, unmarked)) / len(self.marked)
        return order


@dataclass(frozen=True)
class Gain:
    """The mean AUC of one way (`of`) minus that of another (`over`) on the same images.

    `of_auc` and `over_auc` are means over `attacks`; `gain` is their difference and (`low`, `high`) its 95 % interval.
    The interval is None if there are fewer than GROUPS prompts to resample, or if both ways separate marked from
    unmarked images perfectly, since every draw then has a gain of 0.
    """

    of: Way
    over: Way
    of_auc: float
    over_auc: float
    gain: float
    low: float | None
    high: float | None
    attacks: tuple[str, ...]
    marked: int
    unmarked: int


def compared_columns() -> dict[str, int]:
    """The columns of results that are compared, and the sign that makes each larger for marked images."""
    return {"score": 1} | {s.name: s.sign for s in published_statistics().values() if s.compared}


def compare_ways(images: Sequence[Mapping[str, Any]], attacks: Sequence[str], *, draws: int = 2000) -> list[Gain]:
    """The gain of each way over each earlier one, from the records of an evaluation (the rows of scores.csv).

    Only images that all ways scored under all `attacks` are used. Empty for a single way, and if no marked or no
    unmarked image is left.
    """
    ways = ways_of(images)
    if len({(way.key, way.method) for way in ways}) < 2:
        return []
    tables = [_table(images, way) for way in ways]
    common = _common(tables, attacks)
    if len({image.label for image in common}) < 2:
        return []
    scores = [_scores(table, attacks, common) for table in tables]
    return _all_pairs(ways, scores, tuple(attacks), draws)


def ways_of(images: Iterable[Mapping[str, Any]]) -> list[Way]:
    """The ways that an evaluation compares, in its order; a scheme may lack published statistics."""
    columns = list(compared_columns())
    known = {
        Way(record["key"], record["method"], column): None
        for record in images
        for column in columns
        if record.get(column) is not None
    }
    order = list(dict.fromkeys(way[:2] for way in known))
    return sorted(known, key=lambda way: (order.index(way[:2]), columns.index(way.column)))


def paired_gain(of: Scores, over: Scores, *, draws: int = 2000, seed: int = SEED) -> tuple[float, Interval]:
    """The gain in mean AUC and its 95 % interval by a paired bootstrap over prompts, for scores of the same images."""
    first, second = of.in_order(), over.in_order()
    times = resampled(of.prompts, draws, seed)
    low, high = np.quantile(_weighted(first - second, *times), [0.025, 0.975])
    return float((first - second).mean()), (float(low), float(high))


def resampled(prompts: Groups, draws: int, seed: int) -> tuple[Array, Array]:
    """How often each marked (draws, m) and each unmarked image (draws, n) is drawn.

    A draw samples as many prompts as there are, with replacement, each with all of its images; marked and unmarked
    images are drawn separately.
    """
    kinds = [np.unique(np.array(list(map(str, kind))), return_inverse=True)[1] for kind in prompts]
    numbers = [int(kind.max()) + 1 for kind in kinds]
    rng = np.random.default_rng(seed)
    drawn = [[np.bincount(rng.choice(n, n), minlength=n) for n in numbers] for _ in range(draws)]
    marked, unmarked = (np.array(counts)[:, kind] for counts, kind in zip(zip(*drawn, strict=True), kinds, strict=True))
    return marked, unmarked


def _weighted(in_order: Array, marked: Array, unmarked: Array) -> Array:
    """Means (draws,) of a matrix (m, n) whose rows and columns are weighted by how often they were drawn."""
    totals = ((marked @ in_order) * unmarked).sum(1)
    means: Array = totals / (marked.sum(1) * unmarked.sum(1))
    return means


def _all_pairs(ways: Sequence[Way], scores: Sequence[Scores], attacks: tuple[str, ...], draws: int) -> list[Gain]:
    prompts = scores[0].prompts
    in_order = [way.in_order() for way in scores]
    enough = min(len(set(kind)) for kind in prompts) >= GROUPS
    times = resampled(prompts, draws, SEED) if enough else None
    means = [times and _weighted(matrix, *times) for matrix in in_order]
    gains = []
    for i, j in combinations(range(len(ways)), 2):
        of_auc, over_auc = float(in_order[j].mean()), float(in_order[i].mean())
        separate = of_auc == over_auc == 1
        low, high = (None, None) if separate else _interval(means[j], means[i])
        gains.append(
            Gain(
                of=ways[j],
                over=ways[i],
                of_auc=of_auc,
                over_auc=over_auc,
                gain=of_auc - over_auc,
                low=low,
                high=high,
                attacks=attacks,
                marked=len(prompts[0]),
                unmarked=len(prompts[1]),
            )
        )
    return gains


def _interval(of: Array | None, over: Array | None) -> tuple[float | None, float | None]:
    if of is None or over is None:
        return None, None
    low, high = np.quantile(of - over, [0.025, 0.975])
    return float(low), float(high)


class _Image(NamedTuple):
    """An image of an evaluation; `name`, its path below its folder, is the same for all keys."""

    label: int
    name: str


class _Entry(NamedTuple):
    score: float
    prompt: str


Table = dict[str, dict[_Image, _Entry]]
"""The entry of each image, by attack."""


def _table(images: Iterable[Mapping[str, Any]], way: Way) -> Table:
    """The entries of one way; an image that cannot be tested ranks below all others."""
    sign = compared_columns()[way.column]
    table: Table = {}
    for record in images:
        if (record["key"], record["method"]) == (way.key, way.method):
            image = _Image(record["label"], record["image"].partition("/")[2])
            value = record[way.column]
            entry = _Entry(-np.inf if value is None else sign * value, record["prompt"] or image.name)
            table.setdefault(record["attack"], {})[image] = entry
    return table


def _common(tables: Sequence[Table], attacks: Sequence[str]) -> list[_Image]:
    """The images that every way scored under every attack, with the same prompt, in order."""
    rows = [table.get(attack, {}) for table in tables for attack in attacks]

    def everywhere(image: _Image, prompt: str) -> bool:
        return all(image in row and row[image].prompt == prompt for row in rows)

    return [image for image, entry in rows[0].items() if everywhere(image, entry.prompt)] if rows else []


def _scores(table: Table, attacks: Sequence[str], common: Sequence[_Image]) -> Scores:
    marked, unmarked = ([image for image in common if image.label == label] for label in (1, 0))

    def rows(images: Sequence[_Image]) -> Array:
        return np.array([[table[attack][image].score for image in images] for attack in attacks])

    def prompts(images: Sequence[_Image]) -> list[str]:
        return [table[attacks[0]][image].prompt for image in images]

    return Scores(rows(marked), rows(unmarked), (prompts(marked), prompts(unmarked)))
