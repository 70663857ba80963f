"""Counts, distribution of p and the most telling records of an audit, from a stream of tables of its results.

What is kept does not grow with the number of records.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from ringmark.watermark.evaluation.rates import Array, rate

if TYPE_CHECKING:
    from pandas import DataFrame, Series

__all__ = ["COLUMNS", "LISTED", "OTHERS", "OUTCOMES", "Counts", "Discoveries", "PValues", "Row", "Share", "Tally"]

COLUMNS = (
    *("sample_id", "present", "key", "p_value", "log10_p", "score", "stage", "model", "seconds", "carries"),
    *("notes", "shows", "same_as", "error", "code", "size", "mtime_ns"),
)
"""The fields of a record that a `Tally` reads."""

OUTCOMES = ("present", "absent", "inconclusive", "unreadable")
NAMES = 100_000  # most names counted one by one
OTHERS = "others"
LISTED = 300  # records kept of each kind
NEAR = 1.0  # |log₁₀ p − log₁₀ α| of the records closest to the level
EXAMPLES = 5  # of files with the same error
EPOCH, LAST_DAY = date(1970, 1, 1), 2_900_000  # days of the epoch; dates end with the year 9999

WIDTH, DECADES = 1e-4, 40  # of the bins of log₁₀ p, and how far they reach
BARS = 20  # of the histogram of p
SHARES = (0.01, 0.05, 0.5)


@dataclass(frozen=True)
class Discoveries:
    """The discoveries at a false discovery rate of `level` among `tests` p-values, by Benjamini and Hochberg.

    Those are the `number` images with p ≤ `threshold`, the upper end of a bin (see `PValues`); without any, the
    threshold is None. The procedure on the p-values themselves, without bins, makes at most `most`.
    """

    level: float
    tests: int
    number: int
    threshold: float | None
    most: int


@dataclass(frozen=True)
class Share:
    """How many of the `of` p-values above α are at most `limit`: a share with its exact 95 % `interval`.

    `expected` is (limit − α) / (1 − α), the share if p is uniform.
    """

    limit: float
    number: int
    of: int
    share: float
    interval: tuple[float, float]
    expected: float


class PValues:
    """The distribution of p-values, without the values.

    `fine` counts them in bins of log₁₀ p: bin i holds −(i + 1) w < log₁₀ p ≤ −i w, with w = 1e-4, and the last bin all
    that are smaller. `bars` counts those above α in equal bins of [0, 1], and `at_most` those above α and at most a
    limit.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.fine = np.zeros(round(DECADES / WIDTH), np.int64)
        self.bars = np.zeros(BARS, np.int64)
        self.at_most = {limit: 0 for limit in SHARES if limit > alpha}

    def add(self, log10_p: Array) -> None:
        """Count p-values, given as log₁₀ p (n,), of which none is NaN."""
        bins = np.clip(-log10_p / WIDTH, 0, len(self.fine) - 1).astype(np.int64)
        self.fine += np.bincount(bins, minlength=len(self.fine))
        p = 10 ** log10_p[log10_p > math.log10(self.alpha)]
        self.bars += np.histogram(p, BARS, (0, 1))[0]
        for limit in self.at_most:
            self.at_most[limit] += int((p <= limit).sum())

    @property
    def above(self) -> int:
        """The number of p-values above α."""
        return int(self.bars.sum())

    def shares(self) -> list[Share]:
        """The share of each limit among the p-values above α; none without such p-values."""
        found = []
        for limit, number in self.at_most.items() if self.above else ():
            share, interval = rate(number, self.above)
            expected = (limit - self.alpha) / (1 - self.alpha)
            found.append(Share(limit, number, self.above, share, interval, expected))
        return found

    def cumulative(self) -> tuple[Array, Array]:
        """The upper ends of all bins, decreasing from 1, and how many p-values are at most as large."""
        return 10 ** (-WIDTH * np.arange(len(self.fine))), self.fine[::-1].cumsum()[::-1]

    def discoveries(self, level: float, tests: int) -> Discoveries:
        """The discoveries among `tests` tests, of which those without a p-value here make none.

        With m tests, N(e) p-values of at most e and the level q, the threshold is the largest end e of a bin with
        e ≤ q N(e) / m. No value in a bin above it is a discovery, unless the bin's lower end passes in place of e.
        """
        ends, numbers = self.cumulative()
        allowed = level * numbers / max(tests, 1)
        passing = np.flatnonzero((ends <= allowed) & (numbers > 0))
        possible = np.flatnonzero((np.append(ends[1:], 0.0) < allowed) & (numbers > 0))
        first = int(passing[0]) if len(passing) else None
        return Discoveries(
            level=level,
            tests=tests,
            number=0 if first is None else int(numbers[first]),
            threshold=None if first is None else float(ends[first]),
            most=int(numbers[possible[0]]) if len(possible) else 0,
        )


class Counts:
    """Records by name and outcome. Once there are NAMES names, further ones are counted together as OTHERS."""

    def __init__(self) -> None:
        self._numbers: Counter[tuple[str, str]] = Counter()
        self._names: set[str] = set()

    def add(self, names: Iterable[str], outcomes: Iterable[str]) -> None:
        """Count records, given by their names and outcomes."""
        for (name, outcome), number in Counter(zip(names, outcomes, strict=True)).items():
            known = name in self._names or len(self._names) < NAMES
            if known:
                self._names.add(name)
            self._numbers[name if known else OTHERS, outcome] += number

    def rows(self, most: int | None = None) -> list[dict[str, Any]]:
        """A row for each name, the most frequent first: its number of images, and of each outcome.

        Beyond `most` rows, the last one is the sum of all others.
        """
        rows: dict[str, dict[str, Any]] = {}
        for (name, outcome), number in self._numbers.items():
            row = rows.setdefault(name, {"name": name, "images": 0} | dict.fromkeys(OUTCOMES, 0))
            row[outcome] += number
            row["images"] += number
        ordered = sorted(rows.values(), key=lambda row: (-row["images"], row["name"]))
        if most is None or len(ordered) <= most:
            return ordered
        head, tail = ordered[: most - 1], ordered[most - 1 :]
        total = {name: sum(row[name] for row in tail) for name in ("images", *OUTCOMES)}
        return [*head, {"name": f"{len(tail)} {OTHERS}"} | total]


@dataclass(frozen=True)
class Row:
    """A record of a list; unknown numbers are NaN, unknown text is "", and an unknown `size` (bytes) None."""

    name: str
    outcome: str
    key: str
    log10_p: float
    score: float
    stage: str
    model: str
    notes: list[str]
    error: str
    code: str
    size: int | None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Row:
        """The row of a record whose values may have wrong types."""
        text = {name: value if isinstance(value, str) else "" for name, value in values.items()}
        size = _number(values["size"])
        return cls(
            name=text["sample_id"],
            outcome=_outcome(values["present"], text["error"]),
            key=text["key"],
            log10_p=_number(values["log10_p"]),
            score=_number(values["score"]),
            stage=text["stage"],
            model=text["model"],
            notes=_list(values["notes"]),
            error=text["error"],
            code=text["code"],
            size=int(size) if math.isfinite(size) else None,
        )


class Best:
    """The rows with the smallest ranks, at most LISTED."""

    def __init__(self) -> None:
        self.table: DataFrame | None = None

    def add(self, table: DataFrame, rank: Array) -> None:
        """Consider rows whose rank is not NaN."""
        import pandas as pd

        candidates = table.assign(rank=rank)[~np.isnan(rank)]
        if self.table is not None:
            if len(self.table) == LISTED:
                candidates = candidates[candidates["rank"] < self.table["rank"].iloc[-1]]
            candidates = pd.concat([self.table, candidates]) if len(candidates) else self.table
        if len(candidates):
            self.table = candidates.sort_values("rank", kind="stable")[:LISTED]

    def rows(self) -> list[Row]:
        """The records, the smallest rank first."""
        return [] if self.table is None else [Row.of(row) for row in self.table.to_dict("records")]


@dataclass
class Tally:
    """What a report says about an audit at level `alpha` (see the module).

    `outcomes` counts records by OUTCOMES; `keys`, images by each key that they carry; `codes`, unreadable files by the
    code of the error, with some `examples`. `weeks` are those of the files' modification times, by their Monday.
    `tested` has the p-values of verdicts, `showing` those of images that show something, without copies of others.
    """

    alpha: float
    outcomes: Counter[str] = field(default_factory=Counter)
    keys: Counter[str] = field(default_factory=Counter)
    codes: Counts = field(default_factory=Counts)
    examples: dict[str, list[Row]] = field(default_factory=dict)
    folders: Counts = field(default_factory=Counts)
    models: Counts = field(default_factory=Counts)
    weeks: Counts = field(default_factory=Counts)
    seconds: float = 0.0
    significant: Best = field(default_factory=Best)
    inconclusive: Best = field(default_factory=Best)
    near: Best = field(default_factory=Best)

    def __post_init__(self) -> None:
        self.tested = PValues(self.alpha)
        self.showing = PValues(self.alpha)

    @property
    def images(self) -> int:
        """The number of records."""
        return self.outcomes.total()

    @property
    def judged(self) -> int:
        """The number of records with a verdict."""
        return self.images - self.outcomes["unreadable"]

    def discoveries(self, level: float) -> Discoveries:
        """The discoveries at this false discovery rate; inconclusive images count as tests and are none."""
        return self.tested.discoveries(level, self.judged)

    def add(self, table: DataFrame) -> None:
        """Count a table of records with the COLUMNS. Values of wrong types count as missing."""
        names, log10_p = _texts(table["sample_id"]), _log10_p(table)
        outcome = np.array(list(map(_outcome, _objects(table["present"]), _texts(table["error"]))), object)
        self.outcomes.update(outcome)
        self.keys.update(key for keys in table["carries"][outcome == "present"] for key in _list(keys))
        self.folders.add(map(folder_of, names), outcome)
        self.models.add(_texts(table["model"]), outcome)
        self.weeks.add(_weeks(table["mtime_ns"]), outcome)
        self.seconds += float(np.nansum(_numbers(table["seconds"])))
        self._add_unreadable(table[outcome == "unreadable"])
        self._add_p(table, outcome, log10_p)
        self._keep(table.assign(log10_p=log10_p), outcome, log10_p)

    def _add_unreadable(self, table: DataFrame) -> None:
        self.codes.add(_texts(table["code"]), ["unreadable"] * len(table))
        for row in map(Row.of, table.to_dict("records")):
            if row.code in self.examples or len(self.examples) < LISTED:
                examples = self.examples.setdefault(row.code, [])
                if len(examples) < EXAMPLES:
                    examples.append(row)

    def _add_p(self, table: DataFrame, outcome: Array, log10_p: Array) -> None:
        known = ~np.isnan(log10_p) & (outcome != "unreadable")
        self.tested.add(log10_p[known & (outcome != "inconclusive")])
        shows = np.array([shows is not False for shows in _objects(table["shows"])], bool)
        copied = np.array([name != "" for name in _texts(table["same_as"])], bool)  # one p, many times
        self.showing.add(log10_p[known & shows & ~copied])

    def _keep(self, table: DataFrame, outcome: Array, log10_p: Array) -> None:
        distance = np.abs(log10_p - math.log10(self.alpha))
        is_near = np.isin(outcome, ("present", "absent")) & (distance <= NEAR)
        self.significant.add(table, np.where(outcome == "present", log10_p, np.nan))
        self.inconclusive.add(table, np.where(outcome == "inconclusive", np.nan_to_num(log10_p), np.nan))
        self.near.add(table, np.where(is_near, distance, np.nan))


def folder_of(name: str) -> str:
    """The first folder in a record's name: 'a' for a/b/c.png, '' for c.png, 's3://bucket/a' for s3://bucket/a/b.png."""
    depth = 4 if "://" in name else 2 if name.startswith("/") else 1
    return "/".join(name.split("/")[:-1][:depth])


# -- values of records, which may have any type in JSON lines ---------------------------------------------------------


def _objects(values: Series[Any]) -> list[Any]:
    found: list[Any] = values.astype(object).tolist()
    return found


def _texts(values: Series[Any]) -> list[str]:
    return [value if isinstance(value, str) else "" for value in _objects(values)]


def _numbers(values: Series[Any]) -> Array:
    """The values (n,) as floats, NaN unless they are finite."""
    if values.dtype.kind not in "iuf":
        return np.array([_number(value) for value in values], float)
    numbers = values.to_numpy(float)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _number(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _list(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, (list, np.ndarray)) else []


def _log10_p(table: DataFrame) -> Array:
    """log₁₀ p (n,), from p where a record has only that; NaN if unknown."""
    log10_p, p = _numbers(table["log10_p"]), _numbers(table["p_value"])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.minimum(np.where(np.isnan(log10_p), np.log10(p), log10_p), 0.0)


def _outcome(present: Any, error: str) -> str:
    if error:
        return "unreadable"
    return {True: "present", False: "absent"}[present] if isinstance(present, bool) else "inconclusive"


def _weeks(mtime_ns: Series[Any]) -> list[str]:
    """The Monday of the week of each modification time, in UTC, such as 2026-11-23; "" if it is unknown."""
    days = _numbers(mtime_ns) // 86_400e9
    mondays, places = np.unique(days - (days + 3) % 7, return_inverse=True)
    names = [str(EPOCH + timedelta(monday)) if 0 <= monday < LAST_DAY else "" for monday in mondays]
    return [names[place] for place in places]
