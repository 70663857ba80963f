"""Power missing from the rings of a mark: what is compared, p of noise with any power law, and p of a mark."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from identity import of_shape, secret
from scipy import stats

from ringmark.watermark.null import Null
from ringmark.watermark.schemes.base import make_key
from ringmark.watermark.schemes.fourier import Placement, signed_frequencies
from ringmark.watermark.schemes.tree_ring import MASKS, TreeRing

SHAPES = [(4, 32, 32), (4, 64, 64), (4, 16, 24), (4, 24, 16), (4, 33, 33), (4, 17, 30)]

every_mask = pytest.mark.parametrize("mask", MASKS)


def scheme(shape, place: Placement, mask="centred") -> TreeRing:
    placed = {"channels": place.channels, "radii": place.radii}
    return TreeRing(make_key("tree-ring", **of_shape(shape), **placed, pattern="zeros", mask=mask, secret=secret(0)))


def white(shape, number=2, seed=0) -> torch.Tensor:
    return torch.randn(number, *shape, generator=torch.Generator().manual_seed(seed))


def spectrum(s: TreeRing, noise: torch.Tensor) -> torch.Tensor:
    return torch.fft.fft2(noise.double(), norm="ortho")[:, list(s.placement.channels)]


def beside(s: TreeRing, noise: torch.Tensor) -> list[torch.Tensor]:
    """Powers (B, c, n) of the bins on each side of the mask."""
    return [spectrum(s, noise).abs().square()[..., side] for side in s.neighbours.masks]


def power_p(s: TreeRing, noise: torch.Tensor) -> np.ndarray:
    test = s.on(Null.white(s.latent_shape))
    return 10 ** test.log10_p(test.score(test.observe(noise)))


def test_zeros_take_out_their_share_of_the_power():
    shape = (1, 32, 32)
    s = scheme(shape, Placement((0,), (3, 8)))
    assert s.embed(white(shape, 200)).var().item() == pytest.approx(1 - s.inside.double().mean().item(), abs=0.02)


@every_mask
@pytest.mark.parametrize("radii", [(0, 6), (3, 8), (1, 1), (2, 3), (14, 15)])
def test_power_p_values_of_unmarked_noise_are_uniform(radii, mask):
    s = scheme((2, 32, 32), Placement((0, 1), radii), mask)
    noise = white((2, 32, 32), 2000, 2)
    assert stats.kstest(power_p(s, noise), "uniform").pvalue > 0.01
    if mask == "centred":
        assert power_p(s, s.embed(noise[:5])).max() < 1e-6


@pytest.mark.parametrize("slope", [-1, 1, 2])
@pytest.mark.parametrize("radii", [(7, 9), (4, 10), (3, 4)])
def test_a_power_law_is_no_mark(radii, slope):
    """Power r^-slope of the frequency r."""
    s, noise = scheme((2, 32, 32), Placement((0, 1), radii)), white((2, 32, 32), 2000, 3)
    radius = torch.hypot(*signed_frequencies(32, 32)).clamp_min(1)
    coloured = torch.fft.ifft2(torch.fft.fft2(noise) * radius ** (-slope / 2)).real
    p = power_p(s, coloured)
    assert (p <= 0.05).mean() < 0.1 and (p <= 0.001).mean() <= 0.004


@every_mask
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radii", [(4, 5), (4, 4)])
def test_the_bins_beside_are_whole_pairs_on_both_sides_and_not_the_marks(shape, mask, radii):
    s = scheme(shape, Placement((0,), radii), mask)
    noise = white(shape, 1)
    within, beyond = (side[0, 0] for side in beside(s, noise))
    assert len(within) >= 8 and len(beyond) >= 20
    _, copies = np.unique(torch.cat([within, beyond]).numpy().round(9), return_counts=True)
    # Each with its conjugate, and none on both sides; at Nyquist's frequency a bin may be its own.
    assert set(copies) <= {1, 2} and (copies == 1).sum() <= 1
    marked = beside(s, s.embed(noise))
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(marked, beside(s, noise), strict=True))
    assert s.neighbours.weights.sum() == pytest.approx(1) and (s.neighbours.weights > 0).all()


@every_mask
def test_an_innermost_mask_is_compared_with_what_is_beyond(mask) -> None:
    s = scheme((1, 32, 32), Placement((0,), (1, 4)), mask)
    (beyond,) = beside(s, white((1, 32, 32), 1))
    assert len(beyond[0, 0]) > 50 and s.neighbours.weights.tolist() == [1]


def test_the_power_test_observes_the_mask_and_both_sides():
    s = scheme((2, 32, 32), Placement((1, 0), (4, 5)))
    test, noise = s.on(Null.white((2, 32, 32))), white((2, 32, 32), 3)
    expected = [s.features(spectrum(s, noise)), *(q.flatten(1) for q in beside(s, noise))]
    assert np.allclose(test.observe(noise), torch.cat(expected, 1).numpy())
    assert test.density(np.zeros(2)) is test.template is None
    scores = test.score(test.observe(noise))
    references = scores.mean() + np.array([-1.0, 0, 1])
    by_spread = stats.t.sf((scores - scores.mean()) / (4 / 3) ** 0.5, 2)  # deviation 1 of 3 references
    assert 10 ** test.log10_p(scores, references) == pytest.approx(by_spread)
    assert np.isfinite(test.log10_p(np.array([1e6]))).all()
