"""Whitening makes the covariance the identity, by ring, whatever root is taken, and takes the mean away."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from identity import MODEL, of_shape, secret
from scipy import stats

from ringmark.inversion.noise_recovery import NoiseRecovery, rings
from ringmark.watermark.null import Null, spectrum
from ringmark.watermark.schemes.base import make_key
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.statistics import cosine_test, matched_filter


def number_of_rings(height: int, width: int) -> int:
    return int(rings(height, width).max()) + 1


def some_covariance(channels: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(R, C, C), one a ring, of different sizes and correlations."""
    mixing = rng.normal(size=(number_of_rings(*size), channels, channels)) + 2 * np.eye(channels)
    return mixing @ mixing.transpose(0, 2, 1)


def coloured(covariance: np.ndarray, size: tuple[int, int], number: int, rng: np.random.Generator) -> torch.Tensor:
    """Noise (n, C, h, w) of this covariance."""
    root = torch.from_numpy(np.linalg.cholesky(covariance))[rings(*size)].to(torch.complex128)
    white = torch.from_numpy(rng.normal(size=(number, covariance.shape[1], *size)))
    return torch.fft.ifft2(torch.einsum("hwij,bjhw->bihw", root, torch.fft.fft2(white))).real


def uniform(p_values) -> bool:
    return stats.kstest(p_values, "uniform").pvalue > 0.01


def within(p_values, level: float) -> bool:
    low, high = stats.binom.interval(0.99, len(p_values), level)
    return low <= (np.asarray(p_values) <= level).sum() <= high


@pytest.mark.parametrize("channels", [(0, 1, 2), (2, 0), (1,)])
def test_whitening_makes_the_covariance_the_identity(channels):
    rng, size = np.random.default_rng(9), (8, 12)
    covariance = some_covariance(3, size, rng)
    white = Null(covariance, min(size)).whitened(coloured(covariance, size, 6000, rng), channels)
    assert white.shape == (6000, len(channels), *size)
    ring = rings(*size)
    for radius in range(number_of_rings(*size)):
        bins = white[..., ring == radius]
        found = torch.einsum("bcm,bdm->cd", bins, bins.conj()).real / bins[:, 0].numel()
        assert (found - torch.eye(len(channels))).abs().max() < 0.06, radius


def test_the_root_of_the_covariance_comes_out_as_unit_vectors():
    rng, size = np.random.default_rng(10), (8, 8)
    covariance = some_covariance(3, size, rng)
    roots = np.linalg.cholesky(covariance)[rings(*size).numpy()]  # (h, w, C, C): each column of L is a transform
    columns = torch.from_numpy(np.moveaxis(roots, -1, 0).transpose(0, 3, 1, 2).copy()).to(torch.complex128)
    white = Null(covariance, min(size)).whiten(columns, (0, 1, 2))
    assert torch.allclose(white, torch.eye(3)[:, :, None, None].to(white).expand_as(white), atol=1e-9)


@given(st.integers(1, 4), st.sampled_from([(4, 4), (5, 6), (9, 4)]), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_products_of_whitened_vectors_are_those_of_the_precision(channels, size, seed):
    rng = np.random.default_rng(seed)
    covariance = some_covariance(channels, size, rng)
    null, marked = Null(covariance, min(size)), list(rng.permutation(channels)[: rng.integers(1, channels + 1)])
    parts = rng.normal(size=(2, 2, 1, len(marked), *size))
    f, k = torch.from_numpy(parts[0] + 1j * parts[1])
    precision = np.linalg.inv(covariance[:, np.array(marked)[:, None], marked])[rings(*size).numpy()]
    expected = np.einsum("chw,hwcd,dhw->", f[0].numpy().conj(), precision, k[0].numpy())
    found = (null.whiten(f, marked).conj() * null.whiten(k, marked)).sum()
    assert complex(found) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_whitening_of_one_channel_divides_by_the_deviation():
    size = (6, 6)
    variance = np.linspace(1, 9, number_of_rings(*size))
    null = Null(np.stack([np.full_like(variance, 7.0), variance], 1)[:, :, None] * np.eye(2), min(size))
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 2, *size)))
    expected = torch.fft.fft2(noise[:, 1:], norm="ortho") / torch.from_numpy(variance)[rings(*size)].sqrt()
    assert torch.allclose(null.whitened(noise, (1,)), expected)


def test_the_mean_is_taken_away():
    rng, size = np.random.default_rng(2), (8, 8)
    covariance, mean = some_covariance(2, size, rng), torch.from_numpy(rng.normal(size=(2, *size)))
    null, noise = Null(covariance, min(size), mean), coloured(covariance, size, 5, rng)
    assert torch.allclose(null.whitened(noise + mean, (0, 1)), Null(covariance, min(size)).whitened(noise, (0, 1)))
    assert null.whitened(mean[None], (1, 0)).abs().max() == 0
    transform = spectrum(noise, (0, 1))
    assert torch.equal(
        null.whiten(transform, (0, 1)), Null(covariance, min(size)).whiten(transform, (0, 1))
    )  # of keys, nothing


def test_a_white_null_leaves_the_spectrum_as_it_is():
    noise = torch.randn(2, 3, 9, 12, generator=torch.Generator().manual_seed(0))
    null = Null.white((3, 9, 12))
    assert null.name == "white" and null.covariance.shape == (number_of_rings(9, 12), 3, 3)
    assert torch.equal(null.whitened(noise, (2, 0)), spectrum(noise, (2, 0)))
    expected = torch.fft.fft2(noise.double(), norm="ortho")[:, [2, 0]]
    assert torch.equal(spectrum(noise, (2, 0)), expected) and expected.dtype == torch.complex128


def test_the_null_of_a_model_is_what_was_measured_of_it_or_white():
    assert Null.of_model(MODEL).name == "white"
    assert np.array_equal(Null.of_model(MODEL).covariance, Null.white(MODEL.latent_shape).covariance)
    generator = torch.Generator().manual_seed(0)
    attenuation, variance = torch.rand(2, 3, number_of_rings(32, 32), generator=generator, dtype=torch.float64) + 0.1

    class Measured(type(MODEL)):
        recovery = NoiseRecovery(attenuation, variance)

    null = Null.of_model(Measured())
    assert null.name == Measured.recovery.fingerprint
    for ring, covariance in enumerate(null.covariance):
        assert np.allclose(covariance, np.diag(Measured.recovery.null[:, ring].numpy()))
    other = Null.of_model(Measured(), (3, 24, 40))
    assert np.array_equal(other.covariance, null.covariance) and (other.side, Null.of_model(MODEL).side) == (32, 32)


def test_printing_a_null_and_using_it_again_changes_nothing():
    rng, size = np.random.default_rng(3), (8, 8)
    null = Null(some_covariance(2, size, rng), min(size))
    noise = torch.from_numpy(rng.normal(size=(1, 2, *size)))
    first, other = null.whitened(noise, (0, 1)), null.whitened(noise, (1, 0))
    assert torch.equal(null.whitened(noise, (0, 1)), first) and not torch.equal(first, other)
    assert null.whiten(spectrum(noise, (0, 1)).to(torch.complex64), (0, 1)).dtype == torch.complex64


@pytest.mark.slow
@pytest.mark.parametrize("test", [cosine_test, matched_filter])
def test_correlated_channels_need_the_covariance_and_not_the_variance_alone(test):
    shape, channels = (3, 24, 24), (0, 1, 2)
    rng, covariance = np.random.default_rng(10), 0.1 * np.eye(3) + 0.9  # correlation .9 between channels
    null = Null(np.tile(covariance, (number_of_rings(24, 24), 1, 1)), 24)
    noise = coloured(null.covariance, (24, 24), 4000, rng)
    scheme = TreeRing(make_key("tree-ring", **of_shape(shape), secret=secret(10), channels=channels, radii=(2, 5)))
    scheme.spectrum[:] = scheme.spectrum[0].clone()  # the same in every channel: variances add up

    def p_values(whitening: Null) -> np.ndarray:
        key = scheme.features(whitening.whiten(scheme.hermitian[None], channels))[0]
        return test(scheme.features(whitening.whitened(noise, channels)).numpy(), key.numpy())[1]

    assert uniform(p_values(null)) and within(p_values(null), 0.001)
    variances = Null(null.covariance * np.eye(3), 24)
    assert not uniform(p_values(variances)) and not uniform(p_values(Null.white(shape)))


@pytest.mark.parametrize("size", [(16, 16), (32, 20), (24, 40), (48, 33)])
def test_at_another_size_a_bin_has_the_covariance_of_its_frequency(size):
    covariance = some_covariance(3, (24, 24), np.random.default_rng(4))
    null = Null(covariance, 24, torch.ones(3, 24, 24, dtype=torch.float64))
    at = null.at((3, *size))
    assert at.name == null.name
    transform = torch.from_numpy(np.random.default_rng(5).normal(size=(1, 2, *size))) + 0j
    white = at.whiten(transform, (2, 0))
    for i, ky in enumerate(np.fft.fftfreq(size[0])):
        for j, kx in enumerate(np.fft.fftfreq(size[1])):
            ring = np.ceil(24 * np.hypot(ky, kx) - 0.5 - 1e-9).astype(int)
            own = covariance[min(ring, len(covariance) - 1)][np.ix_([2, 0], [2, 0])]
            expected = np.linalg.solve(np.linalg.cholesky(own), transform[0, :, i, j].numpy())
            assert np.allclose(white[0, :, i, j], expected)


def layout(height: int, width: int) -> torch.Tensor:
    """Bright above and dark below (1, h, w)."""
    return torch.cos(torch.pi * (torch.arange(height, dtype=torch.float64) + 0.5) / height)[:, None].expand(
        1, -1, width
    )


@pytest.mark.parametrize("size", [(12, 16), (48, 64), (36, 48)])
def test_a_layout_keeps_its_place_in_pictures_of_the_same_proportions(size):
    null = Null(some_covariance(1, (24, 32), np.random.default_rng(4)), 24, layout(24, 32))
    at = null.at((1, *size))
    assert at.layout_known and at.mean.shape == (1, *size) and (at.mean - layout(*size)).abs().max() < 0.03


@pytest.mark.parametrize("size", [(32, 24), (24, 24), (24, 33)])
def test_the_layout_of_other_proportions_is_not_known(size):
    null = Null(some_covariance(1, (24, 32), np.random.default_rng(4)), 24, layout(24, 32))
    at = null.at((1, *size))
    assert at.mean == 0 and not at.layout_known and null.layout_known


def test_at_its_own_size_a_null_is_itself():
    null = Null(some_covariance(2, (9, 12), np.random.default_rng(6)), 9, torch.ones(2, 9, 12))
    assert null.at((2, 9, 12)) is null


def test_noise_of_one_spectrum_is_whitened_at_every_size_by_the_null_of_one():
    """Noise of a power that falls with the frequency in cycles per pixel, at three sizes."""
    generator, size = torch.Generator().manual_seed(3), (32, 32)
    variance = (1 + 0.05 * np.arange(number_of_rings(*size))) ** -2.0
    null = Null(variance[:, None, None] * np.eye(1), 32)
    for height, width in ((32, 32), (20, 48), (64, 64)):
        frequency = torch.from_numpy(np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))) * 32
        noise = torch.randn(400, 1, height, width, generator=generator, dtype=torch.float64)
        coloured_noise = torch.fft.ifft2(torch.fft.fft2(noise) / (1 + 0.05 * frequency)).real
        power = null.at((1, height, width)).whitened(coloured_noise, (0,)).abs().square().mean((0, 1))
        assert power.mean().item() == pytest.approx(1, abs=0.01) and (power - 1).abs().max() < 0.35
