"""A measured null whitens what it was measured on, gives true p-values for any key, and comes back as it was saved."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from identity import of_shape, secret
from scipy import stats

import ringmark.data.files
import ringmark.watermark.calibration
from ringmark.errors import CalibrationError, KeyFileError
from ringmark.inversion.noise_recovery import NoiseRecovery, rings
from ringmark.watermark.calibration import BORROWED, FOLDS, LEAST, Calibration, smooth
from ringmark.watermark.keys.key import Key
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.base import make_key
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.statistics import agreement, conformal_p, cosine_test

SHAPE = (3, 24, 24)
SIDE, RING = min(SHAPE[1:]), rings(*SHAPE[1:]).numpy()
BINS = np.bincount(RING.ravel())
PROFILE = np.exp(-np.arange(len(BINS)) / 8) + 0.1
MIXING = np.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.5, 0.4, 1.5]])
TRUTH = PROFILE[:, None, None] * (MIXING @ MIXING.T)  # (R, C, C)
RECOVERY = NoiseRecovery(*torch.rand(2, 3, len(BINS), dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
SETTINGS = {
    "model": {"name": "pocket", "fingerprint": "0123", "latent_shape": list(SHAPE)},
    "image_size": [96, 96],
    "method": "Anderson()",
    "steps": 25,
}


def recovered(rng, n: int, own_scale: float = 0.0, shape=SHAPE, profile=PROFILE) -> np.ndarray:
    """Noise of coloured rings and correlated channels; each image may have its own scale."""
    white = np.fft.fft2(rng.normal(size=(n, *shape)))
    colour = np.sqrt(profile)[rings(*shape[1:]).numpy()]
    noise = np.fft.ifft2(np.einsum("cd,ndyx->ncyx", MIXING, white) * colour).real
    return noise * np.exp(own_scale * rng.normal(size=(n, 1, 1, 1)))


def scheme(pattern: str = "rand", seed: int = 0, channels=(0, 2), radii=(2, 6), mask: str = "centred", shape=SHAPE):
    placed = {"channels": channels, "radii": radii}
    return TreeRing(make_key("tree-ring", **of_shape(shape), pattern=pattern, mask=mask, secret=secret(seed), **placed))


def judge(some: TreeRing, noise: torch.Tensor, null: Null, references=None) -> tuple[np.ndarray, np.ndarray]:
    """Scores and p-values (B,) of recovered noise under a null."""
    test = some.on(null)
    scores = test.score(test.observe(noise))
    return scores, 10 ** test.log10_p(scores, references)


def features(some: TreeRing, noise: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Those of noise (B, d), not whitened, and of the key (d,)."""
    transform = torch.fft.fft2(noise.double(), norm="ortho")[:, list(some.placement.channels)]
    return some.features(transform).numpy(), some.features(some.hermitian[None])[0].numpy()


def measured(n: int, seed: int = 0, **kwargs) -> Calibration:
    return Calibration.measure(recovered(np.random.default_rng(seed), n, **kwargs), SETTINGS, {"drawn": n})


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return measured(300, own_scale=0.3)


@pytest.fixture(scope="module")
def fresh() -> torch.Tensor:
    return torch.from_numpy(recovered(np.random.default_rng(99), 1500, own_scale=0.3))


@pytest.fixture
def path(tmp_path) -> Path:
    measured(LEAST).save(tmp_path / "cal.safetensors")
    return tmp_path / "cal.safetensors"


# --- the covariance


def test_the_covariance_is_that_of_the_noise():
    made = measured(400)
    assert made.null.covariance.shape == (len(BINS), 3, 3) and made.n == 400 and made.sources == {"drawn": 400}
    deviation = np.sqrt(TRUTH.diagonal(axis1=1, axis2=2))
    error = (made.null.covariance - TRUTH) / (deviation[:, :, None] * deviation[:, None])
    # Five standard errors of a ring's variance, and what a slope costs where neighbours lend.
    assert (np.abs(error).max((1, 2)) < 5 * np.sqrt(2 / (400 * BINS)) + 0.02).all()


def test_unit_noise_has_unit_variance_on_every_ring():
    noise = np.random.default_rng(1).normal(size=(300, *SHAPE))
    covariance = Calibration.measure(noise, {}, {"other": 300}).null.covariance
    assert np.allclose(covariance, np.eye(3), atol=0.12)
    weight = BINS[:, None, None] / BINS.sum()
    assert np.allclose(
        (covariance * weight).sum(0), np.einsum("ncyx,ndyx->cd", noise, noise) / noise[:, 0].size, atol=0.01
    )


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 12), (2, 16, 7)])
def test_any_latent_shape(shape):
    noise = np.random.default_rng(2).normal(size=(LEAST, *shape))
    made = Calibration.measure(noise, {}, {"drawn": LEAST}, reach=max(shape))
    assert torch.allclose(made.noise(), torch.from_numpy(noise), atol=0.01)  # all rings are stored, in 16 bits
    low = Calibration.measure(noise, {}, {"drawn": LEAST})
    kept = torch.fft.fft2(torch.from_numpy(noise)) * (rings(*shape[1:]) <= min(shape[1:]) * 3 // 8)
    assert torch.allclose(low.noise(), torch.fft.ifft2(kept).real, atol=0.01)
    assert torch.equal(low.noise(slice(3, None, 5)), low.noise()[3::5])


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=30))
def test_smoothing_keeps_a_constant(weight):
    constant = np.broadcast_to(TRUTH[0], (len(weight), 3, 3))
    assert np.allclose(smooth(constant, np.array(weight)), constant)


def test_smoothing_by_hand():
    ring = np.array([1.0, 0, 0, 0, 0])
    assert np.allclose(smooth(ring, np.full(5, 10)), [1 / 1.75, 0.5 / 2.25, 0.25 / 2.5, 0, 0])
    few = smooth(ring, np.array([1, 4, 4, 4, 4]))
    assert few[0] == pytest.approx(1 / (1 + 2 + 1))  # a ring of few bins borrows much, and lends little
    assert few[1] == pytest.approx(0.5 / (0.5 + 4 + 2 + 1))
    assert np.abs(smooth(ring, np.full(5, 1000 * BORROWED)) - ring).max() < 1e-3  # well measured rings are left alone


def test_smoothing_brings_few_images_nearer_to_the_truth():
    # The mean square error over a hundred sets of 19 images, rings of few bins above all.
    rng = np.random.default_rng(3)
    weight = LEAST * BINS
    raw = PROFILE * np.stack([rng.chisquare(weight) / weight for _ in range(100)])
    smoothed = np.stack([smooth(row, weight) for row in raw])
    before, after = (np.square(x / PROFILE - 1).mean(0) for x in (raw, smoothed))
    assert (after[:5] < 0.75 * before[:5]).all() and after.max() < before.max() / 2


# --- what is whitened


@pytest.mark.parametrize("pattern, mask", [("rand", "centred"), ("ring", "centred"), ("rand", "published")])
def test_whitened_features_have_the_identity_for_their_covariance(pattern, mask):
    noise = torch.from_numpy(recovered(np.random.default_rng(4), 3000))
    observed = scheme(pattern, channels=(2, 0), radii=(2, 3), mask=mask).on(Null(TRUTH, SIDE)).observe(noise)
    covariance = observed.T @ observed / len(noise)
    assert np.abs(covariance - np.eye(len(covariance))).max() < 0.12


def test_one_channel_is_divided_by_its_deviation(calibration, fresh):
    one, deviation = scheme(channels=(1,)), np.sqrt(calibration.null.covariance[RING, 1, 1])
    transform = torch.fft.fft2((fresh[:50] - calibration.null.mean)[:, 1:2], norm="ortho")
    white, key = (one.features(x / torch.from_numpy(deviation)).numpy() for x in (transform, one.hermitian[None]))
    assert np.allclose(judge(one, fresh[:50], calibration.null), cosine_test(white, key[0]))


@pytest.mark.slow
def test_what_all_images_share_is_taken_away():
    rng, shift = np.random.default_rng(21), np.random.default_rng(22).normal(size=SHAPE)
    made = Calibration.measure(recovered(rng, 300) + 0.3 * shift, SETTINGS, {"drawn": 300})
    new, tilts = torch.from_numpy(recovered(rng, 400) + 0.3 * shift), []
    for null in (Null(made.null.covariance, SIDE), made.null):
        scores = [judge(scheme(seed=seed), new, null)[0] for seed in range(30)]
        tilts.append(np.std([score.mean() / score.std() for score in scores]))
    # 300 images leave 1/√300 of the deviation in each bin, 400 scores have a mean to within 1/√400.
    assert tilts[0] > 0.25 and tilts[1] < 1.5 * np.hypot(300**-0.5, 400**-0.5)


def test_nothing_is_taken_away_where_images_share_nothing():
    noise = recovered(np.random.default_rng(23), LEAST)
    made = Calibration.measure(noise, SETTINGS, {"drawn": LEAST}, reach=max(SHAPE))
    assert made.null.mean.square().mean() < 0.2 * np.square(noise.mean(0)).mean()


def test_white_noise_needs_no_calibration(fresh):
    for pattern in ("rand", "ring"):
        expected = cosine_test(*features(scheme(pattern), fresh[:20]))
        assert np.allclose(judge(scheme(pattern), fresh[:20], Null.white(SHAPE)), expected)


PATTERNS = [
    ("rand", "centred"),
    ("ring", "centred"),
    ("rand", "published"),
    ("ring", "published"),
    ("zeros", "centred"),
]


@pytest.mark.parametrize("pattern, mask", PATTERNS)
def test_p_values_of_coloured_correlated_noise_are_uniform(calibration, fresh, pattern, mask):
    # The bins beside lie within 2 to 8: the inmost rings of 300 images are known to some per cent only.
    radii = (4, 6) if pattern == "zeros" else (2, 6)
    some = scheme(pattern, seed=5, channels=(0, 1, 2), mask=mask, radii=radii)
    score, p = judge(some, fresh, calibration.null)
    conformal = conformal_p(score, calibration.reference_scores(some))
    assert stats.kstest(p, "uniform").pvalue > 0.01
    for level in (0.05, 0.01):
        low, high = stats.binom.interval(0.999, len(p), level)
        assert low <= (p <= level).sum() <= high
        assert (conformal <= level).mean() <= level + 4 * np.sqrt(
            level / calibration.n
        )  # 300 references share their luck
    assert agreement(p, conformal, calibration.n).mean() > 0.999


@pytest.mark.slow
def test_zeros_stay_true_where_power_strays_from_ring_to_ring():
    rng, some = np.random.default_rng(25), scheme("zeros", radii=(4, 6))
    inner = torch.from_numpy(np.isin(rings(*SHAPE[1:]).numpy(), (2, 3)))

    def strayed(n: int) -> torch.Tensor:
        spectrum = torch.fft.fft2(torch.from_numpy(recovered(rng, n)))
        gain = torch.from_numpy(np.exp(rng.normal(0, 0.4, (n, 1, 1, 1))))
        return torch.fft.ifft2(torch.where(inner, gain * spectrum, spectrum)).real

    made, new = Calibration.measure(strayed(300).numpy(), SETTINGS, {"drawn": 300}), strayed(2000)
    references, chance = made.reference_scores(some), judge(some, new, made.null)[1]
    score, p = judge(some, new, made.null, references)
    for level in (0.05, 0.01):
        low, high = stats.binom.interval(0.999, len(p), level)
        assert low <= (p <= level).sum() <= high < (chance <= level).sum()
    assert np.allclose(score, judge(some, new, made.null)[0])
    assert (judge(some, some.embed(new[:20]), made.null, references)[1] < 1e-6).all()


def test_cosines_are_tested_on_the_null_alone(calibration, fresh):
    some = scheme("rand")
    referred = judge(some, fresh[:9], calibration.null, calibration.reference_scores(some))
    assert np.array_equal(referred, judge(some, fresh[:9], calibration.null))


def test_without_the_covariance_they_are_not(fresh):
    # The same key in two channels that are correlated by 0.8.
    some = scheme("rand", channels=(0, 1))
    some._stored = some.spectrum[[0, 0]]
    p = judge(some, fresh, Null(TRUTH * np.eye(3), SIDE))[1]
    assert (p <= 0.001).mean() > 0.005
    assert stats.kstest(judge(some, fresh, Null(TRUTH, SIDE))[1], "uniform").pvalue > 0.01


def test_whitening_finds_a_weak_mark_better():
    some = scheme("rand", channels=(0, 1), seed=6)
    rng = np.random.default_rng(7)
    noise = torch.from_numpy(recovered(rng, 400))
    zero = torch.zeros(1, *SHAPE, dtype=torch.float64)
    noise[:200] += 0.15 * some.embed(zero)
    white, plain = judge(some, noise, Null(TRUTH, SIDE))[1], cosine_test(*features(some, noise))[1]
    assert np.median(white[:200]) < np.median(plain[:200]) / 10


# --- the references


def test_a_reference_is_scored_without_its_own_part(calibration):
    some = scheme("ring")
    noise = calibration.noise()
    k = 3
    rest = np.arange(calibration.n) % FOLDS != k
    alone = Calibration.measure(
        recovered(np.random.default_rng(0), 300, own_scale=0.3)[rest], SETTINGS, {"drawn": int(rest.sum())}
    )
    without = calibration._null(without=k)
    assert np.allclose(alone.null.covariance, without.covariance) and np.allclose(alone.null.mean, without.mean)
    expected = judge(some, noise[k::FOLDS], alone.null)[0]
    assert np.allclose(calibration.reference_scores(some)[k::FOLDS], expected)


@pytest.mark.parametrize("pattern, mask", PATTERNS)
def test_stored_spectra_give_the_scores_of_the_noises_themselves(pattern, mask):
    noise = recovered(np.random.default_rng(8), 40)
    made = Calibration.measure(noise, SETTINGS, {"drawn": 40})
    some = scheme(pattern, mask=mask, radii=(2, 5))
    score = np.empty(40)
    for k in range(FOLDS):
        score[k::FOLDS] = judge(some, torch.from_numpy(noise[k::FOLDS]), made._null(without=k))[0]
    assert np.allclose(made.reference_scores(some), score, atol=2e-3)


@pytest.mark.slow
def test_cross_fitted_p_values_are_those_of_full_conformal_prediction():
    # Exactly valid, and slow: the new image takes part in the covariance that scores it and every reference alike.
    rng, n = np.random.default_rng(9), 99
    noise, new = recovered(rng, n, own_scale=0.3), recovered(rng, 60, own_scale=0.3)
    made, some = Calibration.measure(noise, SETTINGS, {"drawn": n}), scheme("rand", seed=3)
    cross = conformal_p(judge(some, torch.from_numpy(new), made.null)[0], made.reference_scores(some))
    full = []
    for one in new:
        both = np.concatenate([noise, one[None]])
        null = Calibration.measure(both, SETTINGS, {"drawn": n + 1}).null
        score = judge(some, torch.from_numpy(both), null)[0]
        full.append(conformal_p(score[-1], score[:-1]))
    assert np.rint((n + 1) * np.abs(cross - full)).max() <= 3 and abs((cross - full).mean()) < 0.5 / (n + 1)


@pytest.mark.slow
def test_conformal_p_values_hold_their_level_over_calibrations():
    # From as few images as there may be, so that a covariance that had seen its references would show.
    some, p = scheme("rand", channels=(0, 1, 2), radii=(1, 7)), []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        made = Calibration.measure(recovered(rng, LEAST), SETTINGS, {"drawn": LEAST})
        new = torch.from_numpy(recovered(rng, 5))
        p.append(conformal_p(judge(some, new, made.null)[0], made.reference_scores(some)))
    p = np.array(p)
    for level in (0.05, 0.25, 0.5, 0.75):
        share = (p <= level).mean(1)
        assert abs(share.mean() - level) < 3.5 * max(share.std(), 0.1) / np.sqrt(60)


@pytest.mark.parametrize("changes", [{"radii": (3, 10)}, {"radii": (3, 9), "mask": "published"}, {"pattern": "zeros"}])
def test_a_key_beyond_the_stored_rings_is_refused(calibration, changes):
    assert calibration.reach == 9
    calibration.reference_scores(scheme(radii=(3, 9)))
    some = scheme(**{"radii": (3, 8)} | changes)
    for act in (calibration.reference_scores, calibration.check_reach):
        with pytest.raises(CalibrationError, match=r"\b9\b") as caught:
            act(some)
        assert caught.value.code == "calibration.reach"


def test_trimmed_it_is_smaller_and_serves_keys_of_low_rings_as_before(calibration, tmp_path):
    whole = replace(calibration, earlier=(calibration,))
    trimmed, low = whole.trimmed(7), scheme(radii=(2, 6))
    assert (trimmed.reach, trimmed.earlier, trimmed.n) == (7, (), whole.n) and whole.trimmed(99).reach == whole.reach
    before, after = whole.reference_scores(low), trimmed.reference_scores(low)
    assert np.abs(after - before).max() < 0.01 * before.std()
    with pytest.raises(CalibrationError) as caught:
        trimmed.check_reach(scheme(radii=(2, 8)))
    assert caught.value.code == "calibration.reach"
    sizes = []
    for i, each in enumerate((whole, trimmed)):
        each.save(tmp_path / str(i))
        sizes.append((tmp_path / str(i)).stat().st_size)
    assert sizes[1] < sizes[0] / 2 and Calibration.load(tmp_path / "1").fingerprint == trimmed.fingerprint


def test_its_null_serves_other_sizes(calibration):
    assert calibration.null_at(SHAPE) is calibration.null
    other = calibration.null_at((3, 24, 32))
    assert not other.layout_known and calibration.null_at((3, 30, 30)).mean.shape == (3, 30, 30)
    assert other.mean == 0 and other.covariance is calibration.null.covariance and other.side == SIDE
    with pytest.raises(CalibrationError) as caught:
        calibration.null_at((4, 24, 24))
    assert caught.value.code == "calibration.channels" and caught.value.subject == calibration.name


@pytest.mark.parametrize("size", [(24, 37), (11, 24), (48, 48), (6, 6)])
def test_sizes_far_from_its_own_are_refused(calibration, size):
    with pytest.raises(CalibrationError) as caught:
        calibration.null_at((3, *size))
    assert caught.value.code == "calibration.size" and caught.value.subject == calibration.name
    for shape in ((3, 12, 36), (3, 36, 36), (3, 12, 12), (3, 20, 30)):
        assert calibration.null_at(shape).side == SIDE


def test_too_few_images_for_a_level(calibration):
    calibration.check_level(0.01)
    with pytest.raises(CalibrationError, match=r"300 .*0\.0033") as caught:
        calibration.check_level(1e-3)
    assert caught.value.code == "calibration.level" and caught.value.details["needed"] == 999


# --- what cannot be measured


def unmeasured(noise, sources: dict[str, int]) -> CalibrationError:
    """The error with which no calibration is made of this noise."""
    with pytest.raises(CalibrationError) as caught:
        Calibration.measure(noise, {}, sources)
    assert "\n" not in str(caught.value)
    return caught.value


def test_too_few_images_at_all():
    noise = recovered(np.random.default_rng(0), LEAST)
    error = unmeasured(noise[:-1], {"drawn": LEAST - 1})
    assert (error.code, error.subject) == ("calibration.too-few", f"{LEAST - 1} unmarked images")
    assert f"at least {LEAST}" in error.fact
    assert unmeasured(noise, {"drawn": 3, "other": 4}).code == "calibration.sources"


def test_noise_of_nothing():
    noise = recovered(np.random.default_rng(0), 30)
    broken = noise.copy()
    broken[[7, 9], 0, 3, 4] = np.nan, np.inf
    error = unmeasured(broken, {"drawn": 30})
    assert error.code == "calibration.not-finite" and "2 of 30 " in error.fact and "number 7" in error.fact
    for bad in (np.zeros_like(noise), np.ones_like(noise), noise * [[[[1]], [[0]], [[1]]]], noise[:, [0, 0, 1]]):
        error = unmeasured(bad, {"drawn": 30})
        assert error.code == "calibration.degenerate" and "some channel on ring" in error.fact
    error = unmeasured(noise * 1e6, {"drawn": 30})
    assert error.code == "calibration.degenerate" and "16-bit" in error.fact


def test_tensors_and_arrays_of_any_float():
    noise = recovered(np.random.default_rng(0), 20).astype(np.float32)
    a, b = (Calibration.measure(x, SETTINGS, {"drawn": 20}) for x in (noise, torch.from_numpy(noise)))
    assert a.fingerprint == b.fingerprint and a.power.dtype == np.float64 and a.spectra.dtype == np.float16


# --- settings


def unfitting(calibration: Calibration, settings: dict) -> CalibrationError:
    with pytest.raises(CalibrationError) as caught:
        calibration.check(settings)
    assert caught.value.code == "calibration.settings"
    return caught.value


def test_only_its_own_settings_will_do(calibration):
    calibration.check(SETTINGS)
    calibration.check(json.loads(json.dumps(SETTINGS)))
    calibration.check(SETTINGS | {"image_size": (64, 96)})  # see `null_at`
    other = SETTINGS | {"steps": 50, "model": SETTINGS["model"] | {"fingerprint": "9999"}}
    error = unfitting(replace(calibration, name="my.cal"), other | {"gradient": True})
    assert error.subject == "my.cal"
    for difference in (
        "gradient was not set, is True",
        "model fingerprint was 0123, is 9999",
        "steps was 25, is 50",
    ):
        assert difference.lower() in error.fact.lower()
    assert error.fact.count("; ") == 2 and "name" not in error.fact
    calibration.check(SETTINGS | {"model": SETTINGS["model"] | {"name": "moved"}})  # the same model all the same
    error = unfitting(calibration, {k: v for k, v in SETTINGS.items() if k != "method"})
    assert error.subject == "calibration" and "method was " in error.fact and "is not set" in error.fact


def test_a_calibration_in_float32_serves_half_precision_but_not_the_other_way_round(calibration):
    single, half = (
        replace(calibration, settings=SETTINGS | {"dtype": f"torch.{name}"}) for name in ("float32", "float16")
    )
    for name in ("float32", "float16", "bfloat16"):
        single.check(SETTINGS | {"dtype": f"torch.{name}"})
    assert "dtype was torch.float32, is torch.float64" in unfitting(single, SETTINGS | {"dtype": "torch.float64"}).fact
    for name in ("float32", "bfloat16"):
        assert "dtype" in unfitting(half, SETTINGS | {"dtype": f"torch.{name}"}).fact


def test_timesteps_are_compared_where_the_steps_are_the_same(calibration):
    timed = replace(calibration, settings=SETTINGS | {"timesteps": "1-961"})
    assert "timesteps was 1-961, is 1-981" in unfitting(timed, SETTINGS | {"timesteps": "1-981"}).fact
    assert "timesteps" not in unfitting(timed, SETTINGS | {"timesteps": "1-981", "steps": 50}).fact


# --- the file


def test_there_and_back(calibration, tmp_path):
    calibration.save(tmp_path / "new" / "cal.safetensors")
    back = Calibration.load(tmp_path / "new" / "cal.safetensors")
    for field in ("power", "spectra"):
        a, b = getattr(calibration, field), getattr(back, field)
        assert a.dtype == b.dtype and np.array_equal(a, b)
    for field in ("latent_shape", "reach", "settings", "sources", "n", "fingerprint"):
        assert getattr(calibration, field) == getattr(back, field)
    assert np.array_equal(back.reference_scores(scheme()), calibration.reference_scores(scheme()))
    assert os.listdir(tmp_path / "new") == ["cal.safetensors"]


def test_a_thousand_images_of_the_pocket_model_are_a_few_megabytes(tmp_path):
    noise = np.zeros((1, 4, 32, 32))
    assert 1000 * ringmark.watermark.calibration.pack(noise, 32 // 3).nbytes < 3e6


def test_the_fingerprint_is_of_everything(path):
    made = Calibration.load(path)
    changes = {
        "power": made.power * (1 + 1e-12),
        "spectra": made.spectra[::-1],
        "reach": 7,
        "latent_shape": (3, 24, 25),
        "settings": made.settings | {"steps": 26},
        "sources": {"other": LEAST},
        "recovery": RECOVERY,
    }
    prints = {replace(made, **{name: value}).fingerprint for name, value in changes.items()}
    prints.add(replace(made, recovery=NoiseRecovery(RECOVERY.variance, RECOVERY.attenuation)).fingerprint)
    assert len(prints | {made.fingerprint}) == 9 and replace(made, name="moved").fingerprint == made.fingerprint


def parts(path: Path) -> tuple[dict, bytes]:
    """Header and body of a safetensors file."""
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def put(path: Path, header: dict, body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def put_description(path: Path, **changes) -> None:
    header, body = parts(path)
    stored = json.loads(header["__metadata__"]["ringmark calibration"]) | changes
    described = json.dumps({k: v for k, v in stored.items() if v is not None})
    put(path, header | {"__metadata__": {"ringmark calibration": described}}, body)


def refused(path: Path) -> str:
    """The code of the error, one line that names the file, with which it is not loaded."""
    with pytest.raises(CalibrationError) as caught:
        Calibration.load(path)
    message = str(caught.value)
    assert str(caught.value.subject) == str(path) and message.startswith(f"{path}: ")
    assert "\n" not in message and len(message) > len(str(path)) + 10
    return caught.value.code


def test_missing_files_folders_and_other_bytes(tmp_path):
    assert refused(tmp_path / "none") == "calibration.missing"
    assert refused(tmp_path) == "calibration.folder"
    for content in (b"", b"\0", b"text", b"\xff" * 4096, struct.pack("<Q", 2**63) + b"{}", b"\x02" + b"\0" * 7 + b"{}"):
        (tmp_path / "x").write_bytes(content)
        assert refused(tmp_path / "x") == "calibration.damaged"


def test_a_key_is_no_calibration_and_the_other_way_round(path, tmp_path):
    make_key("tree-ring", **of_shape(SHAPE), channels=(0,), radii=(2, 5)).save(tmp_path / "my.key")
    assert refused(tmp_path / "my.key") == "calibration.damaged"
    with pytest.raises(KeyFileError) as caught:
        Key.load(path)
    assert caught.value.code == "key.damaged"


def test_cut_or_lengthened(path):
    content = path.read_bytes()
    for some in [content[:n] for n in (7, 8, 9, len(content) // 2, len(content) - 1)] + [content + b"\0"]:
        path.write_bytes(some)
        refused(path)


def test_no_bit_can_be_turned(path):
    header, body = parts(path)
    for i in np.random.default_rng(10).integers(0, 8 * len(body), 60):
        turned = bytearray(body)
        turned[i // 8] ^= 1 << i % 8
        put(path, header, bytes(turned))
        assert refused(path) == "calibration.fingerprint"


@pytest.mark.parametrize("field", ["latent_shape", "reach", "settings", "sources", "fingerprint"])
def test_no_field_may_be_altered_or_missing(path, field):
    stored = json.loads(parts(path)[0]["__metadata__"]["ringmark calibration"])
    content = path.read_bytes()
    same_type = {list: [3, 24, 23], dict: {}, int: 7, str: "other"}[type(stored[field])]
    for value in (same_type, None, 1.5, [], "x", [1, 2, True], {"drawn": -1}, {"drawn": []}):
        path.write_bytes(content)
        put_description(path, **{field: value})
        refused(path)


@pytest.mark.parametrize(
    "shape", [[3, 2**20, 2**20], [0, 24, 24], [3, 24], [3, -24, -24], [2**40, 1, 1], [3, 24, 24, 1]]
)
def test_a_shape_is_checked_before_anything_is_allocated(path, shape, monkeypatch):
    put_description(path, latent_shape=shape)
    monkeypatch.setattr(ringmark.watermark.calibration, "rings", lambda *_: pytest.fail("allocated"))
    refused(path)


@pytest.mark.parametrize("name, dtype, size", [("power", "F32", 4), ("spectra", "I16", 2), ("spectra", "BF16", 2)])
def test_numbers_of_another_type(path, name, dtype, size):
    header, body = parts(path)
    first, last = header[name]["data_offsets"]
    put(path, header | {name: header[name] | {"dtype": dtype, "shape": [(last - first) // size]}}, body)
    refused(path)
    put(path, header | {name: header[name] | {"dtype": dtype}}, body)
    refused(path)


def test_recoverability_comes_back_and_is_checked(path):
    made = Calibration.load(path)
    assert made.recovery is None
    replace(made, recovery=RECOVERY).save(path)
    back = Calibration.load(path)
    for field in ("attenuation", "variance"):
        assert torch.equal(getattr(back.recovery, field), getattr(RECOVERY, field))
    for field, value in (("attenuation", np.nan), ("variance", np.inf), ("variance", 0.0), ("variance", -1.0)):
        wrong = getattr(RECOVERY, field).clone()
        wrong[1, 2] = value
        replace(made, recovery=replace(RECOVERY, **{field: wrong})).save(path)
        assert refused(path) == "calibration.fingerprint"
    for wrong in (RECOVERY.variance[:2], RECOVERY.variance[:, :-1], RECOVERY.variance.float()):
        replace(made, recovery=replace(RECOVERY, variance=wrong)).save(path)
        assert refused(path) == "calibration.damaged"


def test_earlier_stages_come_back_and_are_checked(path):
    made, early = Calibration.load(path), replace(measured(LEAST, 1), settings=SETTINGS | {"steps": 3})
    whole = replace(made, earlier=(early,))
    whole.save(path)
    back = Calibration.load(path)
    assert back.fingerprint == whole.fingerprint != made.fingerprint
    assert (back.earlier[0].fingerprint, back.earlier[0].settings["steps"]) == (early.fingerprint, 3)
    content = path.read_bytes()
    for wrong in ([], [{}], [{"model": "x"}], [SETTINGS, SETTINGS], "x", None):
        path.write_bytes(content)
        put_description(path, earlier=wrong)
        refused(path)
    without = {name: value for name, value in SETTINGS.items() if name != "steps"}
    for wrong in (without, *(SETTINGS | {"steps": steps} for steps in (None, [3], {}, 3.0, "3", True))):
        for described in (replace(made, earlier=(replace(early, settings=wrong),)), replace(made, settings=wrong)):
            described.save(path)
            assert refused(path) == "calibration.damaged"
    for wrong in (measured(LEAST + 1), measured(LEAST, shape=(3, 24, 26)), replace(early, power=0 * early.power)):
        replace(made, earlier=(wrong,)).save(path)
        refused(path)


def test_a_missing_table(path):
    from safetensors.numpy import load_file, save_file

    replace(Calibration.load(path), recovery=RECOVERY).save(path)
    metadata = parts(path)[0]["__metadata__"]
    tensors = load_file(path)
    for name in tensors:
        save_file({k: v for k, v in tensors.items() if k != name}, path, metadata)
        refused(path)


@pytest.mark.parametrize("field", ["power", "spectra"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_numbers_that_whiten_nothing_are_refused_even_if_the_fingerprint_fits(path, field, value):
    made = Calibration.load(path)
    replace(made, **{field: np.full_like(getattr(made, field), value)}).save(path)
    if (field, value) != ("spectra", 0):
        assert refused(path) == "calibration.fingerprint"


def test_too_large_a_file_is_not_read(path, monkeypatch):
    monkeypatch.setattr(ringmark.watermark.calibration, "MAX_BYTES", 1000)
    assert refused(path) == "calibration.too-large"


def test_deep_descriptions(path):
    header, body = parts(path)
    for text in ("", "null", "[]", "7", "{", "[" * 10**5, '{"a": ' + "1" * 5000 + "}"):
        put(path, header | {"__metadata__": {"ringmark calibration": text}}, body)
        refused(path)


def test_a_pickle_is_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "x").write_bytes(pickle.dumps(Trap()))
    refused(tmp_path / "x")
    assert not (tmp_path / "sprung").exists()


def test_saving_is_whole_or_not_at_all(path, monkeypatch):
    before, made = path.read_bytes(), measured(LEAST + 1)

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ringmark.data.files.os, "replace", fail)
    with pytest.raises(CalibrationError) as caught:
        made.save(path)
    assert (caught.value.code, caught.value.subject) == ("file.full", path)
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
    made.save(path)
    assert Calibration.load(path).n == LEAST + 1
    with pytest.raises(CalibrationError) as caught:
        made.save(path / "below")
    assert caught.value.code == "calibration.unwritable"
