"""A verdict in stages, on a model whose every map is the identity up to scale: where it ends, and what p is then."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from identity import MODEL, Identity, key, pictures, verifier

from ringmark.errors import CalibrationError
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.cascade import EARLY, calibrated_stages, early_stages
from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.schemes.tree_ring import TreeRing

MINE, STEPS, NAMES = key(1, "rand"), 5, ["latents", "3 steps", "full"]


def calibration_of(recoverer, noise: torch.Tensor | None = None) -> Calibration:
    """Of noises drawn as they come, at all stages."""
    noise = initial_noise(list(range(60)), MODEL.latent_shape) if noise is None else noise
    stages = [
        Calibration.measure(noise, stage.settings.as_dict(), {"drawn": len(noise)})
        for stage in (*early_stages(recoverer), recoverer)
    ]
    return replace(stages[-1], earlier=tuple(stages[:-1]))


class Counting(Identity):
    """Counts the images that are encoded and the rows that the network is called on."""

    def __init__(self) -> None:
        self.encoded, self.predicted = 0, 0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.encoded += len(images)
        return super().encode(images)

    def predict(self, latents, level, schedule, cond):
        self.predicted += len(latents)
        return super().predict(latents, level, schedule, cond)


def cascade(keys=(MINE,), *, model=MODEL, calibration: Calibration | None = None, **options) -> Verifier:
    made = calibration or calibration_of(verifier(steps=STEPS).recoverer)
    return verifier(keys, method="encoder", steps=STEPS, model=model, calibration=made, **options)


@pytest.fixture(scope="module")
def made() -> Calibration:
    return calibration_of(verifier(method="encoder", steps=STEPS).recoverer)


def noises(*marked: bool) -> torch.Tensor:
    noise = initial_noise(list(range(1000, 1000 + len(marked))), MODEL.latent_shape)
    return torch.where(torch.tensor(marked)[:, None, None, None], TreeRing(MINE).embed(noise), noise)


def test_a_mark_that_the_latents_show_costs_no_call_of_the_network(made):
    counting = Counting()
    marked, unmarked = (j.best for j in cascade(model=counting, calibration=made).scan(pictures(noises(True, False))))
    assert marked.present and list(marked.stages) == ["latents"]
    assert marked.stages["latents"] == marked.p_value and marked.calibration == made.fingerprint
    assert unmarked.present is False and list(unmarked.stages) == NAMES[: len(unmarked.stages)]
    assert counting.encoded == 2 and counting.predicted == (3 if len(unmarked.stages) == 2 else 3 + STEPS)


def test_p_is_the_smallest_over_the_stages_by_their_weights(made):
    pics = pictures(noises(*[False] * 8))
    alone = [
        j.best
        for j in verifier([MINE], method="encoder", steps=STEPS, calibration=replace(made, earlier=())).scan(pics)
    ]
    for single, joint in zip(alone, cascade(calibration=made, thorough=True).scan(pics), strict=True):
        p = [single.p_value / weight for weight in (*EARLY.values(), 1 - sum(EARLY.values()))]  # stages are alike here
        assert list(joint.best.stages) == NAMES and single.stages == {"full": single.p_value}
        assert list(joint.best.stages.values()) == pytest.approx(np.minimum(1, p), rel=1e-4)
        assert joint.best.p_value == min(joint.best.stages.values())


def test_pictures_without_evidence_skip_the_last_stage_unless_all_stages_are_asked_for(made):
    pics = pictures(noises(*[False] * 30))
    quick, whole = ([j.best for j in cascade(calibration=made, thorough=t).scan(pics)] for t in (False, True))
    assert all(len(v.stages) == 3 for v in whole)
    for short, long in zip(quick, whole, strict=True):
        assert short.p_value >= long.p_value * (1 - 1e-6) and short.stages.keys() <= long.stages.keys()
        assert ("full" in short.stages) == (short.stages["3 steps"] < 1)
    assert 0 < sum("full" in v.stages for v in quick) < 15


def test_unmarked_images_pass_no_more_often_than_said(made):
    pics = pictures(initial_noise(list(range(2000, 2200)), MODEL.latent_shape))
    for thorough in (False, True):
        looking = cascade([MINE, key(2, "rand")], calibration=made, thorough=thorough)
        p = np.array([j.best.p_value for j in looking.scan(pics, 50)])
        assert (p <= 0.05).mean() <= 0.05 + 3 * (0.05 * 0.95 / len(p)) ** 0.5


def test_all_keys_of_an_image_are_found_if_all_stages_are_asked_for(made):
    other = key(2, "rand", (9, 11))
    (picture,) = pictures(TreeRing(other).embed(noises(True)))
    for thorough in (False, True):
        (judged,) = cascade([MINE, other], calibration=made, thorough=thorough).scan([picture])
        assert [v.present for v in judged.verdicts] == [True, True]


def test_an_early_stage_that_its_unmarked_images_contradict_counts_for_nothing(made):
    noise = initial_noise(list(range(300)), MODEL.latent_shape)
    noise[:6] += 0.6 * TreeRing(MINE).embed(torch.zeros(1, *MODEL.latent_shape))
    recoverer = verifier(method="encoder", steps=STEPS).recoverer
    tainted = calibration_of(recoverer, noise)
    weak = initial_noise([1000], MODEL.latent_shape) + 0.4 * TreeRing(MINE).embed(torch.zeros(1, *MODEL.latent_shape))
    sound = replace(tainted, power=made.power, spectra=made.spectra)
    (found,) = (j.best for j in cascade(calibration=sound).scan(pictures(weak / 1.1)))
    assert list(found.stages) == NAMES and found.present and found.p_value == found.stages["full"]
    (doubted,) = (j.best for j in cascade(calibration=tainted).scan(pictures(weak / 1.1)))
    assert doubted.present is None and "contradicts" in doubted.sentence()


def test_the_noise_and_the_detector_are_those_of_the_stage_that_found_the_key(made):
    looking = cascade(calibration=made)
    (judged,) = looking.scan(pictures(noises(True)))
    assert judged.stage == 0 and looking.detector_of(judged).calibration is made.earlier[0]
    assert looking.detector_of(judged).number_of_tests == pytest.approx(1 / EARLY[0])
    assert torch.allclose(judged.noise, noises(True)[0].clamp(-4, 4), atol=0.02)


def test_stages_without_a_null_are_left_out(made):
    recoverer = verifier(method="encoder", steps=STEPS).recoverer
    assert [stage.steps for stage, _ in calibrated_stages(recoverer, made)] == list(EARLY)
    only = replace(made, earlier=made.earlier[1:])
    assert [stage.steps for stage, _ in calibrated_stages(recoverer, only)] == [3]
    assert cascade(calibration=only).settings()["stages"] == pytest.approx({"3 steps": EARLY[3], "full": 1 - EARLY[3]})
    assert "stages" not in cascade(calibration=replace(made, earlier=())).settings()
    assert [stage.steps for stage in early_stages(verifier(steps=2).recoverer)] == [0]
    other = replace(made.earlier[0], settings=made.earlier[0].settings | {"dtype": "other", "method": "other"})
    with pytest.raises(CalibrationError) as caught:
        cascade(calibration=replace(made, earlier=(other,)))
    assert caught.value.code == "calibration.settings"


def test_at_another_size_than_the_calibrations_there_is_one_stage(made):
    (judged,) = cascade(calibration=made, sizes=[(32, 48)]).scan(pictures(initial_noise([3], (3, 32, 48))))
    assert list(judged.best.stages) == ["full"]
