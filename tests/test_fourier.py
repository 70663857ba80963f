"""Frequencies, shifts and the cosine test; the placement of a mark follows the measured recovery."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringmark.errors import SchemeError
from ringmark.inversion.noise_recovery import NoiseRecovery, rings
from ringmark.watermark.schemes.bands import check_budget
from ringmark.watermark.schemes.fourier import (
    CosineTest,
    Placement,
    middle_phase,
    mirror,
    recommend,
    signed_frequencies,
)
from ringmark.watermark.statistics import cosine_p

every_shape = pytest.mark.parametrize("shape", [(32, 32), (33, 33), (16, 24), (17, 30), (8, 9)])


def some_transform(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    real, imaginary = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.complex(real, imaginary)


# Frequencies and shifts


@every_shape
def test_signed_frequencies_are_those_of_the_transform(shape):
    ky, kx = signed_frequencies(*shape)
    y, x = torch.arange(shape[0])[:, None], torch.arange(shape[1])[None]
    for row, column in ((1, 2), (-3, 1), (0, -2)):
        wave = torch.exp(2j * torch.pi * (row * y / shape[0] + column * x / shape[1]).double())
        at = torch.fft.fft2(wave).abs().argmax()
        assert (ky.expand(shape).flatten()[at], kx.expand(shape).flatten()[at]) == (row, column)
    assert float(ky.abs().max()) == shape[0] // 2 and float(kx.abs().max()) == shape[1] // 2


@every_shape
def test_the_mirror_of_a_transform_is_its_conjugate_where_the_noise_is_real(shape):
    noise = some_transform(shape).real
    assert torch.allclose(mirror(torch.fft.fft2(noise)), torch.fft.fft2(noise).conj())
    values = some_transform(shape)
    assert torch.equal(mirror(mirror(values)), values)
    ky, _ = signed_frequencies(*shape)
    odd = ky.abs() * 2 < shape[0]  # Nyquist's frequency is its own mirror
    assert torch.equal(mirror(ky.expand(shape))[odd.expand(shape)], -ky.expand(shape)[odd.expand(shape)])


@every_shape
def test_what_is_real_and_even_is_moved_to_the_middle(shape):
    even = torch.hypot(*signed_frequencies(*shape)).neg().exp()
    moved = torch.fft.ifft2(even * middle_phase(*shape))
    if not any(n % 2 == 0 for n in shape):  # Nyquist's frequency cannot be moved by half a place
        assert moved.imag.abs().max() < 1e-12
    assert torch.allclose(moved.real, moved.real.flip(0, 1), atol=1e-12)
    centre = moved.real[(shape[0] - 1) // 2, (shape[1] - 1) // 2]
    assert centre == pytest.approx(float(moved.real.max()))


# The test


def test_a_cosine_test_is_that_of_the_statistics():
    rng = np.random.default_rng(3)
    template, observed = rng.normal(size=12), rng.normal(size=(40, 12))
    test = CosineTest(template, lambda noise: noise.numpy(), lambda schemes: template[None])
    scores = test.score(observed)
    assert scores == pytest.approx(observed @ template / np.linalg.norm(observed, axis=1) / np.linalg.norm(template))
    assert 10 ** test.log10_p(scores) == pytest.approx(cosine_p(scores, 12))
    assert np.array_equal(test.log10_p(scores, references=rng.normal(size=50)), test.log10_p(scores))
    assert test.score(np.zeros((1, 12))).tolist() == [0]
    edges = np.linspace(-0.9, 0.9, 10001)
    between = np.trapezoid(test.density(edges), edges)
    assert between == pytest.approx(cosine_p(-0.9, 12) - cosine_p(0.9, 12), abs=1e-6)
    assert test.observe(torch.ones(2, 12)).shape == (2, 12)


# Where the mark goes


@pytest.mark.parametrize("channels", [(), (4,), (-1,), (0, 0), (0, 9)])
def test_channels_that_are_not_there(channels):
    with pytest.raises(SchemeError) as caught:
        Placement(channels, (3, 8)).check((4, 32, 32))
    assert caught.value.code == "scheme.channels" and str(list(channels)) in str(caught.value.subject)


@pytest.mark.parametrize("radii", [(8, 3), (-1, 5), (3, 16), (0, 0), (20, 30)])
def test_radii_that_do_not_fit(radii):
    with pytest.raises(SchemeError) as caught:
        Placement((0,), radii).check((4, 32, 48))
    assert caught.value.code == "scheme.radii"
    Placement((0,), (0, 15)).check((4, 32, 48))


def test_a_share_is_of_all_coefficients_and_a_budget_bounds_it():
    place, shape = Placement((0, 2), (3, 5)), (4, 32, 32)
    share = 2 * bins(shape, place) / (4 * 32 * 32)
    assert place.share(shape) == pytest.approx(share)
    check_budget([place], shape, share)
    with pytest.raises(SchemeError) as caught:
        check_budget([place], shape, share * 0.99)
    assert caught.value.code == "scheme.budget" and caught.value.subject == "channels 0, 2, radii 3-5"


def recovery(shape, gain) -> NoiseRecovery:
    """A recovery whose a²/v is `gain` (C, R)."""
    count = int(rings(*shape[1:]).max()) + 1
    gain = torch.as_tensor(gain, dtype=torch.float64)[:, :count]
    variance = torch.linspace(0.5, 2, count, dtype=torch.float64).expand_as(gain)
    return NoiseRecovery((gain * variance).sqrt(), variance)


def bins(shape, placement: Placement) -> int:
    return sum(int((rings(*shape[1:]) == r).sum()) for r in range(placement.radii[0], placement.radii[1] + 1))


def signal(signals: np.ndarray, placement: Placement) -> float:
    """Σ of what each channel's rings (C, R) bring."""
    low, high = placement.radii
    return float(signals[list(placement.channels), low : high + 1].sum())


def test_the_mark_goes_where_the_noise_comes_back():
    shape = (4, 32, 32)
    gain = torch.full((4, 40), 0.01)
    gain[2, 6:10] = 5
    size = bins(shape, Placement((2,), (6, 9)))
    assert recommend(recovery(shape, gain), shape, budget=size / 4096) == Placement((2,), (6, 9))
    gain[0, 6:10] = 4
    assert recommend(recovery(shape, gain), shape, budget=2 * size / 4096) == Placement((0, 2), (6, 9))


def test_noise_that_comes_back_reversed_is_no_gain():
    shape = (2, 32, 32)
    measured = recovery(shape, torch.ones(2, 40))
    measured.attenuation[0] *= -3
    assert recommend(measured, shape, budget=0.1).channels == (1,)


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 18, 27)])
@pytest.mark.parametrize("budget", [0.08, 0.2])
def test_no_placement_within_the_budget_is_better(shape, budget):
    count, short = shape[0], min(shape[1:])
    for seed in range(5):
        gain = torch.from_numpy(np.random.default_rng(seed).gamma(0.5, size=(count, 60)))
        sizes = torch.bincount(rings(*shape[1:]).flatten())
        signals = (gain[:, : len(sizes)] * sizes).numpy()
        chosen = recommend(recovery(shape, gain), shape, budget=budget)
        allowed = budget * count * shape[1] * shape[2]
        assert len(chosen.channels) * bins(shape, chosen) <= allowed
        assert 3 <= chosen.radii[0] < chosen.radii[1] <= short // 3
        subsets = list(chain.from_iterable(combinations(range(count), n) for n in range(1, count + 1)))
        others = [
            Placement(c, (a, b)) for c in subsets for a in range(3, short // 3) for b in range(a + 1, short // 3 + 1)
        ]
        best = max(signal(signals, p) for p in others if len(p.channels) * bins(shape, p) <= allowed)
        assert signal(signals, chosen) == pytest.approx(best)


def test_the_lowest_ring_may_be_chosen_and_is_never_passed():
    shape = (4, 32, 32)
    gain = torch.ones(4, 40)
    gain[:, :5] = 100
    gain[:, 11:] = 100
    for lowest in (3, 4, 5):
        chosen = recommend(recovery(shape, gain), shape, lows=range(lowest, 11))
        assert chosen.radii[0] >= lowest and chosen.radii[1] <= 10


sides = st.integers(6, 160)


@given(st.integers(1, 16), sides, sides)
@settings(max_examples=100, deadline=None)
def test_a_placement_is_found_for_every_latent(count, height, width):
    shape = (count, height, width)
    recommend(None, shape).check(shape)


@given(st.integers(1, 6), st.integers(6, 64), st.integers(6, 64), st.floats(0.0001, 0.5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_placement_is_found_for_every_recovery(count, height, width, budget, seed):
    shape = (count, height, width)
    gain = torch.from_numpy(np.random.default_rng(seed).gamma(0.5, size=(count, 200)))
    recommend(recovery(shape, gain), shape, budget=budget).check(shape)
