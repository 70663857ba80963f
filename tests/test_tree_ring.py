"""What is embedded is what is found; the marked noise stays noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from identity import of_shape, old_key, secret
from scipy import stats

from ringmark.errors import SchemeError
from ringmark.inversion.noise_recovery import rings
from ringmark.watermark.keys.expansion import normal
from ringmark.watermark.keys.key import Key
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.base import REGISTRY, make_key, scheme_of
from ringmark.watermark.schemes.bins import ring_index
from ringmark.watermark.schemes.fourier import Placement, middle_phase, signed_frequencies
from ringmark.watermark.schemes.tree_ring import MASKS, PATTERNS, TreeRing
from ringmark.watermark.statistics import cosine_test, published_distance

SHAPES = [(4, 32, 32), (4, 64, 64), (4, 16, 24), (4, 24, 16), (4, 33, 33), (4, 17, 30)]
PLACEMENTS = [Placement((0,), (1, 5)), Placement((3, 1), (3, 6)), Placement((0, 1, 2, 3), (0, 7))]


def made(shape, placement: Placement, **options) -> Key:
    """A key with this placement; `options` are the scheme's other parameters, or its secret."""
    return make_key("tree-ring", **of_shape(shape), channels=placement.channels, radii=placement.radii, **options)


def scheme(shape, placement, pattern="ring", mask="centred", seed=0) -> TreeRing:
    return TreeRing(made(shape, placement, pattern=pattern, mask=mask, secret=secret(seed)))


def white(shape, number=2, seed=0) -> torch.Tensor:
    return torch.randn(number, *shape, generator=torch.Generator().manual_seed(seed))


def spectrum(noise: torch.Tensor) -> torch.Tensor:
    return torch.fft.fft2(noise.double(), norm="ortho")


def features(s: TreeRing, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of noise (B, d) and of the key (d,)."""
    marked = spectrum(noise)[:, list(s.placement.channels)]
    return s.features(marked), s.features(s.hermitian[None])[0]


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
    found, key = features(s, marked)
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
    found, key = features(s, marked)
    assert marked.dtype == dtype and (found - key).abs().max() < 16 * torch.finfo(dtype).eps + 1e-6


def test_a_key_survives_its_file(tmp_path):
    key = made((4, 16, 24), PLACEMENTS[1])
    key.save(tmp_path / "my.key")
    a, b = TreeRing(key), TreeRing(Key.load(tmp_path / "my.key"))
    noise = white((4, 16, 24))
    assert torch.equal(a.embed(noise), b.embed(noise)) and key.fingerprint == Key.load(tmp_path / "my.key").fingerprint


def test_keys_of_the_system_are_unlike_any_other():
    a, b = (made((4, 32, 32), PLACEMENTS[0]) for _ in range(2))
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
    _, key = features(s, noise)
    assert cosine_test(features(s, s.embed(noise))[0].numpy(), key.numpy())[1].max() < 1e-12
    # The key of the features is what taking the real part leaves of it: the mean over many noises.
    mean = features(s, s.embed(white(shape, 400, 1)))[0].mean(0)
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
    found, key = features(s, white(shape))
    assert found.shape == (2, count) and key.shape == (count,) and found.dtype == torch.float64
    assert s.numbers == s.free == count


def test_a_ring_has_one_feature_a_circle():
    s = scheme((4, 32, 32), Placement((0, 2), (3, 7)), "ring")
    found, key = features(s, white((4, 32, 32)))
    assert found.shape == (2, 10) and key.shape == (10,)


@pytest.mark.parametrize("pattern, allowed", [("rand", 0.005), ("ring", 0.02)])
def test_an_image_with_one_key_does_not_carry_another(pattern, allowed):
    shape, place = (4, 32, 32), Placement((0, 2), (3, 10))
    marked = scheme(shape, place, pattern, seed=999).embed(white(shape, 4)) * 0.6 + white(shape, 4, 1) * 0.8
    pairs = [features(scheme(shape, place, pattern, seed=seed), marked) for seed in range(400)]
    p = np.concatenate([cosine_test(found.numpy(), key.numpy())[1] for found, key in pairs])
    assert (p < 1e-3).mean() <= allowed


@every_mask
@pytest.mark.parametrize("pattern", ["rand", "ring"])
@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 9, 8)])
def test_features_of_white_noise_are_white(shape, mask, pattern):
    s = scheme(shape, Placement((1, 0), (0, 3)), pattern, mask=mask)
    number = 20_000
    found = features(s, white(shape, number))[0]
    covariance = found.T @ found / number
    assert (covariance - torch.eye(found.shape[1])).abs().max() < 6 / number**0.5
    assert found.mean(0).abs().max() < 5 / number**0.5
    assert stats.kstest(found.flatten()[::7], "norm").pvalue > 0.01


@every_place
@every_shape
def test_a_circles_feature_has_its_power_from_there_alone(shape, placement):
    s = scheme(shape, placement)
    ring, bins = rings(*shape[1:]), spectrum(white(shape, 1))
    low, high = placement.radii
    for row, channel in enumerate(placement.channels):
        for radius in range(low, high + 1):
            only = torch.zeros_like(bins)
            only[:, channel] = torch.where(ring == radius, bins[:, channel], 0)
            found = features(s, torch.fft.ifft2(only, norm="ortho").real)[0][0].abs() > 1e-9
            # Channel by channel, in the order of the placement, circle by circle.
            assert found.nonzero().flatten().tolist() == [row * (high - low + 1) + radius - low]


@every_mask
@every_place
@every_shape
def test_features_at_random_go_channel_by_channel_over_the_masks_bins(shape, placement, mask):
    s = scheme(shape, placement, "rand", mask)
    bins, each = spectrum(white(shape, 1)), s.numbers // len(placement.channels)
    reached = s.inside | opposite(s.inside)
    for row, channel in enumerate(placement.channels):
        for radius in (placement.radii[0] - 1, *placement.radii, placement.radii[1] + 2):
            only = torch.zeros_like(bins)
            only[:, channel] = torch.where((rings(*shape[1:]) == radius) & reached, bins[:, channel], 0)
            found = features(s, torch.fft.ifft2(only, norm="ortho").real)[0].view(len(placement.channels), each)
            there = found.abs() > 1e-9
            assert there[row].sum() == ((rings(*shape[1:]) == radius) & reached).sum()
            assert there.sum() == there[row].sum()


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
    turned = [marked.rot90(n, (-2, -1)) for n in (1, 2, 3)]
    for moved in (*turned, marked.flip(-1), marked.flip(-2), marked.mT):
        found, key = features(s, moved)
        assert (found - key).abs().max() < 1e-5
        assert cosine_test(found.numpy(), key.numpy())[0].min() > 1 - 1e-9
    shifted, key = features(s, marked.roll(5, -1))
    assert cosine_test(shifted.numpy(), key.numpy())[0].max() < 0.9


def test_flipped_noise_of_a_wide_latent_still_carries_the_ring():
    s = scheme((4, 16, 24), PLACEMENTS[1])
    marked = s.embed(white((4, 16, 24)))
    for dims in ([-1], [-2], [-1, -2]):
        found, key = features(s, marked.flip(dims))
        assert (found - key).abs().max() < 1e-5


def test_a_random_pattern_does_not_survive_a_turn():
    s = scheme((4, 32, 32), Placement((0,), (3, 10)), "rand")
    found, key = features(s, s.embed(white((4, 32, 32))).rot90(1, (-2, -1)))
    assert np.abs(cosine_test(found.numpy(), key.numpy())[0]).max() < 0.3


@pytest.mark.parametrize("shape", [(4, 32, 32), (4, 17, 30)])
def test_panels_show_the_ring_in_the_noise_and_in_the_key(shape):
    s = scheme(shape, Placement((2, 0), (3, 6)))
    height, width = shape[1:]
    noise, key = s.panels(s.embed(white(shape, 1)))
    inside = np.fft.fftshift(s.inside.numpy())
    assert noise.values.shape == key.values.shape == (height, width) and noise.values.dtype.kind == "f"
    for panel in (noise, key):
        assert np.array_equal(panel.inside, inside) and panel.radii == (3, 6)
    assert np.abs(noise.values - key.values)[inside].max() < 1e-5 and not key.values[~inside].any()
    assert np.abs(key.values[inside]).min() > 0
    assert not inside[height // 2, width // 2] and inside[height // 2 + 4, width // 2]
    first, second = s.key_panels()
    assert np.array_equal(first.values, key.values) and not np.array_equal(second.values, key.values)
    assert (noise.title, first.title, second.title) == ("recovered noise, channel 2", "channel 2", "channel 0")


# Marked noise is still noise


@pytest.mark.parametrize("pattern", ["ring", "rand"])
@every_mask
@every_place
def test_a_key_has_the_power_of_white_noise(placement, pattern, mask):
    s = scheme((4, 32, 32), placement, pattern, mask)
    power = s.spectrum.abs().square()[:, s.inside].mean(1)
    assert (power - 1).abs().max() < 1e-5
    if mask == "centred":
        _, key = features(s, white((4, 32, 32)))
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


# Tests on the scheme's vectors


@every_mask
@pytest.mark.parametrize("pattern", ["ring", "rand"])
def test_cosine_p_values_of_unmarked_noise_are_uniform(pattern, mask):
    s = scheme((2, 32, 32), Placement((1,), (3, 8)), pattern, mask)
    found, key = features(s, white((2, 32, 32), 1000))
    assert stats.kstest(cosine_test(found.numpy(), key.numpy())[1], "uniform").pvalue > 0.01


# As a scheme


@every_pattern
@every_mask
def test_keys_of_a_kind_observe_the_same(pattern, mask):
    shape, place = (4, 32, 32), PLACEMENTS[1]
    one, other = (scheme(shape, place, pattern, mask, seed) for seed in (0, 1))
    null, noise = Null.white(shape), white(shape)
    assert one.kind == other.kind and hash(one.kind) == hash(other.kind)
    assert np.array_equal(one.on(null).observe(noise), other.on(null).observe(noise))
    assert one.kind != scheme(shape, PLACEMENTS[0], pattern, mask).kind
    assert {
        one.kind != scheme(shape, place, p, m).kind for p in PATTERNS for m in MASKS if (p, m) != (pattern, mask)
    } == {True}


@every_pattern
def test_what_a_pattern_is_called_and_can_do(pattern):
    s, published = (scheme((4, 32, 32), PLACEMENTS[1], pattern, mask) for mask in MASKS)
    assert (s.label, published.label) == (pattern, f"{pattern}, published mask")
    assert s.score_name == ("power ratio" if pattern == "zeros" else "whitened cosine")
    assert (s.waves is not None) is (pattern == "rand") and (s.free == 0) is (pattern == "zeros")
    statistics = s.published(white((4, 32, 32)))
    assert list(statistics) == [statistic.name for statistic in REGISTRY["tree-ring"].published]
    assert np.array_equal(statistics["published_distance"], distance(s, white((4, 32, 32))))


@pytest.mark.parametrize("pattern, place", [("ring", Placement((0,), (5, 6))), ("ring", Placement((0,), (5, 7)))])
def test_a_key_that_no_picture_could_give_back_is_refused(pattern, place):
    shape = (3, 32, 32)
    with pytest.raises(SchemeError) as caught:
        scheme(shape, place, pattern).check_findable(1e-3)
    assert caught.value.code == "scheme.unfindable"
    scheme(shape, place, "zeros").check_findable(1e-3)
    scheme(shape, place, "rand").check_findable(1e-3)
    scheme(shape, Placement((0, 2), (5, 7)), "ring").check_findable(1e-3)


# Errors


@pytest.mark.parametrize("channels", [(), (4,), (-1,), (0, 0), (0, 9)])
def test_channels_that_are_not_there(channels):
    with pytest.raises(SchemeError) as caught:
        made((4, 32, 32), Placement(channels, (3, 8)))
    assert caught.value.code == "scheme.channels"


@pytest.mark.parametrize("radii", [(8, 3), (-1, 5), (3, 16), (0, 0), (20, 30)])
def test_radii_that_do_not_fit(radii):
    with pytest.raises(SchemeError) as caught:
        made((4, 32, 48), Placement((0,), radii))
    assert caught.value.code == "scheme.radii"
    made((4, 32, 48), Placement((0,), (0, 15)))


def test_unknown_patterns_and_masks():
    for names in ({"pattern": "square"}, {"mask": "round"}):
        with pytest.raises(SchemeError, match=r"ring, rand, zeros.*centred, published") as caught:
            made((4, 32, 32), PLACEMENTS[0], **names)
        assert caught.value.code == "scheme.pattern"


@pytest.mark.parametrize(
    "field, value, code",
    [
        ("scheme", "gaussian-shading", "scheme.another"),
        ("pattern", "square", "scheme.pattern"),
        ("pattern", 7, "scheme.pattern"),
        ("pattern", ["rand"], "scheme.pattern"),
        ("mask", "round", "scheme.pattern"),
        ("mask", 7, "scheme.pattern"),
        ("channels", [7], "scheme.channels"),
        ("channels", 7, "scheme.description"),
        ("channels", ["0"], "scheme.description"),
        ("channels", [True], "scheme.description"),
        ("channels", [{}], "scheme.description"),
        ("radii", [3, 99], "scheme.radii"),
        ("radii", 7, "scheme.description"),
        ("radii", [1, 2, 3], "scheme.description"),
        ("radii", [1.5, 3], "scheme.description"),
    ],
)
def test_a_key_whose_description_does_not_fit_it(field, value, code):
    key = made((4, 32, 32), PLACEMENTS[0])
    odd = Key(key.metadata | {field: value}, key.secret)
    with pytest.raises(SchemeError) as caught:
        TreeRing(odd)
    assert caught.value.code == code and "\n" not in str(caught.value)
    with pytest.raises(SchemeError) as caught:
        scheme_of(odd)
    assert caught.value.code == ("scheme.unknown" if field == "scheme" else code)


@pytest.mark.parametrize("field", ["pattern", "mask", "channels", "radii"])
def test_a_key_whose_description_lacks_a_field(field):
    key = made((4, 32, 32), PLACEMENTS[0])
    with pytest.raises(SchemeError):
        scheme_of(Key({name: value for name, value in key.metadata.items() if name != field}, key.secret))


# At every size


SIZES = [(24, 40), (32, 32), (48, 48), (64, 32), (20, 20), (33, 47)]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_a_radius_is_the_same_frequency_in_pixels_at_every_size(size):
    s = scheme_of(made((4, 32, 32), Placement((0, 2), (7, 9))), (4, *size))
    ky, kx = (np.fft.fftfreq(n) for n in size)  # cycles per latent pixel
    frequency = 32 * np.hypot(ky[:, None], kx[None])
    inside = s.inside.numpy()
    assert frequency[inside].min() >= 6.5 - 1e-9 and frequency[inside].max() <= 9.5 + 1e-9
    assert not ((frequency > 6.5 + 1e-6) & (frequency < 9.5 - 1e-6) & ~inside).any()
    assert np.abs(s.ring.numpy() - frequency).max() <= 0.5 + 1e-6
    assert inside.mean() == pytest.approx(np.pi * (9.5**2 - 6.5**2) / 32**2, rel=0.06)  # the same share of bins


@every_mask
def test_rings_of_the_native_size_are_whole_frequencies(mask):
    assert torch.equal(ring_index(mask, 32, 32), ring_index(mask, 32, 32, 32))
    ky, kx = signed_frequencies(32, 32)
    distance = torch.hypot(ky, kx).round() if mask == "centred" else torch.hypot(ky + 1, kx).ceil().clamp_min(1)
    assert torch.equal(ring_index(mask, 32, 32), distance.long())


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@every_mask
@every_pattern
def test_what_is_embedded_at_another_size_is_found_there(size, pattern, mask):
    shape = (4, *size)
    s = scheme_of(made((4, 32, 32), Placement((0, 2), (5, 9)), pattern=pattern, mask=mask), shape)
    test, noise = s.on(Null.white(shape).at(shape)), white(shape, 4)
    marked = s.embed(noise)
    if mask == "centred":
        assert (s.spectrum - opposite(s.spectrum).conj()).abs().max() < 1e-9
        found, key = features(s, marked)
        assert (found - key).abs().max() < 1e-5 and found.shape[1] == s.numbers
    if pattern != "zeros":
        assert (s.spectrum.abs().square()[:, s.inside].mean(1) - 1).abs().max() < 1e-9
    p = 10 ** test.log10_p(test.score(test.observe(torch.cat([marked, noise]))))
    assert p[:4].max() < 1e-3 < p[4:].min()


@pytest.mark.parametrize("mask", MASKS)
def test_rings_have_the_same_values_at_every_size(mask):
    key = made((4, 32, 32), Placement((1, 3), (5, 9)), pattern="ring", mask=mask, secret=secret(1))
    rows = []
    for size in SIZES:
        s = scheme_of(key, (4, *size))
        turn = middle_phase(*size).conj() if mask == "centred" else 1
        circles = [(s.spectrum * turn)[:, s.ring == r] for r in range(5, 10)]
        assert all((circle - circle[:, :1]).abs().max() < 1e-9 for circle in circles)
        row = torch.stack([circle[:, 0] for circle in circles], 1)
        rows.append(row / row.norm(dim=1, keepdim=True))  # but for the scale of unit power
    assert all((row - rows[0]).abs().max() < 1e-9 for row in rows)


def test_random_values_of_one_size_say_nothing_of_another():
    key = made((1, 32, 32), Placement((0,), (3, 12)), secret=secret(2))
    some, other = (scheme_of(key, (1, *size)).spectrum[0] for size in ((32, 32), (64, 64)))
    common = scheme_of(key, (1, 64, 64)).inside[::2, ::2] & scheme_of(key).inside  # every second bin
    a, b = some[common], other[::2, ::2][common]
    assert abs((a.conj() * b).mean().real) < 4 / len(a) ** 0.5


def test_values_are_those_of_the_published_expansion():
    key = made((2, 16, 16), Placement((1,), (2, 4)), secret=secret(3))
    s = scheme_of(key, (2, 12, 20))
    numbers = iter(normal(key.secret, "tree-ring rand centred 12x20 channel 1", 1000))
    expected = np.zeros((12, 20), complex)
    for i, j in np.argwhere(s.inside.numpy()):
        if not expected[i, j]:  # no bin of this mask is its own mirror
            value = (next(numbers) + 1j * next(numbers)) / 2**0.5
            expected[i, j], expected[-i % 12, -j % 20] = value, value.conjugate()
    expected /= (np.abs(expected[s.inside.numpy()]) ** 2).mean() ** 0.5
    assert np.allclose(s.spectrum[0], expected, atol=1e-12)
    ring = scheme_of(made((2, 16, 16), Placement((1,), (2, 4)), secret=secret(3), pattern="ring"))
    values = normal(key.secret, "tree-ring ring centred channel 1", 5)
    turned = (ring.spectrum[0] * middle_phase(16, 16).conj()).real
    ratios = [float(turned[ring.ring == r].mean()) / values[r] for r in (2, 3, 4)]
    assert ratios == pytest.approx([ratios[0]] * 3) and ratios[0] > 0


@pytest.mark.parametrize("size", [(10, 16), (18, 18)])
def test_noise_marked_at_another_size_is_unit_normal_in_every_pixel(size):
    number, shape = 500, (1, *size)
    noise = white(shape, number)
    keys = (made((1, 12, 12), Placement((0,), (1, 4)), secret=secret(i)) for i in range(number))
    marked = torch.cat([scheme_of(key, shape).embed(noise[i : i + 1]) for i, key in enumerate(keys)])
    pixels = marked.flatten(1).double().numpy()
    assert abs(pixels.var() - 1) < 0.02 and abs(pixels.mean()) < 0.01
    p = [stats.kstest(pixel, "norm").pvalue for pixel in pixels.T]
    assert stats.kstest(p, "uniform").pvalue > 0.001 and min(p) > 0.01 / len(p)
    power = spectrum(marked)[:, 0].abs().square().mean(0)  # white: no frequency stands out
    assert (power - 1).abs().max() < 6 / number**0.5


def test_circles_without_frequencies_drop_out_of_small_latents():
    key = made((4, 32, 32), Placement((0, 2), (4, 10)), pattern="ring")
    s = scheme_of(key, (4, 16, 16))  # of even rings, ring 5 lies between (2, 1) and (2, 2)
    assert s.bins.circles.tolist() == [4, 6, 7, 8, 9, 10] and s.numbers == s.free == 12
    test, noise = s.on(Null.white((4, 16, 16))), white((4, 16, 16), 500)
    found, own = features(s, s.embed(noise))
    assert (found - own).abs().max() < 1e-5
    assert stats.kstest(10 ** test.log10_p(test.score(test.observe(noise))), "uniform").pvalue > 0.01
    assert test.score(test.observe(s.embed(noise[:1])))[0] == pytest.approx(1)


@pytest.mark.parametrize(("size", "pattern"), [((2, 2), "rand"), ((3, 3), "ring"), ((4, 6), "zeros")])
def test_latents_too_small_for_a_radius_are_refused(size, pattern):
    key = made((4, 32, 32), Placement((0,), (7, 8)), pattern=pattern)
    with pytest.raises(SchemeError) as caught:
        scheme_of(key, (4, *size))
    assert caught.value.code == "scheme.size" and "x".join(map(str, size)) in str(caught.value)


def test_a_key_of_a_single_number_is_refused():
    with pytest.raises(SchemeError) as caught:  # its cosine is 1 or -1
        scheme_of(made((4, 32, 32), Placement((0,), (4, 4)), pattern="ring"))
    assert caught.value.code == "scheme.size"


@pytest.mark.parametrize("mask", ["centred", "published"])
def test_waves_of_a_search_have_one_variance(mask):
    schemes = [scheme((4, 32, 32), Placement((0,), (4, 7)), "rand", mask, seed) for seed in range(300)]
    power = torch.stack([scheme.waves.values for scheme in schemes]).abs().square().mean(0)
    assert (power / power.mean() - 1).abs().max() < 5 / 300**0.5  # each is exponential, so its mean deviates by 1/√n


def test_latents_of_other_channels_are_refused():
    with pytest.raises(SchemeError) as caught:
        scheme_of(made((4, 32, 32), PLACEMENTS[0]), (16, 32, 32))
    assert caught.value.code == "scheme.noise"


@every_pattern
@every_mask
def test_keys_of_one_kind_have_one_size(pattern, mask):
    key = made((4, 32, 32), Placement((0,), (7, 8)), pattern=pattern, mask=mask)
    other = made((4, 48, 48), Placement((0,), (7, 8)), pattern=pattern, mask=mask)
    assert scheme_of(key).kind != scheme_of(key, (4, 32, 48)).kind == scheme_of(key, (4, 32, 48)).kind
    assert scheme_of(key, (4, 48, 48)).kind != scheme_of(other).kind  # radii of another unit


# Keys of older files


@every_pattern
@every_mask
def test_an_old_key_marks_as_it_did_and_no_other_size(pattern, mask):
    s = scheme((4, 32, 32), PLACEMENTS[1], pattern, mask)
    old = old_key(made((4, 32, 32), PLACEMENTS[1], pattern=pattern, mask=mask), s.spectrum)
    noise = white((4, 32, 32))
    assert (scheme_of(old).embed(noise) - s.embed(noise)).abs().max() < 1e-5
    assert scheme_of(old, (4, 32, 32)).kind == s.kind
    for shape in ((4, 32, 48), (4, 64, 64), (3, 32, 32)):
        with pytest.raises(SchemeError) as caught:
            scheme_of(old, shape)
        assert caught.value.code == "scheme.old-key"


@pytest.mark.parametrize(
    "field, value", [("channels", [0, 1]), ("latent_shape", [4, 32, 33]), ("latent_shape", [4, 10**9, 10**9])]
)
def test_an_old_key_whose_values_do_not_fit_its_description(field, value):
    old = old_key(made((4, 32, 32), PLACEMENTS[0]), scheme((4, 32, 32), PLACEMENTS[0]).spectrum)
    with pytest.raises(SchemeError) as caught:
        scheme_of(Key(old.metadata | {field: value}, values=old.values))
    assert caught.value.code == "scheme.values"


@pytest.mark.parametrize("pattern", ["ring", "zeros"])
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 4, 32, 31), (4, 32, 32), (2, 4, 1, 1), (2, 5, 32, 32)])
def test_noise_of_another_shape(shape, pattern):
    s = scheme((4, 32, 32), PLACEMENTS[0], pattern)
    test = s.on(Null.white(s.latent_shape))
    for use in (s.embed, s.masked, s.published, s.panels, test.observe):
        with pytest.raises(SchemeError) as caught:
            use(torch.zeros(shape))
        assert caught.value.code == "scheme.noise"
