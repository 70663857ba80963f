"""A change is undone on pixels and in the spectrum alike; its shifts and the number of tests are those it needs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ringmark.watermark.attacks.chains import apply
from ringmark.watermark.detect.geometry import (
    FAMILIES,
    IDENTITY,
    Candidate,
    Grid,
    all_shifts,
    phases,
    read,
    shifts_of,
    spectrum,
    undo,
)

CHANGES = [
    Candidate(40.0),
    Candidate(180.0, mirrored=True),
    Candidate(0.0, 1.3),
    Candidate(0.0, 1.0, 1.1, mirrored=True),
    Candidate(-25.0, 1.2, 0.9),
]


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


def test_a_crop_is_undone_up_to_a_shift_that_is_tested():
    picture, candidate = waves((128, 128)), Candidate(0, 0.75**-0.5)
    for seed in range(4):
        cropped = to_tensor(apply("crop:0.75", to_picture(picture), seed))
        room = 128 * (1 - 0.75**0.5)
        left, top = room * np.random.default_rng(seed).random(2)
        moved = torch.tensor([[1, 0, 2 * (left - room / 2) / 128], [0, 1, 2 * (top - room / 2) / 128]])
        places = torch.nn.functional.affine_grid(moved[None].float(), [1, 3, 128, 128], align_corners=False)
        there = torch.nn.functional.grid_sample(picture, places, mode="bicubic", align_corners=False)
        assert (undo(cropped, [candidate]) - there)[..., 40:88, 40:88].abs().max() < 0.04
        offset = -torch.tensor([left - room / 2, top - room / 2]) / 4  # in latents of 4 px
        assert (shifts_of(candidate, (32, 32)) - offset).abs().amax(1).min() <= 0.25


def test_undoing_nothing_and_each_its_own():
    picture = waves((20, 31))
    candidates = [IDENTITY, Candidate(90), Candidate(0, 2), Candidate(30, 0.8)]
    both = undo(picture.expand(4, -1, -1, -1), candidates)
    assert torch.allclose(both[:1], picture, atol=1e-5)
    for one, candidate in zip(both, candidates, strict=True):
        assert torch.allclose(one, undo(picture, [candidate])[0], atol=1e-6)
    square = waves((24, 24))
    assert torch.allclose(undo(square, [Candidate(90)]), square.rot90(-1, (2, 3)), atol=1e-4)
    assert torch.allclose(undo(square, [Candidate(mirrored=True)]), square.flip(3), atol=1e-5)
    assert torch.allclose(undo(square, [Candidate(180, mirrored=True)]), square.flip(2), atol=1e-5)
    edges = undo(square, [Candidate(0, 2)])
    assert torch.allclose(edges[..., 0, 12], edges[..., 3, 12], atol=1e-6)  # the edge continued


def bumps(right: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """A smooth function of the plane, about nothing 10 from the middle."""
    centres, signs = [(2.0, 1.0), (-3.0, 2.0), (1.0, -3.5)], (1.0, -0.7, 0.5)
    parts = [s * torch.exp(-((right - x) ** 2 + (down - y) ** 2) / 4) for s, (x, y) in zip(signs, centres, strict=True)]
    return torch.stack(parts).sum(0)


def seen(candidate: Candidate, size: tuple[int, int], shift: tuple[float, float] = (0, 0)) -> torch.Tensor:
    """What latents (1, 1, h, w) show of the shifted bumps after a change."""
    height, width = size
    down, right = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in (height, width)), indexing="ij"
    )
    angle = np.deg2rad(candidate.angle)
    turned = np.cos(angle) * right - np.sin(angle) * down, np.sin(angle) * right + np.cos(angle) * down
    across = candidate.scale * candidate.stretch * (-1 if candidate.mirrored else 1)
    return bumps(turned[0] / across - shift[0], turned[1] / candidate.scale - shift[1])[None, None]


FREQUENCIES = torch.tensor([[x, y] for x in range(-4, 5) for y in range(1, 5)]) / 32


@pytest.mark.parametrize("size", [(32, 32), (28, 40), (33, 32)])
def test_the_spectrum_of_the_unchanged_is_read_from_that_of_the_changed(size):
    truth = read(spectrum(seen(IDENTITY, size)), [IDENTITY], FREQUENCIES)[0, 0]
    for candidate in CHANGES:
        changed = read(spectrum(seen(candidate, size)), [IDENTITY, candidate], FREQUENCIES)[0]
        back = changed[1] / (candidate.scale**2 * candidate.stretch)
        assert (back - truth).abs().max() < 0.02 * truth.abs().max(), candidate
        assert (changed[0] - truth).abs().max() > 0.1 * truth.abs().max(), candidate


def test_read_at_whole_frequencies_is_the_transform():
    noise = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    k = torch.tensor([[1, 2], [0, 3], [-5, 1], [4, -2]])  # right, down
    found = read(spectrum(noise), [IDENTITY], k / torch.tensor([12, 8]))[:, 0]
    turn = torch.exp(1j * torch.pi * (k[:, 0] * 11 / 12 + k[:, 1] * 7 / 8))
    there = torch.fft.fft2(noise)[..., k[:, 1], k[:, 0]] * turn
    assert torch.allclose(found, there, atol=1e-4)


def test_a_shift_turns_the_phases():
    still, moved = (read(spectrum(seen(IDENTITY, (32, 32), s)), [IDENTITY], FREQUENCIES) for s in ((0, 0), (2.5, -1)))
    cos, sin = phases(FREQUENCIES, torch.tensor([[2.5, -1.0]])).split(len(FREQUENCIES))
    assert torch.allclose(moved.flatten() * (cos + 1j * sin).flatten(), still.flatten(), atol=1e-3)


def test_shifts():
    everywhere = all_shifts((4, 6))
    assert everywhere.shape == (8 * 12, 2) and everywhere.amin(0).tolist() == [-3, -2]
    assert everywhere.amax(0).tolist() == [2.5, 1.5] and len(everywhere.unique(dim=0)) == 96
    assert len(shifts_of(IDENTITY, (16, 32))) == 13  # within a pixel
    cropped, oblong = shifts_of(Candidate(0, 2), (16, 32), slack=0), shifts_of(Candidate(0, 1, 2), (16, 32), slack=0)
    assert len(cropped) == 17 * 33 and cropped.abs().amax(0).tolist() == [8, 4]  # a quarter of each side
    assert len(oblong) == 33 and (oblong[:, 1] == 0).all()
    turned = shifts_of(Candidate(0, 2), (16, 16), slack=0, turned=True)
    assert turned.norm(dim=1).max() == pytest.approx(32**0.5, abs=0.3)


def test_every_change_is_in_one_family_and_p_counts_all_tests():
    grid, size = Grid(), (32, 32)
    at_one, upright = grid.turned(size), grid.upright(size)
    angles = sorted((turn + rest) % 360 for turn in grid.coarse_angles for rest in grid.fine_angles)
    assert np.diff(angles) == pytest.approx(grid.spacing) and len(angles) == 144
    around = grid.around(at_one)
    for groups, copies in ((upright, 1), (around, len(grid.coarse_angles))):
        members = [each for group in groups for each in group.candidates]
        assert len(set(members)) == len(members)
        for tests in {group.tests for group in groups}:
            family = [group for group in groups if group.tests == tests]
            assert tests == FAMILIES * copies * sum(len(g.candidates) * len(g.shifts) for g in family)
    (within,) = grid.within(size, 9)
    assert within.tests == FAMILIES * 9 * 13
    assert len({group.tests for group in (*upright, *around, within)}) == FAMILIES
    assert [g.tests for g in around] == [g.tests for g in at_one]
    sides = {each.sides for group in upright for each in group.candidates}
    assert all(
        min(np.hypot(a / down - 1, b / across - 1) for down, across in sides) < 0.03
        for a, b in [(1, 1.1), (1.1, 1), (1.4, 1.4), (2, 2), (1.3, 1.4)]
    )


@pytest.mark.parametrize(
    "candidate, note",
    [
        (IDENTITY, ""),
        (Candidate(75, 1.27), "rotated by 75°, enlarged 1.27 times"),
        (Candidate(180, mirrored=True), "mirrored, rotated by 180°"),
        (Candidate(0, 1.04, 1.04), "width enlarged 1.08 times, height enlarged 1.04 times"),
        (Candidate(0, 1.1, 1 / 1.1), "height enlarged 1.1 times"),
    ],
)
def test_changes_in_words(candidate, note):
    assert candidate.note == note
