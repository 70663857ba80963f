"""What is said of an image and a key."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from ringmark.data.images import Sample

__all__ = ["Judged", "Verdict", "p_text"]

TINIEST = 1e-300
"""Below it p is printed as a bound: floats end near 1e-308."""


def p_text(p: float) -> str:
    """'p = 2e-09', or a bound where p is too small to be held."""
    return f"p = {p:.2g}" if p >= TINIEST else f"p < {TINIEST:g}"


@dataclass(frozen=True)
class Verdict:
    """What is said of one image and one key. `present` None means inconclusive, and `notes` say why.

    `p_value` is corrected for the number of keys and of tests; `log10_p` is its logarithm, also where it is too small
    for a float. `score` is that of the key's scheme, `statistics` are the published ones by name, `residual` is the
    pixel RMS of the decoder inversion in grey levels, `seconds` the time an image took. Where an image shows nothing,
    being of one flat colour, say, `shows` is False and p is 1. With `by_search` the search found the key, and the score
    is the largest of many. `calibration` is the fingerprint of the calibration used, if any, and `conformal_p` then the
    p-value by rank among its unmarked images, corrected like `p_value`.
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
    label: bool | None = None
    conformal_p: float | None = None
    calibration: str | None = None
    notes: tuple[str, ...] = field(default=())
    by_search: bool = False
    shows: bool = True

    def record(self) -> dict[str, Any]:
        """As plain values, for a results file or JSON; each statistic under its own name."""
        values = asdict(self)
        statistics: dict[str, float] = values.pop("statistics")
        return values | statistics | {"notes": list(self.notes)}

    def sentence(self) -> str:
        """'carries key 3f9a2b10, p = 2e-09; resized 512x512 -> 128x128'."""
        outcome = {True: "carries", False: "does not carry", None: "inconclusive for"}[self.present]
        return "; ".join([f"{outcome} key {self.key[:8]}, {p_text(self.p_value)}", *self.notes])


class Judged(NamedTuple):
    """A sample, its verdicts, one a key, and its recovered noise (C, h, w)."""

    sample: Sample
    verdicts: list[Verdict]
    noise: Tensor

    @property
    def best(self) -> Verdict:
        """The verdict of the key that fits best: of those present, else of the inconclusive, else of all."""
        return min(self.verdicts, key=lambda v: ((True, None, False).index(v.present), v.p_value, -v.score))

    @property
    def present(self) -> list[Verdict]:
        """The verdicts of the keys that are present, the smallest p first."""
        return sorted((v for v in self.verdicts if v.present), key=lambda v: (v.p_value, -v.score))

    def sentence(self) -> str:
        """In words, of all keys: which one the image carries, that it carries several, or none and which is nearest."""
        best, present = self.best, self.present
        if len(present) > 1:
            names = ", ".join(f"{v.key[:8]} ({p_text(v.p_value)})" for v in present)
            return "; ".join([f"carries {len(present)} keys: {names}", *best.notes])
        if len(self.verdicts) > 1 and best.present is False:
            nearest = f"nearest {best.key[:8]}, {p_text(best.p_value)}"
            return "; ".join([f"carries none of {len(self.verdicts)} keys, {nearest}", *best.notes])
        return best.sentence()
