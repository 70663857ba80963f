"""The detector on recovered noise: what is planted is found, what is not is not; a calibration checks every p-value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from identity import MODEL, key, samples, secret
from scipy import stats

from ringmark.errors import CalibrationError, SchemeError
from ringmark.inversion.decoder import INVERTERS
from ringmark.inversion.noise_recovery import rings
from ringmark.inversion.recover import Recovered
from ringmark.inversion.solve import Solution, Status
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.detector import Detector, Seen, _residuals, blankness
from ringmark.watermark.detect.verdict import Judged
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.keys.key import Key
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.statistics import cosine_p

WHITE = Null.white(MODEL.latent_shape)


def coloured(first_seed: int, n: int) -> torch.Tensor:
    """Recovered noise (n, 3, 32, 32) whose rings fall off, and of which channel 2 repeats half of channel 0."""
    noise = initial_noise(list(range(first_seed, first_seed + n)), MODEL.latent_shape).double()
    noise[:, 2] = 0.5 * noise[:, 0] + 0.5 * noise[:, 2]
    return torch.fft.ifft2(torch.fft.fft2(noise) * torch.exp(-rings(32, 32) / 12)).real


def on(noise: torch.Tensor, keys: list[Key], **options) -> Detector:
    """A detector calibrated on this noise."""
    calibration = Calibration.measure(noise, {"model": MODEL.identity}, {"drawn": len(noise)})
    return Detector(keys, null=WHITE, calibration=calibration, **options)


def judged(detector: Detector, noise: torch.Tensor) -> list[Judged]:
    """As if this noise had been recovered from samples."""
    some = samples(noise)
    images = torch.randn(len(some), 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    recovered = Recovered(images=images, solution=INVERTERS["encoder"](MODEL, images), noise=noise, seconds=0.0)
    return list(map(Judged, some, detector.judge(some, Seen.of(recovered)), noise))


@pytest.mark.parametrize("pattern", ["ring", "rand", "zeros"])
def test_marked_noise_is_found_and_unmarked_is_not(pattern):
    mine = key(1, pattern)
    noise = initial_noise(list(range(8)), MODEL.latent_shape)
    noise[:4] = TreeRing(mine).embed(noise[:4])
    verdicts = [j.best for j in judged(Detector([mine], null=WHITE), noise)]
    assert [v.present for v in verdicts] == [True] * 4 + [False] * 4
    assert all(v.p_value < 1e-9 and v.log10_p < -9 for v in verdicts[:4])
    assert all(np.log10(v.p_value) == pytest.approx(v.log10_p) for v in verdicts[4:])


def test_p_values_of_unmarked_images_are_uniform():
    detector = Detector([key(2)], null=WHITE)
    noise = initial_noise(list(range(100, 500)), MODEL.latent_shape)
    scores, log10_p = detector.statistic(key(2).fingerprint, noise)
    assert stats.kstest(10**log10_p, "uniform").pvalue > 0.01
    assert 10**log10_p == pytest.approx(cosine_p(scores, TreeRing(key(2)).free))


def test_the_residual_is_that_of_the_latents_that_are_judged():
    merits = torch.tensor([[4.0, 4, 4], [2, 2, torch.nan], [3, 3, torch.nan]])
    status, chosen = [Status.MAX_STEPS, Status.ROUNDED, Status.CONVERGED], torch.tensor([1, 0, 0])
    images, latents = torch.zeros(3, 3, 8, 8), torch.zeros(3, 4, 2, 2)
    solution = Solution(
        value=latents, residuals=merits, merits=merits, steps=torch.tensor([3, 3, 1]), status=status, chosen=chosen
    )
    one_grey_level = 127.5 / images[0].numel() ** 0.5
    assert _residuals(Recovered(images=images, solution=solution, noise=latents, seconds=0.0)) == pytest.approx(
        [2 * one_grey_level] + [4 * one_grey_level] * 2
    )


def test_a_key_given_twice_is_one():
    one, other = key(1), key(2)
    detector = Detector([one, one, other], null=WHITE)
    (found,) = judged(detector, TreeRing(other).embed(initial_noise([7], MODEL.latent_shape)))
    assert [v.key for v in found.verdicts] == [one.fingerprint, other.fingerprint] and detector.number_of_tests == 2
    assert [v.present for v in found.verdicts] == [False, True]


def test_several_keys_are_corrected_for_and_so_are_several_tests_of_each():
    keys = [key(i) for i in range(3)]
    noise = TreeRing(keys[1]).embed(initial_noise([7], MODEL.latent_shape))
    (alone,) = judged(Detector([keys[0]], null=WHITE), noise)
    together = Detector(keys, null=WHITE)
    (all_three,) = judged(together, noise)
    assert [v.present for v in all_three.verdicts] == [False, True, False]
    assert [v.key for v in all_three.verdicts] == [k.fingerprint for k in keys]
    assert all_three.verdicts[0].p_value == pytest.approx(min(1, 3 * alone.best.p_value))
    weak = 0.1 * noise + initial_noise([8], MODEL.latent_shape)
    (once,), (twice,) = (judged(Detector(keys, null=WHITE, tests=tests), weak) for tests in (1, 2))
    for a, b in zip(once.verdicts, twice.verdicts, strict=True):
        assert b.p_value == pytest.approx(min(1, 2 * a.p_value))
    settings = together.settings()
    assert settings["keys"] == sorted(k.fingerprint for k in keys) and settings["null"] == "white"
    assert settings["calibration"] is None


def test_keys_of_several_kinds_are_judged_by_their_own_tests():
    keys = [key(1), key(2, "rand"), key(3, "zeros"), key(4, "rand"), key(5, "rand", (3, 7))]
    noise = initial_noise([1, 2], MODEL.latent_shape)
    together = judged(Detector(keys, null=WHITE), noise)
    for i, mine in enumerate(keys):
        alone = judged(Detector([mine], null=WHITE), noise)
        for a, b in zip(alone, together, strict=True):
            assert a.best.score == pytest.approx(b.verdicts[i].score, abs=1e-12)
            assert b.verdicts[i].p_value == pytest.approx(min(1, 5 * a.best.p_value))
            assert a.best.statistics == b.verdicts[i].statistics


def test_flat_images_and_broken_noise_are_inconclusive():
    detector, noise = Detector([key(4)], null=WHITE), initial_noise([5, 6, 7], MODEL.latent_shape)
    noise[1, 0, 3, 3] = torch.inf
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    images[0] = torch.tensor([0.1, -0.4, 0.8])[:, None, None]
    recovered = Recovered(images=images, solution=INVERTERS["encoder"](MODEL, images), noise=noise, seconds=0.0)
    flat, broken, fine = (
        verdict for (verdict,) in detector.judge(samples(initial_noise([1, 2, 3], (3, 32, 32))), Seen.of(recovered))
    )
    assert (flat.present, flat.shows, flat.p_value, flat.log10_p) == (
        None,
        False,
        1.0,
        0.0,
    ) and "flat" in flat.sentence()
    assert broken.present is None and "overflowed" in broken.sentence() and np.isfinite(broken.score)
    assert fine.present is False and fine.shows
    assert [bool(blankness(*pair)) for pair in zip(images, noise, strict=True)] == [True, True, False]


def test_thresholds_densities_and_matched_filters():
    mine, zeros = key(1, "rand"), key(2, "zeros")
    detector = Detector([mine, zeros], null=WHITE, alpha=1e-3)
    threshold = detector.threshold(mine.fingerprint)
    d = TreeRing(mine).free
    assert cosine_p(np.array([threshold]), d)[0] <= 5e-4 < cosine_p(np.array([threshold - 1e-4]), d)[0]
    assert detector.threshold(zeros.fingerprint) is None and detector.density(zeros.fingerprint, np.zeros(1)) is None
    noise = initial_noise(list(range(300)), MODEL.latent_shape)
    z = detector.matched_filter(mine.fingerprint, noise)
    assert stats.kstest(z, "norm").pvalue > 0.01 and detector.matched_filter(zeros.fingerprint, noise) is None
    assert detector.density(mine.fingerprint, np.array([0.0]))[0] == pytest.approx((d / 2 / np.pi) ** 0.5, rel=0.01)
    assert Detector([mine], null=WHITE, alpha=1e-320).threshold(mine.fingerprint) is not None


def test_a_key_of_an_unknown_scheme_is_refused():
    odd = Key(key(1).metadata | {"scheme": "unheard-of"}, secret(1))
    with pytest.raises(SchemeError) as caught:
        Detector([odd], null=WHITE)
    assert caught.value.code == "scheme.unknown"


# --- on a calibration


@pytest.mark.parametrize("pattern", ["ring", "rand"])
def test_calibrated_p_values_of_coloured_noise_are_uniform(pattern):
    detector = on(coloured(0, 400), [key(2, pattern)])
    verdicts = [j.best for j in judged(detector, coloured(1000, 600))]
    for p in ([v.p_value for v in verdicts], [v.conformal_p for v in verdicts]):
        assert stats.kstest(p, "uniform").pvalue > 0.01
    assert sum(v.present is not False for v in verdicts) <= 4  # 0.6 are expected
    assert {v.calibration for v in verdicts} == {detector.calibration.fingerprint}
    plain = Detector(detector.keys, null=WHITE)
    assert {(v.calibration, v.conformal_p) for j in judged(plain, coloured(0, 2)) for v in j.verdicts} == {(None, None)}


def test_a_calibration_stays_with_other_keys_and_is_part_of_the_settings():
    detector = on(coloured(0, 100), [key(1)])
    both = Detector([key(1), key(2, "rand")], null=WHITE, calibration=detector.calibration)
    assert both.settings()["calibration"] == detector.calibration.fingerprint
    assert Detector([], null=WHITE).settings()["calibration"] is None
    assert both.reference_scores(key(1).fingerprint) is both.reference_scores(key(1).fingerprint)
    assert Detector([key(1)], null=WHITE).reference_scores(key(1).fingerprint) is None
    (one,), (two,) = (judged(x, TreeRing(key(1)).embed(coloured(5000, 1))) for x in (detector, both))
    assert one.best.conformal_p == pytest.approx(1 / 101)
    assert two.verdicts[0].conformal_p == pytest.approx(2 / 101)  # corrected, like p


def test_a_calibration_that_holds_too_little_for_a_key_is_refused():
    made = on(coloured(0, 50), []).calibration
    with pytest.raises(CalibrationError, match=r"\b12\b") as caught:
        Detector([key(1, "zeros", (2, 11))], null=WHITE, calibration=made)  # compares with what is outside
    assert (caught.value.code, caught.value.subject) == ("calibration.reach", "calibration")


def test_a_mark_among_the_unmarked_makes_its_presence_inconclusive():
    mine = key(1, "rand")
    mark = TreeRing(mine).embed(torch.zeros(1, *MODEL.latent_shape, dtype=torch.float64))
    noise, new = coloured(0, 300), coloured(1000, 40)
    noise[:6] += 0.6 * mark
    detector = on(noise, [mine], alpha=1e-3)
    new[:20] += 0.4 * mark
    new[20:30] += 1.5 * mark
    verdicts = [j.best for j in judged(detector, new)]
    assert all(v.p_value <= 1e-6 for v in verdicts[:30])
    assert {v.present for v in verdicts[:20]} == {None} and {v.present for v in verdicts[20:30]} == {True}
    assert {v.present for v in verdicts[30:]} == {False}
    assert "; 6 of 300 unmarked images score as high, which " in verdicts[0].sentence()
    # Where rank and p agree about alpha, p is false all the same.
    lenient = [j.best for j in judged(on(noise, [mine], alpha=0.1), new)[:20]]
    assert {v.present for v in lenient} == {None} and all(v.conformal_p < 0.1 for v in lenient)


def patterned(first_seed: int, n: int) -> torch.Tensor:
    """White noise with a fixed pattern of random strength, as if some pictures had it: keys like it spread more."""
    noise, pattern = (
        initial_noise(list(range(s, s + k)), MODEL.latent_shape).double() for s, k in ((first_seed, n), (7, 1))
    )
    return noise + 0.5 * torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(first_seed)) * pattern


def test_p_at_an_early_stage_holds_for_every_key():
    keys = [key(seed, "rand") for seed in range(40)]
    calibration = Calibration.measure(patterned(0, 500), {"model": MODEL.identity}, {"drawn": 500})
    last = Detector(keys, null=WHITE, calibration=calibration)
    early, new = Detector(keys, null=WHITE).early(calibration), patterned(5000, 1000)
    shares = []
    for detector in (last, early):
        p = np.stack([10 ** detector.statistic(each.fingerprint, new)[1] for each in keys], 1)
        shares.append((p <= 0.01).mean(0))
    too_many = stats.binom.isf(1e-3 / len(keys), 1000, 0.01) / 1000
    assert shares[0].max() > too_many >= shares[1].max()


def test_p_at_an_early_stage_is_the_same_for_many_keys_and_for_one():
    keys = [key(1, "rand"), key(2, "rand"), key(1, "ring"), key(1, "zeros")]
    calibration = Calibration.measure(patterned(0, 100), {"model": MODEL.identity}, {"drawn": 100})
    detector, new = Detector(keys, null=WHITE).early(calibration), patterned(5000, 6)
    new[:2] = TreeRing(keys[0]).embed(new[:2])
    _, together = detector._scored(new)
    for k, each in enumerate(keys):
        assert together[:, k] == pytest.approx(detector.statistic(each.fingerprint, new)[1], rel=1e-5, abs=1e-5)


def test_the_density_at_an_early_stage_is_that_of_its_p():
    keys = [key(seed, "rand") for seed in range(20)]
    calibration = Calibration.measure(patterned(0, 200), {"model": MODEL.identity}, {"drawn": 200})
    detector = Detector(keys, null=WHITE).early(calibration)
    x = np.linspace(-0.5, 0.5, 2001)
    for each in keys:
        limit, density = detector.threshold(each.fingerprint), detector.density(each.fingerprint, x)
        assert np.trapezoid(density, x) == pytest.approx(1, abs=1e-3)
        assert np.trapezoid(density[x >= limit], x[x >= limit]) == pytest.approx(1e-3 / len(keys), rel=0.1)


def test_an_absence_that_no_unmarked_image_bears_out_is_inconclusive():
    mine, noise = key(1, "rand"), coloured(0, 600)
    least = np.argsort(on(noise, [mine]).reference_scores(mine.fingerprint))[:300]  # like the mark
    verdicts = [j.best for j in judged(on(noise[least], [mine]), coloured(1000, 100))]
    doubtful = [v for v in verdicts if v.present is None]
    assert len(doubtful) > 30
    assert all(v.p_value > 0.01 and v.conformal_p == pytest.approx(1 / 301) for v in doubtful)
    assert "; 0 of 300 unmarked images score as high" in doubtful[0].sentence()
    assert {v.present for v in verdicts if v.conformal_p > 0.1} == {False}


# --- at another size


def test_marks_of_another_size_are_found_and_ranks_are_left_to_the_own_size():
    shape, keys = (3, 24, 40), [key(1, "rand"), key(2, "ring")]
    calibrated = on(coloured(0, 60), keys, latent_shape=shape)
    noise = initial_noise(list(range(300)), shape)
    for detector in (calibrated, Detector(keys, null=WHITE.at(shape), latent_shape=shape)):
        marked = torch.cat([detector.schemes[k.fingerprint].embed(noise[:2]) for k in keys])
        for i, k in enumerate(keys):
            assert detector.reference_scores(k.fingerprint) is None
            p = 10 ** detector.statistic(k.fingerprint, marked)[1]
            assert p[2 * i : 2 * i + 2].max() < 1e-4 < np.delete(p, [2 * i, 2 * i + 1]).min()
    assert calibrated.null.mean == 0
    for k in keys:
        assert stats.kstest(10 ** detector.statistic(k.fingerprint, noise)[1], "uniform").pvalue > 0.01
    own = on(coloured(0, 60), keys)
    assert own.reference_scores(keys[0].fingerprint) is not None and isinstance(own.null.mean, torch.Tensor)


def test_notes_on_a_key_are_in_its_verdicts():
    first, second = key(1), key(2)
    detector = Detector([first, second], null=WHITE, notes={second.fingerprint: "of other weights"})
    ((one, other),) = (j.verdicts for j in judged(detector, initial_noise([1], MODEL.latent_shape)))
    assert one.notes == () and other.notes == ("of other weights",)


def test_zeros_are_tested_at_the_calibrated_size_alone():
    own = on(coloured(0, 60), [key(1, "zeros")])
    assert own.reference_scores(key(1, "zeros").fingerprint) is not None
    with pytest.raises(SchemeError) as caught:
        on(coloured(0, 60), [key(1, "rand"), key(1, "zeros")], latent_shape=(3, 24, 40))
    assert caught.value.code == "scheme.unranked"
