"""Verdicts on pictures that may have been turned, cropped or shifted: the ordinary test, then the search."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from ringmark.errors import SchemeError
from ringmark.watermark.detect.detector import Detector, Judged, Verdict
from ringmark.watermark.detect.geometry import Found, Search

if TYPE_CHECKING:
    from ringmark.data.images import Sample

__all__ = ["SearchingDetector"]


class SearchingDetector(Detector):
    """A detector that searches each image in which the ordinary test finds no key.

    Of two tests the better is taken, so p is min(1, 2 K min(p₁, p₂)) for K keys. An image in which the ordinary test
    finds a key is not searched, for p could only fall; nor is one of which it can say nothing. Of a key that the search
    found, score and p are the search's; a calibration, measured by the ordinary inversion, has no say in them. Raises
    SchemeError for a key of pattern *zeros*, which looks the same however a picture is moved.
    """

    TESTS = 2

    def __init__(self, plain: Detector, search: Search = Search()) -> None:
        self.search = search
        super().__init__(
            plain.model,
            plain.keys,
            inverter=plain.inverter,
            steps=plain.steps,
            alpha=plain.alpha,
            calibration=plain.calibration,
        )
        for name, scheme in self.schemes.items():
            if scheme.pattern == "zeros":
                raise SchemeError(
                    f"key {name[:8]}: its pattern, zeros, cannot be searched for; leave it or --search out"
                )

    def settings(self) -> dict:
        return super().settings() | {"search": repr(self.search)}

    def scan(self, samples: Iterable[Sample], batch: int = 8) -> Iterator[Judged]:
        samples = iter(samples)
        while some := list(islice(samples, batch)):
            judged = [self._of_two(j) for j in super().scan(some, batch)]
            lost = [i for i, j in enumerate(judged) if not j.present and any(v.present is False for v in j.verdicts)]
            found = self.search(self, [some[i] for i in lost], batch=batch)
            for i, fits in zip(lost, found, strict=True):
                pairs = zip(judged[i].verdicts, fits, strict=True)
                judged[i] = judged[i]._replace(verdicts=[self._better(v, fit) for v, fit in pairs])
            yield from judged

    def _of_two(self, judged: Judged) -> Judged:
        """The ordinary verdicts as the first of two tests."""
        twice = lambda p: None if p is None else min(1.0, self.TESTS * p)
        return judged._replace(
            verdicts=[
                replace(
                    v,
                    p_value=twice(v.p_value),
                    conformal_p=twice(v.conformal_p),
                    present=v.present and twice(v.p_value) <= self.alpha,
                )
                for v in judged.verdicts
            ]
        )

    def _better(self, verdict: Verdict, found: Found) -> Verdict:
        """With the search's p where that is the smaller one, and with its score where it found the key."""
        verdict = replace(verdict, seconds=verdict.seconds + found.seconds)
        p = min(1.0, self.TESTS * found.p_value * len(self.schemes))
        if verdict.present is None or p >= verdict.p_value:
            return verdict
        verdict = replace(verdict, p_value=p, conformal_p=None)
        if p > self.alpha:
            return verdict
        notes = (*verdict.notes, found.note)
        return replace(verdict, present=True, by_search=True, score=found.score, notes=notes)
