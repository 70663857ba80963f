"""Verdicts: whether an image carries a key, with p-value and score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from ringmark.data.images import Sample

__all__ = ["LISTED", "OUTCOMES", "Judged", "Tried", "Verdict", "Verdicts", "p_text"]

OUTCOMES = (True, None, False)
"""The values of `Verdict.present` in the order in which verdicts rank."""
LISTED = 100
"""The most keys that a record lists one by one."""

TINIEST = 1e-300
"""Smaller p-values are printed as a bound, because floats end near 1e-308."""


def p_text(p: float) -> str:
    """'p = 2e-09', or the bound 'p < 1e-300' for smaller p-values."""
    return f"p = {p:.2g}" if p >= TINIEST else f"p < {TINIEST:g}"


@dataclass(frozen=True)
class Verdict:
    """The outcome of testing one image for one key.

    `present` is None if the result is inconclusive; `notes` then say why. `p_value` is corrected for the number of keys
    and of tests; `log10_p` is its logarithm, which is exact even where the p-value underflows. `score` is the score of
    the key's scheme, `statistics` are the published ones by name. `residual` is the pixel RMS error of the decoder
    inversion in grey levels, `seconds` the time per image. If the image shows nothing, because it is one flat colour
    for example, `shows` is False and p is 1. `by_search` is True if the search found the key; the score is then the
    largest of many. `calibration` is the fingerprint of the calibration used, if any; `conformal_p` is then the p-value
    by rank among its unmarked images, corrected like `p_value`. `stages` are the p-values of the stages
    that the image went through (see `detect.cascade`), by name; the verdict rests on the smallest, or on the search.
    """

    sample_id: str
    key: str
    present: bool | None
    p_value: float
    log10_p: float
    score: float
    statistics: dict[str, float]
    residual: float | None
    status: str
    seconds: float
    conformal_p: float | None = None
    calibration: str | None = None
    notes: tuple[str, ...] = field(default=())
    by_search: bool = False
    shows: bool = True
    stages: dict[str, float] = field(default_factory=dict)

    def rank(self) -> tuple[int, float, float]:
        """Orders verdicts on one image: present keys first, then inconclusive ones, and smaller p first."""
        return (OUTCOMES.index(self.present), self.log10_p, -self.score)

    def record(self) -> dict[str, Any]:
        """The verdict as plain values for JSON, with each statistic under its own name."""
        values = {**vars(self), "stages": dict(self.stages)}  # asdict copies deeply, which takes ten times as long
        statistics: dict[str, float] = values.pop("statistics")
        return values | statistics | {"notes": list(self.notes)}

    def by_stage(self) -> str:
        """'latents: p = 1, 3 steps: p = 0.02, full: p = 2e-09'; "" without early stages."""
        early = self.stages.keys() - {"full"}
        return ", ".join(f"{name}: {p_text(p)}" for name, p in self.stages.items()) if early else ""

    def sentence(self) -> str:
        """'carries key 3f9a2b10, p = 2e-09; resized 512x512 -> 128x128'."""
        outcome = {True: "carries", False: "does not carry", None: "inconclusive for"}[self.present]
        return "; ".join([f"{outcome} key {self.key[:8]}, {p_text(self.p_value)}", *self.notes])


class Verdicts(Sequence[Verdict]):
    """The verdicts on one image, one per key (K,), each built by `build(k)` when it is first asked for.

    What they rank by is kept for all keys: `outcome`, the index of `present` in OUTCOMES, `log10_p` and `score`. If it
    is known, so are `stages`, log₁₀ p (K,) by stage, the computing time of all stages, and whether the image `shows`
    anything; a verdict that is built holds for all `stages`, under this calibration.
    """

    def __init__(
        self,
        outcome: NDArray[np.int8],
        log10_p: NDArray[np.float64],
        score: NDArray[np.float64],
        build: Callable[[int], Verdict],
        *,
        stages: Mapping[str, NDArray[np.float64]] = MappingProxyType({}),
        calibration: str | None = None,
        seconds: float = 0.0,
        shows: bool = True,
    ) -> None:
        self.outcome, self.log10_p, self.score, self.build = outcome, log10_p, score, build
        self.stages, self.calibration, self.seconds, self.shows = stages, calibration, seconds, shows
        self._built: dict[int, Verdict] = {}

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> Verdicts:
        """These verdicts."""
        return cls(
            outcome=np.array([OUTCOMES.index(v.present) for v in verdicts], np.int8),
            log10_p=np.array([v.log10_p for v in verdicts], float),
            score=np.array([v.score for v in verdicts], float),
            build=verdicts.__getitem__,
            shows=all(v.shows for v in verdicts),
        )

    def __len__(self) -> int:
        return len(self.outcome)

    @overload
    def __getitem__(self, index: int) -> Verdict: ...

    @overload
    def __getitem__(self, index: slice) -> list[Verdict]: ...

    def __getitem__(self, index: int | slice) -> Verdict | list[Verdict]:
        rows = range(len(self))[index]
        if isinstance(rows, range):
            return [self[k] for k in rows]
        if rows not in self._built:
            self._built[rows] = self._of_stages(rows) if self.stages else self.build(rows)
        return self._built[rows]

    def _of_stages(self, k: int) -> Verdict:
        p_values = {name: 10 ** float(log10_p[k]) for name, log10_p in self.stages.items()}
        return replace(self.build(k), stages=p_values, seconds=self.seconds, calibration=self.calibration)

    def at_stage(self, name: str, calibration: str | None) -> Verdicts:
        """The same as those of a stage, under the calibration of all stages."""
        return Verdicts(
            outcome=self.outcome,
            log10_p=self.log10_p,
            score=self.score,
            build=self.build,
            stages={name: self.log10_p},
            calibration=calibration,
            seconds=self.seconds,
            shows=self.shows,
        )

    def joined(self, later: Verdicts, kept: NDArray[np.bool_]) -> Verdicts:
        """Those of this and of a later stage: these for the keys (K,) that are `kept`, otherwise the later ones."""
        return Verdicts(
            outcome=np.where(kept, self.outcome, later.outcome),
            log10_p=np.where(kept, self.log10_p, later.log10_p),
            score=np.where(kept, self.score, later.score),
            build=lambda k: (self if kept[k] else later).build(k),
            stages={**self.stages, **later.stages},
            calibration=later.calibration,
            seconds=self.seconds + later.seconds,
            shows=later.shows,
        )

    @property
    def best(self) -> int:
        """The number of the verdict that ranks first, of equal ones the first."""
        if len(self) == 1:
            return 0
        among = np.flatnonzero(self.outcome == self.outcome.min())
        among = among[self.log10_p[among] == self.log10_p[among].min()]
        return int(among[self.score[among].argmax()])

    @property
    def found(self) -> bool:
        """Whether a key is present."""
        return bool(self.outcome.min(initial=len(OUTCOMES)) == OUTCOMES.index(True))

    @property
    def present(self) -> list[int]:
        """The numbers of the verdicts on keys that are present, the first in rank first."""
        if not self.found:
            return []
        found = np.flatnonzero(self.outcome == OUTCOMES.index(True))
        return [int(k) for k in found[np.lexsort((-self.score[found], self.log10_p[found]))]]

    def before(self, other: Verdicts) -> NDArray[np.bool_]:
        """Which of these verdicts (K,) rank before the other's on the same key."""
        outcome, log10_p = self.outcome == other.outcome, self.log10_p == other.log10_p
        lower = (self.log10_p < other.log10_p) | (log10_p & (self.score > other.score))
        return np.asarray((self.outcome < other.outcome) | (outcome & lower))


class Tried(NamedTuple):
    """A sample at one size: notes on how it was fitted, and the noise (C, h, w) of every stage that it went through."""

    notes: tuple[str, ...]
    noise: tuple[Tensor, ...]


class Judged(NamedTuple):
    """A sample, its verdicts (one per key), its recovered noise (C, h, w) and the number of tests of each key.

    `stage` is the number of the stage that recovered this noise, on which the best verdict rests. `trail`
    holds what was seen at each size at which the sample was tried.
    """

    sample: Sample
    verdicts: Verdicts
    noise: Tensor
    tests: int = 1
    stage: int = 0
    trail: tuple[Tried, ...] = ()

    @property
    def best(self) -> Verdict:
        """The verdict with the smallest p: among present keys, else among inconclusive ones, else among all."""
        return self.verdicts[self.verdicts.best]

    @property
    def present(self) -> list[Verdict]:
        """The verdicts on keys that are present, smallest p first."""
        return [self.verdicts[k] for k in self.verdicts.present]

    def by_key(self) -> dict[str, dict[str, float]]:
        """p, score and statistics by key, for records.

        All keys are listed if there are at most LISTED, otherwise the first LISTED that are present, or the best if
        none is.
        """
        few = len(self.verdicts) <= LISTED
        listed = self.verdicts if few else self.present[:LISTED] or [self.best]
        return {v.key: {"p_value": v.p_value, "score": v.score, **v.statistics} for v in listed}

    def sentence(self) -> str:
        """One sentence about all keys: those that the image carries, or the one that fits best if it carries none."""
        best, present = self.best, self.present
        if len(present) > 1:
            names = ", ".join(f"{v.key[:8]} ({p_text(v.p_value)})" for v in present)
            return "; ".join([f"carries {len(present)} keys: {names}", *best.notes])
        if len(self.verdicts) > 1 and best.present is False:
            nearest = f"best fit {best.key[:8]}, {p_text(best.p_value)}"
            return "; ".join([f"carries none of {len(self.verdicts)} keys, {nearest}", *best.notes])
        return best.sentence()
