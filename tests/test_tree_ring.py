"""What is embedded is what is found; the marked noise stays noise; the placement follows the measured recovery."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ringmark.errors import SchemeError
from ringmark.inversion.noise_recovery import NoiseRecovery, rings
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.tree_ring import (
    MASKS,
    PATTERNS,
    Placement,
    TreeRing,
    make_key,
    middle_phase,
    recommend,
    ring_index,
    signed_frequencies,
)
from ringmark.watermark.statistics import cosine_test, power_test, published_distance

SHAPES = [(4, 32, 32), (4, 64, 64), (4, 16, 24), (4, 24, 16), (4, 33, 33), (4, 17, 30)]
PLACEMENTS = [Placement((0,), (1, 5)), Placement((3, 1), (3, 6)), Placement((0, 1, 2, 3), (0, 7))]


def scheme(shape, placement, pattern="ring", mask="centred", seed=0) -> TreeRing:
    rng = np.random.default_rng(seed)
    return TreeRing(make_key(shape, placement, model={"name": "none"}, pattern=pattern, mask=mask, rng=rng))


def white(shape, number=2, seed=0) -> torch.Tensor:
    return torch.randn(number, *shape, generator=torch.Generator().manual_seed(seed))


def spectrum(noise: torch.Tensor) -> torch.Tensor:
    return torch.fft.fft2(noise.double(), norm="ortho")


def opposite(x: torch.Tensor) -> torch.Tensor:
    """x(−k), index by index."""
    height, width = x.shape[-2:]
    return x[..., [-i % height for i in range(height)], :][..., [-j % width for j in range(width)]]


def distance(s: TreeRing, noise: torch.Tensor) -> np.ndarray:
    return published_distance(*(x.numpy() for x in s.masked(noise)))


every_place = pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: f"{p.channels}{p.radii}".replace(" ", ""))
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
every_mask = pytest.mark.parametrize("mask", MASKS)


@every_place
@every_shape
@every_pattern
def test_what_is_embedded_is_found(shape, placement, pattern):
    s, noise = scheme(shape, placement, pattern), white(shape)
    before = noise.clone()
    marked = s.embed(noise)
    assert torch.equal(noise, before) and marked.shape == noise.shape and marked.dtype == noise.dtype
    found, key = s.features(marked)
    assert found.shape == (2, len(key)) and (found - key).abs().max() < 1e-5
    assert distance(s, marked).max() < 1e-4 * (shape[1] * shape[2]) ** 0.5
    assert distance(s, noise).min() > 0.3 * (shape[1] * shape[2]) ** 0.5
    assert (s.embed(marked) - marked).abs().max() < 1e-5  # a projection


@every_place
@every_shape
@every_pattern
def test_nothing_else_is_touched(shape, placement, pattern):
    s, noise = scheme(shape, placement, pattern), white(shape)
    marked, channels = s.embed(noise), list(placement.channels)
    others = sorted(set(range(shape[0])) - set(channels))
    assert torch.equal(marked[:, others], noise[:, others])
    change = (spectrum(marked) - spectrum(noise))[:, channels].abs()
    assert change[..., ~s.inside].max() < 1e-5 < 0.01 < change[..., s.inside].max()


@every_place
@every_shape
@every_pattern
def test_the_key_is_hermitian_so_that_nothing_is_lost(shape, placement, pattern):
    s = scheme(shape, placement, pattern)
    assert torch.equal(s.inside, opposite(s.inside))
    assert (s.spectrum - opposite(s.spectrum).conj()).abs().max() < 1e-6
    assert torch.fft.ifft2(s.spectrum, norm="ortho").imag.abs().max() < 1e-6
    assert not s.spectrum[:, ~s.inside].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_keeps_its_dtype(dtype):
    s = scheme((4, 32, 32), PLACEMENTS[1])
    marked = s.embed(white((4, 32, 32)).to(dtype))
    found, key = s.features(marked)
    assert marked.dtype == dtype and (found - key).abs().max() < 16 * torch.finfo(dtype).eps + 1e-6


def test_a_key_survives_its_file(tmp_path):
    key = make_key((4, 16, 24), PLACEMENTS[1], model={"name": "none"})
    key.save(tmp_path / "my.key")
    a, b = TreeRing(key), TreeRing(Key.load(tmp_path / "my.key"))
    noise = white((4, 16, 24))
    assert torch.equal(a.embed(noise), b.embed(noise)) and key.fingerprint == Key.load(tmp_path / "my.key").fingerprint


def test_keys_of_the_system_are_unlike_any_other():
    a, b = (make_key((4, 32, 32), PLACEMENTS[0], model={}) for _ in range(2))
    assert a.fingerprint != b.fingerprint
    assert (TreeRing(a).spectrum - TreeRing(b).spectrum).abs().max() > 0.01


# The published mask


def circle_as_published(size: int, radius: int) -> np.ndarray:
    """The mask as its authors' text describes it: the y axis flipped, DC shifted to the middle."""
    x = np.arange(size) - size // 2
    return x[None] ** 2 + x[::-1, None] ** 2 <= radius**2


@pytest.mark.parametrize("size", [32, 64, 33])
@pytest.mark.parametrize("radius", [1, 6, 10])
def test_the_published_mask_is_a_row_off(size, radius):
    inside = np.fft.fftshift((ring_index("published", size, size) <= radius).numpy())
    assert np.array_equal(inside, circle_as_published(size, radius))
    rows = np.argwhere(inside)[:, 0].mean() - size // 2
    assert rows == pytest.approx(-1 if size % 2 == 0 else 0)


def test_the_published_mask_loses_half_of_a_ring():
    shape, own, unmarked = (4, 64, 64), [], []
    for seed in range(8):
        s, noise = scheme(shape, Placement((0,), (0, 10)), "ring", "published", seed), white(shape, 8, seed)
        own.append(distance(s, s.embed(noise)).mean())
        unmarked.append(distance(s, noise).mean())
    assert 25 < min(own) and max(own) < 50 and 65 < min(unmarked) and max(unmarked) < 110
    centred = scheme(shape, Placement((0,), (0, 10)))
    assert distance(centred, centred.embed(white(shape))).max() < 1e-4


@pytest.mark.parametrize("pattern", ["ring", "rand"])
def test_the_published_mark_is_still_found_by_its_features(pattern):
    shape = (4, 64, 64)
    s, noise = scheme(shape, Placement((0,), (0, 10)), pattern, "published"), white(shape, 20)
    _, key = s.features(noise)
    assert cosine_test(s.features(s.embed(noise))[0].numpy(), key.numpy())[1].max() < 1e-12
    # The key of the features is what taking the real part leaves of it: the mean over many noises.
    mean = s.features(s.embed(white(shape, 400, 1)))[0].mean(0)
    assert (mean - key).abs().max() < 5 / 400**0.5


# Features


@every_mask
@every_place
@every_shape
def test_features_are_the_degrees_of_freedom(shape, placement, mask):
    s = scheme(shape, placement, "rand", mask)
    height, width = shape[1:]
    pairs = {frozenset([(i, j), (-i % height, -j % width)]) for i, j in s.inside.nonzero().tolist()}
    count = len(placement.channels) * sum(map(len, pairs))  # one real number for each bin of a pair
    if mask == "centred":
        assert count == len(placement.channels) * s.inside.sum()
    found, key = s.features(white(shape))
    assert found.shape == (2, count) and key.shape == (count,) and found.dtype == torch.float64
    assert [len(x) for x in s.feature_rings()] == [count, count]


def test_a_ring_has_one_feature_a_circle():
    s = scheme((4, 32, 32), Placement((0, 2), (3, 7)), "ring")
    found, key = s.features(white((4, 32, 32)))
    assert found.shape == (2, 10) and key.shape == (10,)


@pytest.mark.parametrize("pattern, allowed", [("rand", 0.005), ("ring", 0.02)])
def test_an_image_with_one_key_does_not_carry_another(pattern, allowed):
    shape, place = (4, 32, 32), Placement((0, 2), (3, 10))
    marked = scheme(shape, place, pattern, seed=999).embed(white(shape, 4)) * 0.6 + white(shape, 4, 1) * 0.8
    features = [scheme(shape, place, pattern, seed=seed).features(marked) for seed in range(400)]
    p = np.concatenate([cosine_test(found.numpy(), key.numpy())[1] for found, key in features])
    assert (p < 1e-3).mean() <= allowed


@every_mask
@pytest.mark.parametrize("pattern", ["rand", "ring"])
@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 9, 8)])
def test_features_of_white_noise_are_white(shape, mask, pattern):
    s = scheme(shape, Placement((1, 0), (0, 3)), pattern, mask=mask)
    number = 20_000
    found = s.features(white(shape, number))[0]
    covariance = found.T @ found / number
    assert (covariance - torch.eye(found.shape[1])).abs().max() < 6 / number**0.5
    assert found.mean(0).abs().max() < 5 / number**0.5
    assert stats.kstest(found.flatten()[::7], "norm").pvalue > 0.01


@every_place
@every_shape
def test_a_features_ring_is_where_its_power_comes_from(shape, placement):
    s = scheme(shape, placement)
    ring, (channels, found_rings) = rings(*shape[1:]), s.feature_rings()
    bins = spectrum(white(shape, 1))
    for channel in placement.channels:
        for radius in range(placement.radii[0], placement.radii[1] + 1):
            only = torch.zeros_like(bins)
            only[:, channel] = torch.where(ring == radius, bins[:, channel], 0)
            features = s.features(torch.fft.ifft2(only, norm="ortho").real)[0][0]
            assert torch.equal(features.abs() > 1e-9, (channels == channel) & (found_rings == radius))


# Rings


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_a_ring_is_real_and_constant_about_the_middle(shape):
    s = scheme(shape, PLACEMENTS[2])
    turned = s.spectrum * middle_phase(*shape[1:]).conj()
    assert turned.imag.abs().max() < 1e-6
    for radius in range(8):
        circle = turned.real[:, s.ring == radius]
        assert (circle - circle[:, :1]).abs().max() < 1e-6
    assert len({round(x, 5) for x in turned.real[0, s.inside].tolist()}) == 8


@pytest.mark.parametrize("size", [32, 33, 64])
def test_turned_and_flipped_noise_still_carries_the_ring(size):
    shape = (4, size, size)
    s = scheme(shape, PLACEMENTS[1])
    marked = s.embed(white(shape))
    moves = [lambda x, n=n: x.rot90(n, (-2, -1)) for n in (1, 2, 3)]
    moves += [lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.mT]
    for move in moves:
        found, key = s.features(move(marked))
        assert (found - key).abs().max() < 1e-5
        assert cosine_test(found.numpy(), key.numpy())[0].min() > 1 - 1e-9
    shifted, key = s.features(marked.roll(5, -1))
    assert cosine_test(shifted.numpy(), key.numpy())[0].max() < 0.9


def test_flipped_noise_of_a_wide_latent_still_carries_the_ring():
    s = scheme((4, 16, 24), PLACEMENTS[1])
    marked = s.embed(white((4, 16, 24)))
    for dims in ([-1], [-2], [-1, -2]):
        found, key = s.features(marked.flip(dims))
        assert (found - key).abs().max() < 1e-5


def test_a_random_pattern_does_not_survive_a_turn():
    s = scheme((4, 32, 32), Placement((0,), (3, 10)), "rand")
    found, key = s.features(s.embed(white((4, 32, 32))).rot90(1, (-2, -1)))
    assert np.abs(cosine_test(found.numpy(), key.numpy())[0]).max() < 0.3


@pytest.mark.parametrize("shape", [(4, 32, 32), (4, 17, 30)])
def test_the_aligned_picture(shape):
    s = scheme(shape, Placement((2,), (3, 6)))
    height, width = shape[1:]
    noise, key = s.aligned(s.embed(white(shape, 1)))
    inside = np.fft.fftshift(s.inside.numpy())
    assert noise.shape == key.shape == (height, width) and noise.dtype.kind == "f"
    assert np.abs(noise - key)[inside].max() < 1e-5 and not key[~inside].any()
    assert np.abs(key[inside]).min() > 0 and not inside[height // 2, width // 2] and inside[height // 2 + 4, width // 2]


# Marked noise is still noise


@pytest.mark.parametrize("pattern", ["ring", "rand"])
@every_mask
@every_place
def test_a_key_has_the_power_of_white_noise(placement, pattern, mask):
    s = scheme((4, 32, 32), placement, pattern, mask)
    power = s.spectrum.abs().square()[:, s.inside].mean(1)
    assert (power - 1).abs().max() < 1e-5
    if mask == "centred":
        _, key = s.features(white((4, 32, 32)))
        energy = key.view(len(placement.channels), -1).square().sum(1)
        assert torch.allclose(energy, s.inside.sum().double(), rtol=1e-5)


def test_noise_marked_at_random_is_unit_normal_in_every_pixel():
    shape, number = (1, 12, 12), 500
    noise = white(shape, number)
    marked = torch.cat(
        [scheme(shape, Placement((0,), (1, 4)), "rand", seed=i).embed(noise[i : i + 1]) for i in range(number)]
    )
    pixels = marked.flatten(1).double().numpy()
    assert abs(pixels.var() - 1) < 0.02 and abs(pixels.mean()) < 0.01
    p = [stats.kstest(pixel, "norm").pvalue for pixel in pixels.T]
    assert stats.kstest(p, "uniform").pvalue > 0.001 and min(p) > 0.01 / len(p)
    assert abs(stats.kurtosis(pixels, axis=None)) < 0.05


def test_noise_marked_with_rings_has_unit_variance_over_the_picture():
    shape = (1, 32, 32)
    marked = torch.cat([scheme(shape, Placement((0,), (3, 8)), seed=i).embed(white(shape, 1, i)) for i in range(200)])
    assert abs(marked.var() - 1) < 0.02


def test_zeros_take_out_their_share_of_the_power():
    shape = (1, 32, 32)
    s = scheme(shape, Placement((0,), (3, 8)), "zeros")
    assert s.embed(white(shape, 200)).var().item() == pytest.approx(1 - s.inside.double().mean().item(), abs=0.02)


# Tests on the scheme's vectors


@every_mask
@pytest.mark.parametrize("pattern", ["ring", "rand"])
def test_cosine_p_values_of_unmarked_noise_are_uniform(pattern, mask):
    s = scheme((2, 32, 32), Placement((1,), (3, 8)), pattern, mask)
    found, key = s.features(white((2, 32, 32), 1000))
    assert stats.kstest(cosine_test(found.numpy(), key.numpy())[1], "uniform").pvalue > 0.01


def power_p(s: TreeRing, noise: torch.Tensor) -> np.ndarray:
    inside = s.features(noise)[0].unflatten(1, (len(s.placement.channels), -1)).numpy()
    return power_test(inside, [q.numpy() for q in s.beside(noise)], s.side_weights)[1]


@every_mask
@pytest.mark.parametrize("radii", [(0, 6), (3, 8), (1, 1), (2, 3), (14, 15)])
def test_power_p_values_of_unmarked_noise_are_uniform(radii, mask):
    s = scheme((2, 32, 32), Placement((0, 1), radii), "zeros", mask)
    noise = white((2, 32, 32), 2000, 2)
    assert stats.kstest(power_p(s, noise), "uniform").pvalue > 0.01
    if mask == "centred":
        assert power_p(s, s.embed(noise[:5])).max() < 1e-6


@pytest.mark.parametrize("slope", [-1, 1, 2])
@pytest.mark.parametrize("radii", [(7, 9), (4, 10), (3, 4)])
def test_a_power_law_is_no_mark(radii, slope):
    """Power r^-slope of the frequency r."""
    s, noise = scheme((2, 32, 32), Placement((0, 1), radii), "zeros"), white((2, 32, 32), 2000, 3)
    radius = torch.hypot(*signed_frequencies(32, 32)).clamp_min(1)
    coloured = torch.fft.ifft2(torch.fft.fft2(noise) * radius ** (-slope / 2)).real
    p = power_p(s, coloured)
    assert (p <= 0.05).mean() < 0.1 and (p <= 0.001).mean() <= 0.004


@every_mask
@every_shape
@pytest.mark.parametrize("radii", [(4, 5), (4, 4)])
def test_the_bins_beside_are_whole_pairs_on_both_sides_and_not_the_marks(shape, mask, radii):
    s = scheme(shape, Placement((0,), radii), "zeros", mask)
    noise = white(shape, 1)
    within, beyond = (side[0, 0] for side in s.beside(noise))
    assert len(within) >= 8 and len(beyond) >= 20
    _, copies = np.unique(torch.cat([within, beyond]).numpy().round(9), return_counts=True)
    # Each with its conjugate, and none on both sides; at Nyquist's frequency a bin may be its own.
    assert set(copies) <= {1, 2} and (copies == 1).sum() <= 1
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(s.beside(s.embed(noise)), s.beside(noise), strict=True))
    assert s.side_weights.sum() == pytest.approx(1) and (s.side_weights > 0).all()


@every_mask
def test_an_innermost_mask_is_compared_with_what_is_beyond(mask) -> None:
    s = scheme((1, 32, 32), Placement((0,), (1, 4)), "zeros", mask)
    (beyond,) = s.beside(white((1, 32, 32), 1))
    assert len(beyond[0, 0]) > 50 and s.side_weights.tolist() == [1]


# Errors


@pytest.mark.parametrize("channels", [(), (4,), (-1,), (0, 0), (0, 9)])
def test_channels_that_are_not_there(channels):
    with pytest.raises(SchemeError, match="channels"):
        make_key((4, 32, 32), Placement(channels, (3, 8)), model={})


@pytest.mark.parametrize("radii", [(8, 3), (-1, 5), (3, 16), (0, 0), (20, 30)])
def test_radii_that_do_not_fit(radii):
    with pytest.raises(SchemeError, match="radii"):
        make_key((4, 32, 48), Placement((0,), radii), model={})
    make_key((4, 32, 48), Placement((0,), (0, 15)), model={})


def test_unknown_patterns_and_masks():
    for names in ({"pattern": "square"}, {"mask": "round"}):
        with pytest.raises(SchemeError, match=r"ring, rand, zeros.*centred, published"):
            make_key((4, 32, 32), PLACEMENTS[0], model={}, **names)


@pytest.mark.parametrize(
    "field, value",
    [
        ("scheme", "gaussian-shading"),
        ("pattern", "square"),
        ("mask", "round"),
        ("channels", [0, 1]),
        ("channels", [7]),
        ("radii", [3, 99]),
        ("latent_shape", [4, 32, 33]),
        ("latent_shape", [4, 10**9, 10**9]),
    ],
)
def test_a_key_whose_description_does_not_fit_it(field, value):
    key = make_key((4, 32, 32), PLACEMENTS[0], model={})
    with pytest.raises(SchemeError) as caught:
        TreeRing(Key(key.values, key.metadata | {field: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 4, 32, 31), (4, 32, 32), (2, 4, 1, 1), (2, 5, 32, 32)])
def test_noise_of_another_shape(shape):
    s = scheme((4, 32, 32), PLACEMENTS[0])
    for use in (s.embed, s.features, s.masked, s.beside, s.aligned):
        with pytest.raises(SchemeError, match="noise"):
            use(torch.zeros(shape))


# Where the mark goes


def recovery(shape, gain) -> NoiseRecovery:
    """A recovery whose a²/v is `gain` (C, R)."""
    count = int(rings(*shape[1:]).max()) + 1
    gain = torch.as_tensor(gain, dtype=torch.float64)[:, :count]
    variance = torch.linspace(0.5, 2, count, dtype=torch.float64).expand_as(gain)
    return NoiseRecovery((gain * variance).sqrt(), variance)


def bins(shape, placement: Placement) -> int:
    return sum(int((rings(*shape[1:]) == r).sum()) for r in range(placement.radii[0], placement.radii[1] + 1))


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
        signal = lambda p, g=gain, n=sizes: sum(
            float(g[c, r] * n[r]) for c in p.channels for r in range(p.radii[0], p.radii[1] + 1)
        )
        chosen = recommend(recovery(shape, gain), shape, budget=budget)
        allowed = budget * count * shape[1] * shape[2]
        assert len(chosen.channels) * bins(shape, chosen) <= allowed
        assert 3 <= chosen.radii[0] < chosen.radii[1] <= short // 3
        subsets = list(chain.from_iterable(combinations(range(count), n) for n in range(1, count + 1)))
        others = [
            Placement(c, (a, b)) for c in subsets for a in range(3, short // 3) for b in range(a + 1, short // 3 + 1)
        ]
        best = max(signal(p) for p in others if len(p.channels) * bins(shape, p) <= allowed)
        assert signal(chosen) == pytest.approx(best)


def test_the_lowest_ring_may_be_chosen_and_is_never_passed():
    shape = (4, 32, 32)
    gain = torch.ones(4, 40)
    gain[:, :5] = 100
    gain[:, 11:] = 100
    for lowest in (3, 4, 5):
        chosen = recommend(recovery(shape, gain), shape, lowest=lowest)
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
