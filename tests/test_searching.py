"""Two tests of one image: which images are searched, and what p is then."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from test_detect import MODEL, key, samples

from ringmark.data.images import Sample, from_array
from ringmark.errors import SchemeError
from ringmark.watermark.detect.detector import Detector
from ringmark.watermark.detect.geometry import Candidate, Found, Search
from ringmark.watermark.detect.search import SearchingDetector
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.schemes.tree_ring import TreeRing


@dataclass
class Oracle:
    """A search that finds one key at a p-value of one's choice."""

    p_value: float
    key: str
    asked: list[str] = field(default_factory=list)

    def __call__(self, detector, samples, *, covariance=None, batch=8):
        self.asked += [s.id for s in samples]
        of = lambda s, k: Found(
            s.id, k, 0.5, self.p_value if k == self.key else 1.0, Candidate(30, 1.2), (1, 0), 9, 3, 2.0
        )
        return [[of(s, k) for k in detector.schemes] for s in samples]


def noise_of(mine=None):
    noise = initial_noise([31, 32], MODEL.latent_shape)
    noise[:1] = TreeRing(mine).embed(noise[:1]) if mine else noise[:1]
    return noise


def test_only_what_the_ordinary_test_leaves_open_is_searched() -> None:
    mine, other = key(1, "rand"), key(2, "rand")
    plain = Detector(MODEL, [mine, other], steps=2)
    oracle = Oracle(1e-9, other.fingerprint)
    flat = Sample("flat", from_array(np.full((3, 32, 32), 0.3)))
    some = [*samples(noise_of(mine)), flat]
    ordinary = [j.verdicts for j in plain.scan(some)]
    found = [j.verdicts for j in SearchingDetector(plain, oracle).scan(some, batch=2)]
    assert oracle.asked == ["1"]
    marked, moved, blank = found
    assert [v.present for v in marked] == [True, False] and [v.present for v in blank] == [None, None]
    assert [v.p_value for v in marked] == pytest.approx([min(1, 2 * v.p_value) for v in ordinary[0]])
    assert [v.present for v in moved] == [False, True]
    assert moved[1].p_value == pytest.approx(2 * 2 * 1e-9) and moved[1].score == 0.5
    assert "turned by 30°, enlarged 1.2 times" in moved[1].sentence()
    assert moved[0].p_value == pytest.approx(min(1, 2 * ordinary[1][0].p_value)) and not moved[0].notes
    assert moved[0].seconds > 2.0


def test_a_weak_find_of_the_search_is_no_find() -> None:
    mine = key(1, "rand")
    (first,), (second,) = (
        j.verdicts
        for j in SearchingDetector(Detector(MODEL, [mine], steps=2), Oracle(6e-4, mine.fingerprint)).scan(
            samples(noise_of())
        )
    )
    assert first.present is second.present is False
    assert first.p_value == pytest.approx(1.2e-3) and not first.notes


def test_unmarked_images_pass_no_more_often_than_said() -> None:
    looking = SearchingDetector(
        Detector(MODEL, [key(3, "rand")], steps=1), Search(angles=(0, 45), scales=(1.0, 1.2), dear=1, steps=1)
    )
    p = np.array([j.best.p_value for j in looking.scan(samples(initial_noise(list(range(200, 320)), (3, 32, 32))), 40)])
    assert (p <= 0.05).mean() <= 0.05 + 3 * (0.05 * 0.95 / len(p)) ** 0.5


def test_a_shifted_mark_is_found() -> None:
    mine = key(4, "rand")
    noise = torch.roll(noise_of(mine), (5, -3), (2, 3))
    plain = Detector(MODEL, [mine], steps=1)
    looking = SearchingDetector(plain, Search(angles=(0,), scales=(1.0,), dear=0, steps=1))
    without, found = (next(iter(d.scan(samples(noise)))).best for d in (plain, looking))
    assert without.present is False and found.present and "moved by 5 down and -3 right" in found.sentence()


def test_settings_name_the_search_and_zeros_is_refused() -> None:
    plain = Detector(MODEL, [key(1)], steps=2)
    assert SearchingDetector(plain).settings()["search"] == repr(Search()) and "search" not in plain.settings()
    with pytest.raises(SchemeError, match="leave it or --search out"):
        SearchingDetector(Detector(MODEL, [key(1, "zeros")], steps=2))
