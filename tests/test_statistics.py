"""Under the null a p-value is uniform: what claims to be one is tested by Kolmogorov and Smirnov."""

from __future__ import annotations

import math
import warnings

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from identity import of_shape, secret
from scipy import integrate, special, stats

from ringmark.watermark.schemes.base import make_key
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.statistics import (
    agreement,
    conformal_p,
    corrected,
    cosine_bound,
    cosine_density,
    cosine_log10_p,
    cosine_p,
    cosine_scores,
    cosine_test,
    fisher,
    inflation,
    matched_filter,
    needed_references,
    power_p,
    power_scores,
    published_distance,
    published_p_value,
    spread_log10_p,
    undecided,
    widened,
)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def uniform(p_values) -> bool:
    return stats.kstest(p_values, "uniform").pvalue > 0.01


def within(p_values, level: float) -> bool:
    """Whether as many p-values are at most `level` as should be: inside the central 99 % of the binomial."""
    low, high = stats.binom.interval(0.99, len(p_values), level)
    return low <= (np.asarray(p_values) <= level).sum() <= high


@pytest.mark.parametrize("d", [2, 3, 10, 300])
@pytest.mark.parametrize("scale", ["one", "own"])
def test_cosine_p_values_are_uniform_under_spherical_nulls(d, scale):
    rng = np.random.default_rng(d)
    noise = rng.normal(size=(4000, d)) * (np.exp(3 * rng.normal(size=(4000, 1))) if scale == "own" else 1)
    p = cosine_test(noise, rng.normal(size=d))[1]
    assert uniform(p) and within(p, 0.01) and within(p, 0.001)


def test_a_spherical_null_need_not_be_normal():
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(4000, 20)) / np.sqrt(rng.chisquare(1, size=(4000, 1)))  # multivariate Cauchy
    assert uniform(cosine_test(noise, np.eye(20)[3])[1])


def test_cosine_test_is_pearsons_after_an_isometry():
    # Centred vectors of d + 1 numbers are a space of d dimensions: there the correlation is the cosine.
    rng, d = np.random.default_rng(2), 12
    basis = np.linalg.qr(np.column_stack([np.ones(d + 1), rng.normal(size=(d + 1, d))]))[0][:, 1:]
    f, k = rng.normal(size=(20, d)) + 0.5, rng.normal(size=d) + 0.5
    c, p = cosine_test(f, k)
    expected = [stats.pearsonr(basis @ row, basis @ k, alternative="greater") for row in f]
    assert np.allclose(c, [e.statistic for e in expected], atol=1e-12)
    assert np.allclose(p, [e.pvalue for e in expected], rtol=1e-9)


def test_cosine_test_by_hand():
    c, p = cosine_test(np.array([[3.0, 4, 0], [-3, -4, 0], [0, 0, 1]]), np.array([1.0, 0, 0]))
    assert np.allclose(c, [0.6, -0.6, 0])
    # Archimedes: on the sphere in three dimensions the cosine is uniform on [-1, 1].
    assert np.allclose(p, [0.2, 0.8, 0.5])


@given(st.integers(2, 400), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_cosine_p_value_is_half_an_incomplete_beta_function(d, seed):
    rng = np.random.default_rng(seed)
    k = rng.normal(size=d)
    c, p = cosine_test(rng.normal(size=(5, d)) + rng.normal() * k, k)
    tail = special.betainc((d - 1) / 2, 0.5, (1 - c) * (1 + c)) / 2
    assert (np.abs(c) <= 1).all() and np.allclose(p, np.where(c > 0, tail, 1 - tail), rtol=1e-6, atol=1e-300)


@pytest.mark.parametrize("scale", [1e-6, 0.3, 1e6])
def test_an_images_own_scale_does_not_matter(scale):
    rng = np.random.default_rng(3)
    f, k, v = rng.normal(size=(50, 30)), rng.normal(size=30), rng.uniform(0.1, 3, 30)
    for a, b in zip(cosine_test(f, k, v), cosine_test(scale * f, 7 * scale * k, v), strict=True):
        assert np.allclose(a, b, rtol=1e-9)
    assert np.allclose(cosine_test(f, k, v)[0], cosine_test(f, k, scale * v)[0])


def test_zero_vectors_say_nothing():
    f = np.array([[0.0, 0, 0], [1, 2, 3]])
    assert [x.tolist() for x in cosine_test(f, np.zeros(3))] == [[0, 0], [0.5, 0.5]]
    c, p = cosine_test(f, f[1])
    assert c[0] == 0 and p[0] == 0.5


def test_the_key_itself():
    k = np.eye(50)[0]
    c, p = cosine_test(np.array([k, -k]), k)
    assert c.tolist() == [1, -1] and p.tolist() == [0, 1]
    rng = np.random.default_rng(4)
    c, p = cosine_test(np.outer([1, 1e-3, 1e3], k := rng.normal(size=200)), k)
    assert (c <= 1).all() and (c > 1 - 1e-12).all() and (p < 1e-200).all()


def exact_log10_p(c: float, d: int) -> float:
    """By numerical integration in many digits: P(cosine ≥ c) on the sphere in d dimensions."""
    with mpmath.workdps(60):
        c = mpmath.mpf(c)
        tail = mpmath.betainc(mpmath.mpf(d - 1) / 2, mpmath.mpf(1) / 2, 0, (1 - c) * (1 + c), regularized=True) / 2
        return float(mpmath.log10(tail if c > 0 else 1 - tail))


@pytest.mark.parametrize("d", [2, 3, 10, 312, 5000])
def test_log10_p_is_that_of_p_where_p_is_a_float(d):
    c = np.linspace(-0.999, 0.999, 2001)
    p = cosine_p(c, d)
    there = p > 1e-250
    assert there.sum() > 1000 and np.allclose(cosine_log10_p(c, d)[there], np.log10(p[there]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("d", [2, 3, 10, 312, 5000, 50_000])
def test_log10_p_against_many_digits_wherever_p_is_too_small(d):
    c = np.array([-0.9, -0.1, 0.0, 0.05, 0.3, 0.7, 0.99, 1 - 1e-6, 1 - 1e-12])
    found = cosine_log10_p(c, d)
    assert np.allclose(found, [exact_log10_p(value, d) for value in c], rtol=1e-5, atol=1e-12)
    assert (found < -320).sum() == {2: 0, 3: 0, 10: 0, 312: 2, 5000: 4, 50_000: 5}[d]


@given(st.integers(2, 20_000))
@settings(max_examples=60, deadline=None)
def test_log10_p_falls_all_the_way_and_is_always_finite(d):
    c = np.concatenate([np.linspace(-1 + 1e-9, 0.999, 4001), 1 - np.geomspace(1e-3, 1e-15, 50), [1.0]])
    found = cosine_log10_p(c, d)
    assert np.isfinite(found).all() and (found <= 0).all()
    assert (np.diff(found) <= 1e-9 * np.abs(found[1:])).all()
    if d > 400:  # across the place where p is no float any more
        assert (found < -330).any()


@pytest.mark.parametrize("d", [2, 3, 10, 312])
def test_the_cosines_density_integrates_to_one_and_to_p(d):
    def mass(low: float) -> float:
        """From `low` to 1, by c = sin θ, for in two dimensions the density has no bound at the ends."""
        of = integrate.quad(
            lambda angle: float(cosine_density(np.sin(angle), d)) * np.cos(angle), np.arcsin(low), np.pi / 2
        )
        return of[0]

    assert mass(-1) == pytest.approx(1, rel=1e-6)
    for c in (-0.5, 0.0, 0.1, 0.3):
        assert mass(c) == pytest.approx(float(cosine_p(c, d)), rel=1e-6)


@pytest.mark.parametrize("d", [2, 3, 10, 300, 5000])
@pytest.mark.parametrize("alpha", [0.05, 1e-3, 1e-4])
def test_at_the_bound_p_is_alpha(d, alpha):
    c = cosine_bound(d, alpha)
    key, across = np.eye(d)[0], np.eye(d)[1]
    score, p = cosine_test([c * key + (1 - c**2) ** 0.5 * across], key)
    assert 0 < c < 1 and score[0] == pytest.approx(c) and p[0] == pytest.approx(alpha, rel=1e-3)
    assert cosine_scores(np.array([c * key + (1 - c**2) ** 0.5 * across]), key) == pytest.approx(score)


def test_whitening_restores_what_colour_destroys():
    rng, d = np.random.default_rng(5), 200
    variance = np.geomspace(0.01, 10, d)
    noise = rng.normal(size=(4000, d)) * np.sqrt(variance) * np.exp(rng.normal(size=(4000, 1)))
    key = rng.normal(size=d) * np.sqrt(variance)
    white, coloured = cosine_test(noise, key, variance)[1], cosine_test(noise, key)[1]
    assert uniform(white) and within(white, 0.001)
    assert not uniform(coloured) and not within(coloured, 0.001)


def power_of(
    inside: np.ndarray, beside: list[np.ndarray], weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and p-values of the power test; sides count alike unless `weights` are given."""
    weights = np.full(len(beside), 1 / len(beside)) if weights is None else weights
    scores = power_scores(inside, beside, weights)
    sizes = np.array([side.shape[-1] for side in beside])
    return scores, power_p(scores, inside.shape[1], inside.shape[2], sizes, weights)


def conjugates(rng, rows: tuple[int, ...], pairs: int) -> np.ndarray:
    """Powers of complex bins of white noise, each with its conjugate's."""
    power = np.abs(rng.normal(size=(*rows, pairs)) + 1j * rng.normal(size=(*rows, pairs))) ** 2 / 2
    return np.repeat(power, 2, -1)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("d, pairs", [(4, (3,)), (5, (2, 9)), (40, (20, 100))])
def test_power_p_values_are_uniform_under_white_noise(channels, d, pairs):
    rng = np.random.default_rng([channels, d])
    inside, beside = rng.normal(size=(4000, channels, d)), [conjugates(rng, (4000, channels), k) for k in pairs]
    p = power_of(inside, beside)[1]
    assert uniform(p) and within(p, 0.01)
    inside, beside = rng.normal(size=(4000, channels, d)), [conjugates(rng, (4000, channels), k) for k in pairs]
    scale = np.exp(rng.normal(size=(4000, channels, 1)))
    assert uniform(power_of(scale * inside, [scale**2 * side for side in beside])[1])


def test_power_p_values_do_not_mind_a_slope():
    """Each channel's own, of the logarithm of the power."""
    rng = np.random.default_rng(11)
    slope = np.exp(rng.normal(size=(4000, 2, 1)))
    below, above = conjugates(rng, (4000, 2), 20), conjugates(rng, (4000, 2), 40)
    p = power_of(rng.normal(size=(4000, 2, 60)), [below * slope, above / slope])[1]
    assert uniform(p) and within(p, 0.01)


def test_power_test_where_the_mask_is_empty():
    rng = np.random.default_rng(6)
    for amplitude, most in ((0.3, 1e-8), (0, 0)):
        score, p = power_of(amplitude * rng.normal(size=(20, 1, 60)), [conjugates(rng, (20, 1), 60)])
        assert (p <= most).all() and (score > 1).all() and np.isfinite(score).all()
    assert (power_of(3 * rng.normal(size=(20, 1, 60)), [conjugates(rng, (20, 1), 60)])[1] > 0.999).all()


def test_power_test_where_the_sides_are_empty():
    score, p = power_of(np.ones((1, 1, 4)), [np.zeros((1, 1, 4))])
    assert np.isfinite(score).all() and p == 1


def test_power_test_by_hand():
    score, p = power_of(np.array([[[1.0, 1]]]), [np.array([[[4.0, 4]]])])
    assert np.allclose(score, np.log(4))
    assert np.allclose(p, 0.2)  # F with 2 and 2 degrees of freedom: x / (1 + x)
    score, p = power_of(np.array([[[1.0, 1]]]), [np.array([[[4.0, 4]]]), np.array([[[0.25, 0.25]]])])
    assert np.allclose(score, 0)  # the mean of the sides' logarithms
    beside = [np.array([[[4.0, 4]]]), np.array([[[2.0, 2]]])]
    assert np.allclose(power_of(np.array([[[1.0, 1]]]), beside, np.array([2.0, -1]))[0], np.log(8))


@pytest.mark.parametrize("n", [2, 20, 500])
def test_spread_p_values_of_normal_scores_are_uniform(n):
    """However few the references, if each score has its own."""
    drawn = np.random.default_rng([12, n]).normal(3, 0.2, (3000, n + 1))
    p = np.array([10 ** spread_log10_p(row[:1], row[1:])[0] for row in drawn])
    assert uniform(p) and within(p, 0.01)


def test_spread_p_by_hand():
    # Mean 2, deviation √(1/2), times √(3/2): the second score is one such unit above, and t₁ is Cauchy's.
    found = spread_log10_p(np.array([2, 2 + 0.75**0.5]), np.array([1.5, 2.5]))
    assert np.allclose(10**found, [0.5, 0.25])
    references = np.random.default_rng(0).normal(size=1000)
    t = (np.array([3.0, 58.0]) - references.mean()) / (references.std(ddof=1) * 1.001**0.5)
    far = spread_log10_p(np.array([3.0, 58.0]), references)
    assert far[0] == pytest.approx(stats.t.logsf(t[0], 999) / np.log(10)) and -400 < far[1] < -308  # p underflows


@pytest.mark.parametrize("spread", [1.0, 1.3, 2.0])
def test_p_values_widened_by_the_spread_of_references_are_uniform(spread):
    def log10_p(n):
        return stats.norm.logsf(np.random.default_rng([3, n]).normal(0, spread, n)) / np.log(10)

    measured = inflation(log10_p(4000)[:, None])
    assert measured == pytest.approx([spread], abs=0.05)
    assert uniform(10 ** widened(log10_p(2000), measured))


def test_widened_p_by_hand():
    # Φ(−4) and Φ(−2); p = 1/2 stays, and one key's spread does not touch another's.
    p = np.array([stats.norm.cdf(-4), 0.5])[:, None]
    assert np.allclose(10 ** widened(np.log10(p), np.array([1.0, 2.0])), [[p[0, 0], stats.norm.cdf(-2)], [0.5, 0.5]])
    far = widened(np.array([-1000.0, -np.inf, 0.0]), np.array(2.0))
    assert far == pytest.approx([-250, -np.inf, 0], rel=0.01, abs=1e-4)
    assert inflation(np.log10([[0.5], [0.5]])) == 1 and np.isfinite(inflation(np.zeros((3, 1)))).all()


def test_published_distance_by_hand():
    recovered = np.array([[3 + 4j, 1, 0], [0, 1, 2j]])
    assert np.allclose(published_distance(recovered, np.array([0, 1, 2j])), [7 / 3, 0])


def test_published_p_value_by_hand():
    recovered, key = np.array([[1 + 2j, -1j, 0.5]]), np.array([1 + 1j, 0, 1j])
    # As real numbers: (1, 0, .5, 2, −1, 0), of mean 5/12 and variance σ²; key (1, 0, 0, 1, 0, 1).
    variance = (1 + 0.25 + 4 + 1 - 6 * (2.5 / 6) ** 2) / 5
    x, noncentral = (0.25 + 1 + 1 + 1) / variance, 3 / variance
    # A non-central χ² is a Poisson mixture of central ones.
    j = np.arange(200)
    expected = (stats.poisson.pmf(j, noncentral / 2) * stats.chi2.cdf(x, 6 + 2 * j)).sum()
    assert np.allclose(published_p_value(recovered, key), expected, rtol=1e-9)


def white_noise(pattern: str, seed: int, number: int = 2000):
    """A key of one small latent channel and transforms of white noise on its mask, published and independent."""
    key = make_key(
        "tree-ring",
        **of_shape((1, 32, 32)),
        secret=secret(seed),
        pattern=pattern,
        mask="published",
        channels=(0,),
        radii=(0, 8),
    )
    scheme = TreeRing(key)
    noise = torch.randn(number, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    transform = torch.fft.fft2(noise.double(), norm="ortho")
    features = scheme.features(transform), scheme.features(scheme.hermitian[None])[0]
    return [[x.numpy() for x in pair] for pair in (scheme.masked(noise), features)]


def test_the_published_p_value_is_not_calibrated_where_the_cosine_is():
    published, cosine = [], []
    for pattern in ("ring", "rand"):
        for seed in range(3):
            masked, features = white_noise(pattern, seed)
            published.append(within(published_p_value(*masked), 0.01))
            cosine.append(within(cosine_test(*features)[1], 0.01))
    assert all(cosine) and not all(published)


def test_the_published_p_value_of_zeros_never_fires():
    (recovered, key), _ = white_noise("zeros", 0)
    # Whatever the power, σ is estimated from it: even an empty mask, as the key would have it, is not seen.
    for amplitude in (1, 0.1):
        assert published_p_value(amplitude * recovered, key).min() > 0.3


@pytest.mark.parametrize("d", [1, 3, 300])
def test_matched_filter_p_values_are_uniform_under_coloured_normal_nulls(d):
    rng = np.random.default_rng(d)
    variance = rng.uniform(0.01, 10, d)
    noise, key = rng.normal(size=(4000, d)) * np.sqrt(variance), rng.normal(size=d)
    z, p = matched_filter(noise, key, variance)
    assert uniform(p) and within(p, 0.001) and np.allclose(p, stats.norm.sf(z))


def test_matched_filter_by_hand():
    z, p = matched_filter(np.array([[3.0, 4], [-3, -4], [0, 5]]), np.array([2.0, 0]), np.array([4.0, 1]))
    assert np.allclose(z, [1.5, -1.5, 0]) and np.allclose(p, stats.norm.cdf([-1.5, 1.5, 0]))
    assert [x.tolist() for x in matched_filter(np.ones((2, 3)), np.zeros(3))] == [[0, 0], [0.5, 0.5]]


def test_only_the_cosine_forgives_an_images_own_scale():
    rng = np.random.default_rng(8)
    noise = rng.normal(size=(4000, 50)) * np.exp(rng.normal(size=(4000, 1)))
    key = rng.normal(size=50)
    assert uniform(cosine_test(noise, key)[1]) and not uniform(matched_filter(noise, key)[1])


def test_conformal_p_by_hand():
    assert conformal_p([5, 3, 2.5, -1], [1, 2, 3]).tolist() == [0.25, 0.5, 0.5, 1]  # a tie counts against the mark
    assert conformal_p(9.0, []) == 1 and conformal_p(np.zeros((2, 3)), [1.0]).shape == (2, 3)


def test_what_is_not_a_number_never_speaks_for_a_mark():
    assert conformal_p([np.nan, 5, np.inf, -np.inf], [1, np.nan, 3]).tolist() == [1, 0.5, 0.5, 1]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_conformal_p_is_valid_by_exchangeability(scores):
    # Any of the scores might have been the new one: over all choices P(p ≤ α) ≤ α, with equality without ties.
    n = len(scores) - 1
    p = np.sort([conformal_p(s, scores[:i] + scores[i + 1 :]) for i, s in enumerate(scores)])
    grid = np.arange(1, n + 2) / (n + 1)
    assert (p >= grid - 1e-12).all() and np.isin(np.rint(p * (n + 1)), np.arange(1, n + 2)).all()
    if len(set(scores)) == len(scores):
        assert np.allclose(p, grid)


def test_conformal_p_is_uniform_on_its_grid():
    rng, n = np.random.default_rng(11), 19
    draws = rng.standard_cauchy(size=(5000, n + 1))
    counts = np.bincount([round(20 * float(conformal_p(row[0], row[1:]))) for row in draws], minlength=21)[1:]
    assert stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize(
    "alpha, n", [(1.0, 0), (0.5, 1), (0.05, 19), (0.01, 99), (1e-3, 999), (0.3, 3), (1e-6, 999999)]
)
def test_needed_references(alpha, n):
    assert needed_references(alpha) == n
    assert conformal_p(1.0, np.zeros(n)) <= alpha
    assert n == 0 or conformal_p(1.0, np.zeros(n - 1)) > alpha


def test_a_reciprocal_needs_one_reference_less():
    assert [needed_references(1 / k) for k in range(1, 3000)] == list(range(2999))  # 1 / (1 / 49) > 49


@given(st.floats(1e-5, 1))
def test_as_many_references_as_are_needed_and_no_more(alpha):
    n = needed_references(alpha)
    assert 1 / (n + 1) <= alpha and (n == 0 or 1 / n > alpha)


@pytest.mark.parametrize("alpha", [0, -0.1, 1.5, np.nan])
def test_no_number_of_references_reaches_0(alpha):
    with pytest.raises(ValueError, match="above 0"):
        needed_references(alpha)


@pytest.mark.parametrize("n", [20, 999])
@pytest.mark.parametrize("level", [1e-4, 1e-2, 0.2])
def test_agreement_has_its_level(n, level):
    # Exactly, for p-values that are the true tail probabilities: by the law of #{sᵢ ≥ s}, not by drawing it.
    k = np.arange(n + 1)
    for p in (1e-12, 1e-4, 0.01, 0.3, 0.5, 0.99):
        fails = ~agreement(np.full(n + 1, p), (1 + k) / (n + 1), n, level=level)
        assert stats.binom.pmf(k, n, p)[fails].sum() <= level
    p = np.random.default_rng(12).uniform(size=20000)
    drawn = np.random.default_rng(13).binomial(n, p)
    alarms = (~agreement(p, (1 + drawn) / (n + 1), n, level=level)).sum()
    assert alarms <= stats.binom.ppf(0.999, 20000, level)
    assert n < 999 or level < 0.01 or alarms >= 0.5 * level * 20000  # and is not much below it, discreteness apart


def test_agreement_sees_what_n_references_can_tell():
    def conformal(k: int, n: int) -> float:
        return (k + 1) / (n + 1)

    assert agreement(1e-20, conformal(0, 999), 999) and not agreement(1e-20, conformal(1, 999), 999)
    assert agreement(0.01, conformal(10, 999), 999) and not agreement(0.01, conformal(40, 999), 999)
    assert not agreement(0.5, conformal(300, 999), 999) and agreement(0.5, conformal(8, 20), 20)
    assert agreement([0, 1], [conformal(0, 9), conformal(9, 9)], 9).all()
    assert not agreement([0, 1, np.nan], [conformal(1, 9), conformal(8, 9), 0.5], 9).any()


@pytest.mark.parametrize(
    "p, k, n, alpha, expected",
    [
        (1e-9, 0, 200, 1e-3, False),  # above all references: they resolve no more
        (1e-9, 1, 200, 1e-3, True),  # one of 200 as high: p cannot be so small, and 2/201 is not significant
        (1e-9, 1, 200, 0.05, True),  # nor can it be here, though 2/201 is significant as well
        (1e-9, 1, 5000, 1e-3, True),
        (1e-9, 20, 5000, 1e-3, True),
        (8e-4, 1, 200, 1e-3, False),  # chance
        (0.1, 0, 500, 1e-3, True),  # above all of 500: p cannot be so large, and it may well be significant
        (0.1, 0, 20, 1e-3, False),  # chance
        (0.1, 5, 500, 1e-3, False),  # p is wrong, but the key is not there by 6/501 either
        (0.1, 5, 500, 0.05, True),
        (0.5, 400, 500, 1e-3, False),
        (2e-3, 0, 500, 1e-3, False),
    ],
)
def test_a_contradiction_about_alpha(p, k, n, alpha, expected):
    assert undecided(p, (k + 1) / (n + 1), n, alpha) == expected


def test_sound_p_values_are_seldom_undecided():
    for n, alpha in ((50, 0.05), (1000, 1e-3), (20000, 1e-3)):
        p, k = np.geomspace(1e-8, 1, 50)[:, None], np.arange(n + 1)
        doubtful = undecided(p, (k + 1) / (n + 1), n, alpha)
        assert (stats.binom.pmf(k, n, p) * doubtful).sum(1).max() <= 1e-4


def test_an_uncalibrated_p_value_is_found_out():
    rng = np.random.default_rng(14)
    noise, key = rng.normal(size=(1200, 60)) * np.geomspace(0.1, 10, 60), rng.normal(size=60)
    score, p = matched_filter(noise, key)
    assert not agreement(p[1000:], conformal_p(score[1000:], score[:1000]), 1000).all()
    score, p = matched_filter(noise, key, np.geomspace(0.1, 10, 60) ** 2)
    assert agreement(p[1000:], conformal_p(score[1000:], score[:1000]), 1000).all()


def test_one_cosine_has_the_ordinary_p_value():
    recovered, key = np.random.default_rng(0).normal(size=(9, 40)), np.random.default_rng(1).normal(size=40)
    score, p = cosine_test(recovered, key)
    assert cosine_p(score, 40) == pytest.approx(p) and cosine_p(np.array([1.0]), 40) == 0


def test_the_best_of_many_tests_is_corrected_for_them_all():
    assert corrected(-5.0, 1) == -5 and corrected(-5.0, 100) == pytest.approx(-3) and corrected(-400.0, 10) == -399
    assert corrected(-5.0, 10**6) == corrected(0.0, 2) == 0


@given(st.lists(st.floats(-70, 0), min_size=1, max_size=4))
def test_fisher_is_the_tail_of_chi_square(log10_p):
    combined = fisher([np.array([each]) for each in log10_p])
    x = -2 * math.log(10) * sum(log10_p)
    assert combined[0] == pytest.approx(stats.chi2.logsf(x, 2 * len(log10_p)) / math.log(10), rel=1e-9, abs=1e-12)


def test_fisher_of_uniform_p_is_uniform():
    p = np.random.default_rng(4).uniform(size=(3, 4000))
    assert stats.kstest(10 ** fisher(list(np.log10(p))), "uniform").pvalue > 0.01
