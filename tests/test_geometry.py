"""Shifts, turns and scales are found where they were made; the best of many tests is called no better than it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from ringmark.errors import SchemeError
from ringmark.inversion.noise_recovery import rings
from ringmark.watermark.calibration import whitened_test
from ringmark.watermark.detect.geometry import (
    IDENTITY,
    Candidate,
    Search,
    best_shift,
    null_covariance,
    shift_scores,
    undo,
    window,
)
from ringmark.watermark.schemes.tree_ring import Placement, TreeRing, make_key
from ringmark.watermark.statistics import cosine_p, maximum_p

SHAPE = (4, 32, 32)


def scheme_of(
    pattern: str = "rand",
    shape: tuple[int, int, int] = SHAPE,
    placement: Placement = Placement((0, 2), (7, 9)),
    mask: str = "centred",
    seed: int = 0,
) -> TreeRing:
    rng = np.random.default_rng(seed)
    return TreeRing(make_key(shape, placement, model={}, pattern=pattern, mask=mask, rng=rng))


def white(number: int, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, *shape, generator=torch.Generator().manual_seed(seed))


def identity(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.tile(np.eye(shape[0]), (int(rings(*shape[1:]).max()) + 1, 1, 1))


def some_covariance(shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> np.ndarray:
    """One a ring, of different sizes and correlations."""
    roots = np.random.default_rng(seed).normal(size=(int(rings(*shape[1:]).max()) + 1, shape[0], shape[0]))
    return roots @ roots.transpose(0, 2, 1) + 0.1 * np.eye(shape[0])


def coloured(noise: torch.Tensor, covariance: np.ndarray) -> torch.Tensor:
    """White noise (B, C, h, w) given this covariance (R, C, C) by ring."""
    root = torch.from_numpy(np.linalg.cholesky(covariance))[rings(*noise.shape[2:])]
    spectrum = torch.einsum("hwij,bjhw->bihw", root.to(torch.complex128), torch.fft.fft2(noise.double()))
    return torch.fft.ifft2(spectrum).real


def moved(noise: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """Noise (B, C, h, w) shifted cyclically, by fractions too where it has no Nyquist frequency."""
    ky, kx = (torch.fft.fftfreq(n, dtype=torch.float64) for n in noise.shape[2:])
    ramp = torch.exp(-2j * torch.pi * (ky[:, None] * y + kx * x))
    return torch.fft.ifft2(torch.fft.fft2(noise.double()) * ramp).real


CASES = [
    ("rand", SHAPE, Placement((0, 2), (7, 9)), "centred"),
    ("ring", SHAPE, Placement((0, 2), (3, 9)), "centred"),
    ("rand", (2, 15, 24), Placement((0, 1), (0, 5)), "centred"),
    ("ring", (2, 15, 24), Placement((0, 1), (1, 5)), "centred"),
    ("rand", (3, 16, 16), Placement((1,), (2, 7)), "published"),
    ("ring", (3, 16, 16), Placement((0, 1), (2, 6)), "published"),
]


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("pattern, shape, placement, mask", CASES)
def test_no_shift_is_the_ordinary_score(pattern, shape, placement, mask, factor):
    scheme, noise, covariance = scheme_of(pattern, shape, placement, mask), white(5, shape), some_covariance(shape)
    scores = shift_scores(scheme, noise, covariance, factor=factor)
    assert scores.shape == (5, factor * shape[1], factor * shape[2])
    # The features' √2 is a 32-bit number.
    assert scores[:, 0, 0].numpy() == pytest.approx(whitened_test(scheme, noise, covariance)[0], abs=1e-7)


@pytest.mark.parametrize("pattern, shape, placement, mask", CASES)
def test_every_shift_is_the_ordinary_score_of_noise_shifted_back(pattern, shape, placement, mask):
    scheme, noise, covariance = scheme_of(pattern, shape, placement, mask), white(2, shape), some_covariance(shape)
    scores = shift_scores(scheme, noise, covariance)
    for y, x in [(1, 0), (-3, 5), (7, -6)]:
        back = whitened_test(scheme, noise.roll((-y, -x), (2, 3)), covariance)[0]
        assert scores[:, y, x].numpy() == pytest.approx(back, abs=1e-7)


@pytest.mark.parametrize("pattern", ["rand", "ring"])
@pytest.mark.parametrize("shift", [(0, 0), (5, -11), (-16, 15), (1, 3)])
def test_a_shift_is_found_where_it_was_made(pattern, shift):
    scheme = scheme_of(pattern, placement=Placement((0, 2), (3, 9)))
    peak = best_shift(scheme, scheme.embed(white(3)).roll(shift, (2, 3)), identity())
    assert peak.score == pytest.approx(np.ones(3), abs=1e-6)
    assert (peak.shift == shift).all() and (peak.tests == 64 * 64).all()


def test_fractional_shifts():
    scheme, shift = scheme_of(), (2.5, -7.5)
    marked = moved(scheme.embed(white(3)), *shift)
    fine, coarse = (best_shift(scheme, marked, identity(), factor=factor) for factor in (2, 1))
    assert fine.score == pytest.approx(np.ones(3), abs=1e-6) and (fine.shift == shift).all()
    # cos(π k/32) along both axes, averaged over circles of radius 8: what whole shifts miss.
    assert (coarse.score < 0.8).all() and (np.abs(coarse.shift - shift) == 0.5).all()


def test_zeros_has_nothing_to_search():
    with pytest.raises(SchemeError, match="nothing to search"):
        best_shift(scheme_of("zeros"), white(1), identity())


def test_no_noise_has_no_score():
    for pattern in ("rand", "ring"):
        assert (shift_scores(scheme_of(pattern), torch.zeros(1, *SHAPE), identity()) == 0).all()


def exact(p: np.ndarray, alpha: float) -> None:
    """P(p ≤ α) ≤ α is not refuted at 1e-4."""
    assert stats.binom.sf((p <= alpha).sum() - 1, len(p), alpha) > 1e-4, alpha


@pytest.mark.parametrize(
    "pattern, placement",
    [("rand", Placement((0, 2), (7, 9))), ("rand", Placement((1,), (2, 4))), ("ring", Placement((0, 2), (3, 9)))],
)
@pytest.mark.parametrize("factor", [1, 2])
def test_the_best_shift_of_white_noise_is_sound(pattern, placement, factor):
    scheme, number = scheme_of(pattern, placement=placement), 1000 if pattern == "rand" else 200
    peak = best_shift(scheme, white(number, seed=1), identity(), factor=factor)
    p = maximum_p(peak.score, len(scheme.feature_rings()[0]), int(peak.tests[0]))
    for alpha in (0.05, 0.01, 0.001):
        exact(p, alpha)
    # Not idle either: few whole shifts are nearly independent.
    assert (p <= 0.5).mean() > (0.1 if factor == 1 else 0.03)


def test_the_best_shift_of_coloured_noise_is_sound_and_scale_free():
    scheme, covariance = scheme_of(), some_covariance()
    noise = coloured(white(600, seed=2), covariance) * torch.rand(600, 1, 1, 1).add(0.1)
    peak = best_shift(scheme, noise, covariance)
    p = maximum_p(peak.score, len(scheme.feature_rings()[0]), int(peak.tests[0]))
    for alpha in (0.05, 0.01, 0.001):
        exact(p, alpha)
    # Every single test has its nominal level.
    single = cosine_p(shift_scores(scheme, noise[:60], covariance)[:, ::8, ::8].numpy().ravel(), 312)
    assert stats.kstest(single, "uniform").pvalue > 1e-3


def waves(size: tuple[int, int] = (96, 96)) -> torch.Tensor:
    """(1, 3, H, W): smooth, and no two places alike."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij")
    planes = [torch.sin(5 * x + 3 * y), torch.cos(4 * y - 2 * x) * x, torch.sin(3 * x * y + 2 * x - y)]
    return torch.stack(planes)[None]


def to_picture(x: torch.Tensor):
    from ringmark.data.images import from_array

    return from_array(x[0].numpy())


def to_tensor(image) -> torch.Tensor:
    from ringmark.data.images import to_array

    return torch.from_numpy(to_array(image))[None]


def disc(size: tuple[int, int]) -> torch.Tensor:
    height, width = size
    y, x = torch.arange(height)[:, None] - (height - 1) / 2, torch.arange(width) - (width - 1) / 2
    return torch.hypot(y, x) < min(size) / 2 - 3


@pytest.mark.parametrize("size", [(96, 96), (64, 96), (65, 80)])
@pytest.mark.parametrize("angle", [75, -20, 131, 180])
def test_a_turn_is_undone_within_the_disc(size, angle):
    from ringmark.watermark.attacks.chains import apply

    picture = waves(size)
    turned = to_tensor(apply(f"rotation:{angle}", to_picture(picture), 0))
    inside = disc(size)
    error = (undo(turned, [Candidate(angle)]) - picture)[..., inside]
    assert error.abs().max() < 0.04
    assert (turned - picture)[..., inside].abs().max() > 0.5


def test_a_crop_is_undone_up_to_a_shift_within_the_window():
    from ringmark.watermark.attacks.chains import apply

    picture, candidate = waves((128, 128)), Candidate(0, 0.75**-0.5)
    for seed in range(4):
        cropped = to_tensor(apply("crop:0.75", to_picture(picture), seed))
        room = 128 * (1 - 0.75**0.5)
        left, top = room * np.random.default_rng(seed).random(2)
        back = moved(undo(cropped, [candidate]), top - room / 2, left - room / 2)
        assert (back - picture)[..., 40:88, 40:88].abs().max() < 0.04
        y, x = (round(-2 * (offset - room / 2) / 4) for offset in (top, left))  # in halves of latents of 4 px
        assert window([candidate], (32, 32))[0, y, x]


def test_undoing_nothing_and_each_its_own():
    picture = waves((20, 31))
    candidates = [IDENTITY, Candidate(90), Candidate(0, 2), Candidate(30, 0.8)]
    both = undo(picture.expand(4, -1, -1, -1), candidates)
    assert torch.allclose(both[:1], picture, atol=1e-5)
    for one, candidate in zip(both, candidates, strict=True):
        assert torch.allclose(one, undo(picture, [candidate])[0], atol=1e-6)
    square = waves((24, 24))
    assert torch.allclose(undo(square, [Candidate(90)]), square.rot90(-1, (2, 3)), atol=1e-4)
    edges = undo(square, [Candidate(0, 2)])
    assert torch.allclose(edges[..., 0, 12], edges[..., 3, 12], atol=1e-6)  # the edge continued
    assert (undo(square, [Candidate(0, 2)], padding="zeros")[..., :3, :] == 0).all()


def test_windows():
    all_, turned, cropped, oblong = window(
        [IDENTITY, Candidate(90), Candidate(0, 2), Candidate(90, 2)], (16, 32), factor=2, slack=1.0
    )
    assert all_.all() and all_.shape == (32, 64)
    assert turned.sum() == 5 * 5 and turned[0, 0] and turned[-2, 2] and not turned[3, 0]
    assert cropped.sum() == (2 * 2 * 5 + 1) * (2 * 2 * 9 + 1)  # a quarter of each side, and 1
    assert oblong.sum() == 32 * (2 * 2 * 5 + 1)  # a quarter of the other side; the whole height
    noise = scheme_of().embed(white(1)).roll((5, 0), (2, 3))
    within = window([Candidate(0, 1.1)], (32, 32))
    peak = best_shift(scheme_of(), noise, identity(), within=within)
    assert (np.abs(peak.shift) <= 2.5).all() and peak.score < 0.5 and peak.tests == within.sum()


def test_the_grid_holds_the_identity_once_and_tests_count_all():
    for search in (Search(), Search(angles=(3,), scales=(1.1,)), Search(angles=(), scales=())):
        assert search.grid[0] == IDENTITY and search.grid.count(IDENTITY) == 1
        assert search.inversions == 1 + min(search.dear, len(search.grid) - 1)
    assert len(Search().grid) == 1800
    search = Search(angles=(0, 10), scales=(1.0,), factor=1, slack=1.0)
    assert search.tests(SHAPE) == 32 * 32 + 3 * 3


def test_turned_noise_ranks_what_was_turned():
    """Were the networks to turn with the picture, the cheap stage alone would tell: here the noise itself is turned."""
    scheme, search = scheme_of(placement=Placement((0, 2), (3, 5))), Search(angles=tuple(range(-180, 180, 10)))
    for truth in (Candidate(70.0, 1.0), Candidate(-40.0, 1.1249), Candidate(0.0, 1.2653)):
        inverse = Candidate(-truth.angle, 1 / truth.scale)
        noise = undo(scheme.embed(white(1)), [inverse], padding="zeros")
        assert search.promising([scheme_of(seed=9), scheme], noise[0], identity())[0] == truth


@pytest.fixture(scope="module")
def pocket():
    from ringmark.inversion.models.pipeline import LatentModel

    return LatentModel.from_pretrained("pocket")


def test_the_search_finds_a_turned_and_a_cropped_picture(pocket):
    from ringmark.data.images import Sample, from_array
    from ringmark.watermark.attacks.chains import apply
    from ringmark.watermark.detect.detector import Detector
    from ringmark.watermark.embed import generate
    from ringmark.watermark.schemes.tree_ring import recommend

    placement = recommend(pocket.recovery, pocket.latent_shape)
    keys = [
        make_key(pocket.latent_shape, placement, model=pocket.identity, rng=np.random.default_rng(i)) for i in (0, 1)
    ]
    (drawn,) = generate(pocket, ["lake at day with green hills"], [3], scheme=TreeRing(keys[0]), steps=10)
    image = from_array(drawn.image.numpy())
    samples = [Sample(spec, apply(spec, image, 1)) for spec in ("rotation:75", "crop:0.75")]
    detector = Detector(pocket, keys)
    search = Search(angles=(-100, -50, 0, 50, 75), scales=(1.0, 1.08, 1.16), dear=2, steps=5)
    turned, cropped = search(detector, samples)
    assert [f.key for f in turned] == [f.key for f in cropped] == list(detector.schemes)
    for (mine, other), sample, truth in zip(
        (turned, cropped), samples, (Candidate(75, 1), Candidate(0, 1.16)), strict=True
    ):
        assert mine.sample_id == sample.id and mine.candidate == truth and mine.p_value < 1e-3
        assert other.p_value > 0.01 and other.score < mine.score
        assert mine.inversions == other.inversions == search.inversions == 3
        assert mine.tests == search.tests(pocket.latent_shape)
    assert np.abs(turned[0].shift).max() <= 1
    same = search(detector, samples[1:], covariance=null_covariance(pocket), batch=1)
    assert same[0][0].score == pytest.approx(cropped[0].score, abs=1e-4)
