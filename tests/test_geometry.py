"""Shifts, turns and scales are found where they were made; the best of many tests is called no better than it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from identity import of_shape, secret
from scipy import stats

from ringmark.errors import SchemeError
from ringmark.inversion.noise_recovery import rings
from ringmark.watermark.attacks.chains import apply
from ringmark.watermark.detect.geometry import IDENTITY, Candidate, Peak, best_shift, undo, window
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.base import make_key
from ringmark.watermark.schemes.fourier import Placement
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.statistics import corrected, cosine_log10_p, cosine_p

SHAPE = (4, 32, 32)


def scheme_of(
    pattern: str = "rand",
    shape: tuple[int, int, int] = SHAPE,
    placement: Placement = Placement((0, 2), (7, 9)),
    mask: str = "centred",
    seed: int = 0,
) -> TreeRing:
    placed = {"channels": placement.channels, "radii": placement.radii}
    return TreeRing(make_key("tree-ring", **of_shape(shape), pattern=pattern, mask=mask, secret=secret(seed), **placed))


def white(number: int, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, *shape, generator=torch.Generator().manual_seed(seed))


WHITE = Null.white(SHAPE)


def some_null(shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> Null:
    """Of a covariance a ring, of different sizes and correlations."""
    roots = np.random.default_rng(seed).normal(size=(int(rings(*shape[1:]).max()) + 1, shape[0], shape[0]))
    return Null(roots @ roots.transpose(0, 2, 1) + 0.1 * np.eye(shape[0]), min(shape[1:]))


def ordinary(scheme: TreeRing, noise: torch.Tensor, null: Null) -> np.ndarray:
    """The score of the scheme's test (B,)."""
    test = scheme.on(null)
    return test.score(test.observe(noise))


def coloured(noise: torch.Tensor, null: Null) -> torch.Tensor:
    """White noise (B, C, h, w) given the covariance of this null."""
    root = torch.from_numpy(np.linalg.cholesky(null.covariance))[rings(*noise.shape[2:])]
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
    scheme, noise, null = scheme_of(pattern, shape, placement, mask), white(5, shape), some_null(shape)
    scores = scheme.shift_scores(noise, null, factor=factor)
    assert scores.shape == (5, factor * shape[1], factor * shape[2])
    # The features' √2 is a 32-bit number.
    assert scores[:, 0, 0].numpy() == pytest.approx(ordinary(scheme, noise, null), abs=1e-7)


@pytest.mark.parametrize("pattern, shape, placement, mask", CASES)
def test_every_shift_is_the_ordinary_score_of_noise_shifted_back(pattern, shape, placement, mask):
    scheme, noise, null = scheme_of(pattern, shape, placement, mask), white(2, shape), some_null(shape)
    scores = scheme.shift_scores(noise, null)
    for y, x in [(1, 0), (-3, 5), (7, -6)]:
        back = ordinary(scheme, noise.roll((-y, -x), (2, 3)), null)
        assert scores[:, y, x].numpy() == pytest.approx(back, abs=1e-7)


@pytest.mark.parametrize("pattern", ["rand", "ring"])
@pytest.mark.parametrize("shift", [(0, 0), (5, -11), (-16, 15), (1, 3)])
def test_a_shift_is_found_where_it_was_made(pattern, shift):
    scheme = scheme_of(pattern, placement=Placement((0, 2), (3, 9)))
    peak = best_shift(scheme, scheme.embed(white(3)).roll(shift, (2, 3)), WHITE)
    assert peak.score == pytest.approx(np.ones(3), abs=1e-6)
    assert (peak.shift == shift).all() and (peak.tests == 64 * 64).all()


def test_fractional_shifts():
    scheme, shift = scheme_of(), (2.5, -7.5)
    marked = moved(scheme.embed(white(3)), *shift)
    fine, coarse = (best_shift(scheme, marked, WHITE, factor=factor) for factor in (2, 1))
    assert fine.score == pytest.approx(np.ones(3), abs=1e-6) and (fine.shift == shift).all()
    # cos(π k/32) along both axes, averaged over circles of radius 8: what whole shifts miss.
    assert (coarse.score < 0.8).all() and (np.abs(coarse.shift - shift) == 0.5).all()


def test_zeros_has_nothing_to_search():
    with pytest.raises(SchemeError) as caught:
        best_shift(scheme_of("zeros"), white(1), WHITE)
    assert caught.value.code == "scheme.no-shifts"


def test_no_noise_has_no_score():
    for pattern in ("rand", "ring"):
        assert (scheme_of(pattern).shift_scores(torch.zeros(1, *SHAPE), WHITE) == 0).all()


def p_of(peak: Peak, features: int) -> np.ndarray:
    """p-values of the largest of many cosines."""
    log10_p = cosine_log10_p(peak.score, features)
    return 10 ** np.array([corrected(each, int(tests)) for each, tests in zip(log10_p, peak.tests, strict=True)])


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
    peak = best_shift(scheme, white(number, seed=1), WHITE, factor=factor)
    p = p_of(peak, scheme.free)
    for alpha in (0.05, 0.01, 0.001):
        exact(p, alpha)
    # Not idle either: few whole shifts are nearly independent.
    assert (p <= 0.5).mean() > (0.1 if factor == 1 else 0.03)


def test_the_best_shift_of_coloured_noise_is_sound_and_scale_free():
    scheme, null = scheme_of(), some_null()
    noise = coloured(white(600, seed=2), null) * torch.rand(600, 1, 1, 1).add(0.1)
    peak = best_shift(scheme, noise, null)
    p = p_of(peak, scheme.free)
    for alpha in (0.05, 0.01, 0.001):
        exact(p, alpha)
    # Every single test has its nominal level.
    single = cosine_p(scheme.shift_scores(noise[:60], null)[:, ::8, ::8].numpy().ravel(), 312)
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
    picture = waves(size)
    turned = to_tensor(apply(f"rotation:{angle}", to_picture(picture), 0))
    inside = disc(size)
    error = (undo(turned, [Candidate(angle)]) - picture)[..., inside]
    assert error.abs().max() < 0.04
    assert (turned - picture)[..., inside].abs().max() > 0.5


def test_a_crop_is_undone_up_to_a_shift_within_the_window():
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
    peak = best_shift(scheme_of(), noise, WHITE, within=within)
    assert (np.abs(peak.shift) <= 2.5).all() and peak.score < 0.5 and peak.tests == within.sum()
