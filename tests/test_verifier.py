"""From pictures to verdicts, on a model whose every map is the identity; what is searched, and what p is then."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from operator import length_hint

import numpy as np
import pytest
import torch
from identity import MODEL, Identity, key, of_shape, old_key, pictures, samples, verifier

from ringmark.data.batches import HELD, batched
from ringmark.data.images import Sample, WithParts, from_array
from ringmark.errors import CalibrationError, KeyFileError, RingmarkError, SchemeError
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.geometry import Candidate, Grid
from ringmark.watermark.detect.search import Found, Search
from ringmark.watermark.detect.verifier import (
    Verifier,
    built_in_calibration,
    check_fit,
    fitting_calibration,
    sizes_kept,
)
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.schemes.base import make_key
from ringmark.watermark.schemes.tree_ring import TreeRing


def drawn_calibration(recoverer, number: int = 50) -> Calibration:
    """Of noises drawn as they come, as if this recoverer had recovered them."""
    noise = initial_noise(list(range(number)), MODEL.latent_shape)
    return Calibration.measure(noise, recoverer.settings.as_dict(), {"drawn": number})


@pytest.mark.parametrize("pattern", ["ring", "rand", "zeros"])
@pytest.mark.parametrize("method", ["encoder", "anderson", "operator"])
def test_marked_are_found_and_unmarked_are_not(pattern: str, method: str) -> None:
    mine = key(1, pattern)
    noise = initial_noise(list(range(8)), MODEL.latent_shape)
    noise[:4] = TreeRing(mine).embed(noise[:4])
    looking = verifier([mine], method=method, max_steps=4, steps=5)
    verdicts = [j.best for j in looking.scan(pictures(noise), batch=3)]
    assert [v.present for v in verdicts] == [True] * 4 + [False] * 4
    assert [v.sample_id for v in verdicts] == list(map(str, range(8)))
    assert all(v.p_value < 1e-9 for v in verdicts[:4])


def test_several_keys_are_tested_on_one_inversion_and_corrected_for() -> None:
    keys = [key(i) for i in range(3)]
    (sample,) = samples(TreeRing(keys[1]).embed(initial_noise([7], MODEL.latent_shape)))
    together = verifier(keys, steps=3)
    calls, original = [], together.recoverer.latents
    together.recoverer.latents = lambda images, encoded: calls.append(len(images)) or original(images, encoded)
    ((one,),) = (j.verdicts for j in verifier([keys[0]], steps=3).scan([[sample]]))
    (all_three,) = (j.verdicts for j in together.scan([[sample]]))
    assert [v.present for v in all_three] == [False, True, False] and calls == [1]
    assert all_three[0].p_value == pytest.approx(min(1, 3 * one.p_value))
    assert together.settings()["keys"] == sorted(k.fingerprint for k in keys)


def test_results_do_not_depend_on_the_batch() -> None:
    looking = verifier([key(3)], steps=3)
    some = pictures(initial_noise([1, 2, 3], MODEL.latent_shape))
    whole, single = ([j.best.p_value for j in looking.scan(some, batch=batch)] for batch in (3, 1))
    assert whole == pytest.approx(single, rel=1e-4)


def test_batches_are_of_one_label_and_results_in_order() -> None:
    groups = []

    def work(group: list[int]) -> list[int]:
        groups.append(group)
        return [-number for number in group]

    assert list(batched(range(10), lambda number: number % 2, work, batch=4)) == [-number for number in range(10)]
    assert groups == [[0, 2, 4, 6], [1, 3, 5, 7], [8], [9]]
    groups.clear()
    rare = list(batched(range(20), lambda number: number == 0, work, batch=2))
    assert rare == [-number for number in range(20)]
    assert groups[:5] == [[1, 2], [3, 4], [5, 6], [0], [7, 8]]  # held for four batches
    assert max(map(len, groups)) == 2


def test_what_is_held_is_bounded() -> None:
    taken, labels = iter(range(200)), np.random.default_rng(0).integers(0, 30, 200)
    results = batched(taken, lambda number: labels[number], lambda group: group, batch=3)
    for expected, result in enumerate(results):
        assert result == expected and 200 - length_hint(taken) - result <= HELD * 3
    assert result == 199


def test_flat_and_broken_images_are_inconclusive() -> None:
    flat = Sample("flat", from_array(np.ones((3, 32, 32)) * np.array([0.1, -0.4, 0.8])[:, None, None]))
    (judged,) = verifier([key(4)]).scan([[flat]])
    verdict = judged.best
    assert verdict.present is None and "flat" in verdict.sentence() and (verdict.shows, verdict.p_value) == (False, 1.0)

    class Overflowing(Identity):
        def predict(self, latents, level, schedule, cond):
            return latents, torch.full_like(latents, torch.inf)

    (judged,) = verifier([key(4)], model=Overflowing()).scan(pictures(initial_noise([5], MODEL.latent_shape)))
    verdict = judged.best
    assert verdict.present is None and "overflowed" in verdict.sentence() and np.isfinite(verdict.p_value)


def test_a_key_of_another_kind_of_latents_is_refused() -> None:
    placed = {"channels": (0,), "radii": (2, 7)}
    aliens = [
        make_key("tree-ring", **of_shape(MODEL.latent_shape, name="large") | {"kind": MODEL.kind | change}, **placed)
        for change in ({"family": "other"}, {"channels": 4}, {"factor": 2})
    ]
    for alien in (*aliens, old_key(key(5, name="large"), torch.ones(2, 64, 64) + 0j)):
        for act in (lambda alien=alien: verifier([alien]), lambda alien=alien: check_fit(alien, MODEL)):
            with pytest.raises(KeyFileError) as caught:
                act()
            assert caught.value.code == "key.latents" and caught.value.subject == f"key {alien.fingerprint[:8]}"
            assert caught.value.details["model"] == "large"


def test_a_key_of_another_model_of_this_kind_is_noted_and_found() -> None:
    own, other = key(5), key(5, name="other", fingerprint="1")
    assert check_fit(own, MODEL) == "" and "other (1)" in check_fit(other, MODEL)
    assert check_fit(old_key(own, TreeRing(own).spectrum), MODEL) == ""
    assert check_fit(old_key(other, TreeRing(own).spectrum), MODEL) == check_fit(other, MODEL)
    (sample,) = samples(TreeRing(own).embed(initial_noise([7], MODEL.latent_shape)))
    (judged,) = verifier([own, other]).scan([[sample]])
    assert [verdict.present for verdict in judged.verdicts] == [True, True]
    assert [verdict.notes for verdict in judged.verdicts] == [(), (check_fit(other, MODEL),)]


def test_an_unknown_decoder_inversion_is_refused() -> None:
    with pytest.raises(RingmarkError, match="encoder") as caught:
        verifier([], method="magic")
    assert caught.value.code == "recovery.method-unknown"


def test_settings_are_those_of_the_recovery_and_of_the_detector() -> None:
    looking = verifier([key(1)], steps=3)
    assert looking.settings() == looking.recoverer.settings.as_dict() | looking.detector.settings()
    assert looking.settings()["steps"] == 3 and looking.settings()["model"] == MODEL.identity


# --- on a calibration


def test_a_calibration_of_other_settings_is_refused() -> None:
    recoverer = verifier().recoverer
    made = drawn_calibration(recoverer)
    assert verifier(calibration=made).settings()["calibration"] == made.fingerprint
    with pytest.raises(CalibrationError) as caught:
        verifier(steps=3, calibration=made)
    assert caught.value.code == "calibration.settings" and "steps was 2, is 3" in caught.value.fact
    with pytest.raises(CalibrationError) as caught:
        verifier([key(1, "zeros", (2, 11))], calibration=made)  # compares with what is outside
    assert caught.value.code == "calibration.reach"


def test_a_calibration_that_does_not_fit_is_left_aside_with_the_reason(tmp_path) -> None:
    recoverer, other = verifier().recoverer, verifier(steps=3).recoverer
    made = drawn_calibration(recoverer)
    assert fitting_calibration(recoverer, [key(1)], made) == (made, None)
    nothing, why = fitting_calibration(other, [key(1)], made)
    assert nothing is None and why.code == "calibration.settings" and "steps was 2, is 3" in why.fact
    nothing, why = fitting_calibration(recoverer, [key(1, "zeros", (2, 11))], made)
    assert nothing is None and why.code == "calibration.reach"
    assert built_in_calibration(recoverer, [key(1)], tmp_path) == (None, None)
    made.save(tmp_path / Calibration.FILE)
    found, why = built_in_calibration(recoverer, [key(1)], tmp_path)
    assert found.fingerprint == made.fingerprint and not why
    assert built_in_calibration(other, [key(1)], tmp_path)[0] is None
    (tmp_path / Calibration.FILE).write_bytes(b"damaged")
    with pytest.raises(CalibrationError) as caught:
        built_in_calibration(recoverer, [key(1)], tmp_path)
    assert caught.value.code == "calibration.damaged"


# --- with a search


@dataclass
class Oracle:
    """A search that finds one key at a p-value of one's choice."""

    p_value: float
    key: str
    asked: list[str] = field(default_factory=list)

    def __call__(self, model, schemes, samples, *, batch=8):
        self.asked += [s.id for s in samples]
        return [[self._found(s.id, name) for name in schemes] for s in samples]

    def _found(self, sample_id: str, name: str) -> Found:
        return Found(
            sample_id=sample_id,
            key=name,
            score=0.5,
            log10_p=float(np.log10(self.p_value)) if name == self.key else 0.0,
            candidate=Candidate(30, 1.2),
            shift=(0, 1),
            tests=9,
            calls=3,
            seconds=2.0,
        )


def noise_of(mine=None):
    noise = initial_noise([31, 32], MODEL.latent_shape)
    noise[:1] = TreeRing(mine).embed(noise[:1]) if mine else noise[:1]
    return noise


def test_only_what_the_ordinary_test_leaves_open_is_searched() -> None:
    mine, other = key(1, "rand"), key(2, "rand")
    oracle = Oracle(1e-9, other.fingerprint)
    flat = Sample("flat", from_array(np.full((3, 32, 32), 0.3)))
    some = [*pictures(noise_of(mine)), [flat]]
    ordinary = [j.verdicts for j in verifier([mine, other]).scan(some)]
    marked, moved, blank = (j.verdicts for j in verifier([mine, other], search=oracle).scan(some, batch=2))
    assert oracle.asked == ["1"]
    assert [v.present for v in marked] == [True, False] and [v.present for v in blank] == [None, None]
    assert marked[0].log10_p == pytest.approx(ordinary[0][0].log10_p + np.log10(2))
    assert marked[1].p_value == pytest.approx(min(1, 2 * ordinary[0][1].p_value))
    assert [v.present for v in moved] == [False, True]
    assert moved[1].p_value == pytest.approx(2 * 2 * 1e-9) and moved[1].score == 0.5
    assert 10 ** moved[1].log10_p == pytest.approx(moved[1].p_value)
    assert "rotated by 30°, enlarged 1.2 times" in moved[1].sentence()
    assert moved[0].p_value == pytest.approx(min(1, 2 * ordinary[1][0].p_value)) and not moved[0].notes
    assert moved[0].seconds > 2.0
    assert [v.by_search for v in (*marked, *moved, *blank)] == [False, False, False, True, False, False]


def test_a_weak_find_of_the_search_is_no_find() -> None:
    mine = key(1, "rand")
    looking = verifier([mine], search=Oracle(6e-4, mine.fingerprint))
    (first,), (second,) = (j.verdicts for j in looking.scan(pictures(noise_of())))
    assert first.present is second.present is False and not first.by_search
    assert first.p_value == pytest.approx(1.2e-3) and not first.notes


def test_unmarked_images_pass_no_more_often_than_said() -> None:
    search = Search(grid=Grid(anchors=4, spacing=30, enlarged=2), refined=1, early_steps=1, steps=1)
    looking = verifier([key(3, "rand")], steps=1, search=search)
    some = pictures(initial_noise(list(range(200, 320)), (3, 32, 32)))
    p = np.array([j.best.p_value for j in looking.scan(some, 40)])
    assert (p <= 0.05).mean() <= 0.05 + 3 * (0.05 * 0.95 / len(p)) ** 0.5


def test_a_shifted_mark_is_found() -> None:
    mine = key(4, "rand")
    noise = torch.roll(noise_of(mine), (5, -3), (2, 3))
    search = Search(grid=Grid(anchors=1, spacing=180, enlarged=0), early_steps=1, steps=1)
    plain, searching = verifier([mine], steps=1), verifier([mine], steps=1, search=search)
    without, found = (next(iter(d.scan(pictures(noise)))).best for d in (plain, searching))
    assert without.present is False and found.present and found.by_search
    assert "shifted 5 down and -3 right" in found.sentence()


def test_settings_name_the_search_and_what_cannot_be_searched_for_is_refused() -> None:
    assert verifier([key(1, "rand")], search=Search()).settings()["search"] == repr(Search())
    assert "search" not in verifier([key(1)]).settings()
    asked = [verifier([key(1, "rand")], search=search).sizes_of((32, 32)) for search in (None, Search())]
    assert asked[0] == asked[1] and [isinstance(sizes, WithParts) for sizes in asked] == [False, True]
    with pytest.raises(SchemeError) as caught:
        verifier([key(1, "zeros")], search=Search())
    assert caught.value.code == "scheme.no-search"
    assert caught.value.subject == f"key {key(1, 'zeros').fingerprint[:8]}"


def test_of_a_key_that_the_search_found_the_calibration_has_no_part() -> None:
    mine = key(1, "rand")
    made = drawn_calibration(verifier().recoverer)
    looking = verifier([mine], calibration=made, search=Oracle(1e-9, mine.fingerprint))
    (judged, *_) = looking.scan(pictures(noise_of()))
    assert judged.best.by_search and judged.best.conformal_p is None and judged.best.calibration == made.fingerprint
    assert replace(judged.best, present=True) == judged.best


def test_detectors_are_kept_for_the_sizes_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of ever new sizes do not fill the memory, and those of old ones are judged as before."""
    made: list[tuple[int, int]] = []
    original = Verifier._stages_at
    monkeypatch.setattr(Verifier, "_stages_at", lambda self, size: made.append(size) or original(self, size))
    monkeypatch.setattr("ringmark.watermark.detect.verifier.MAX_SIZES", 2)
    looking = verifier([key(1)], steps=2)
    (judged,) = looking.scan(pictures(initial_noise([1], MODEL.latent_shape)))
    for side in (24, 40, 48):
        assert looking.sizes_of((side, 32))[0] == (side, 32)
    (again,) = looking.scan(pictures(initial_noise([1], MODEL.latent_shape)))
    assert again.best.p_value == judged.best.p_value
    assert made == [(32, 32), (24, 32), (40, 32), (48, 32), (32, 32)]
    assert looking._stages.cache_info().currsize == 2


def test_detectors_of_many_keys_are_kept_for_fewer_sizes() -> None:
    assert [sizes_kept(keys) for keys in (0, 1, 1000, 4000, 10**6)] == [64, 64, 64, 16, 4]
