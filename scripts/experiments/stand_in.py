"""What stands in for a model where engines are measured: it costs what it is told to, and loads nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from ringmark.data.engine import Finding
from ringmark.data.images import Sample


@dataclass(frozen=True)
class StandIn:
    """Takes `computing` seconds of processor time and `waiting` seconds of the clock for each picture."""

    computing: float = 0.0
    waiting: float = 0.0

    def settings(self) -> dict:
        return {"judge": "stand-in"}

    def sizes_of(self, picture: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        return (picture,)

    def __call__(self, pictures: list[list[Sample]]) -> list[Finding]:
        return [self._find(sample) for (sample,) in pictures]

    def _find(self, sample: Sample) -> Finding:
        started = time.process_time()
        time.sleep(self.waiting)
        while time.process_time() - started < self.computing:
            pass
        record = {"sample_id": sample.id, "content": sample.content, "present": False}
        return record | {"score": float(np.mean(sample.image)), "p_value": 1.0, "log10_p": 0.0}, {}


def same(judge: StandIn) -> StandIn:
    """What makes the judge of an actor."""
    return judge
