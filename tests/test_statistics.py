"""Under the null a p-value is uniform: what claims to be one is tested by Kolmogorov and Smirnov."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from watermark.schemes.tree_ring import Placement, TreeRing, make_key
from watermark.statistics import cosine_test, power_test, published_distance, published_p_value


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


def test_whitening_restores_what_colour_destroys():
    rng, d = np.random.default_rng(5), 200
    variance = np.geomspace(0.01, 10, d)
    noise = rng.normal(size=(4000, d)) * np.sqrt(variance) * np.exp(rng.normal(size=(4000, 1)))
    key = rng.normal(size=d) * np.sqrt(variance)
    white, coloured = cosine_test(noise, key, variance)[1], cosine_test(noise, key)[1]
    assert uniform(white) and within(white, 0.001)
    assert not uniform(coloured) and not within(coloured, 0.001)


def conjugates(rng, rows: int, pairs: int) -> np.ndarray:
    """Powers of complex bins of white noise, each with its conjugate's."""
    power = np.abs(rng.normal(size=(rows, pairs)) + 1j * rng.normal(size=(rows, pairs))) ** 2 / 2
    return np.repeat(power, 2, -1)


@pytest.mark.parametrize("d, pairs", [(4, 3), (40, 100)])
def test_power_p_values_are_uniform_under_white_noise(d, pairs):
    rng = np.random.default_rng(d)
    p = power_test(rng.normal(size=(4000, d)), conjugates(rng, 4000, pairs))[1]
    assert uniform(p) and within(p, 0.01)
    scale = np.exp(rng.normal(size=(4000, 1)))
    assert uniform(power_test(scale * rng.normal(size=(4000, d)), scale**2 * conjugates(rng, 4000, pairs))[1])


def test_power_test_where_the_mask_is_empty():
    rng = np.random.default_rng(6)
    for amplitude, most in ((0.3, 1e-8), (0, 0)):
        score, p = power_test(amplitude * rng.normal(size=(20, 60)), conjugates(rng, 20, 60))
        assert (p <= most).all() and (score > 1).all() and np.isfinite(score).all()
    assert (power_test(3 * rng.normal(size=(20, 60)), conjugates(rng, 20, 60))[1] > 0.999).all()


def test_power_test_by_hand():
    score, p = power_test(np.array([[1.0, 1]]), np.array([[4.0, 4]]))
    assert np.allclose(score, np.log(4))
    assert np.allclose(p, 0.2)  # F with 2 and 2 degrees of freedom: x / (1 + x)


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
    import torch

    key = make_key(
        (1, 32, 32),
        Placement((0,), (0, 8)),
        model={},
        pattern=pattern,
        mask="published",
        rng=np.random.default_rng(seed),
    )
    scheme = TreeRing(key)
    noise = torch.randn(number, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    return [[x.numpy() for x in pair] for pair in (scheme.masked(noise), scheme.features(noise))]


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
