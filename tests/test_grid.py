"""A grid is ascending noise: N conditioning timesteps between N + 1 levels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringmark.inversion.schedule import Grid

SCHEDULE = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


@given(timesteps=st.sets(st.integers(0, 999), min_size=1, max_size=60), data=st.data())
def test_from_schedule_takes_the_levels_of_its_timesteps_in_any_order(timesteps, data):
    shuffled = data.draw(st.permutations(sorted(timesteps)))
    grid = Grid.from_schedule(SCHEDULE.float(), torch.tensor(shuffled), 1.0)
    assert len(grid) == len(timesteps)
    assert grid.timesteps.tolist() == sorted(timesteps) and grid.timesteps.dtype == torch.int64
    assert grid.alpha_bar.shape == (len(grid) + 1,) and grid.alpha_bar.dtype == torch.float64
    assert grid.alpha_bar[0] == 1.0
    assert torch.equal(grid.alpha_bar[1:], SCHEDULE.float()[grid.timesteps].double())
    assert (grid.alpha_bar.diff() < 0).all()


def test_the_clean_end_may_equal_the_first_level():
    clean = float(SCHEDULE[0])
    assert Grid.from_schedule(SCHEDULE, torch.tensor([500, 0]), clean).alpha_bar[:2].tolist() == [clean, clean]


@pytest.mark.parametrize(
    ("timesteps", "alpha_bar"),
    [
        ([1, 2], [1.0, 0.9]),
        ([1], [1.0]),
        ([[1]], [1.0, 0.9]),
        ([1, 2], [1.0, 0.5, 0.9]),
        ([1], [1.1, 0.9]),
        ([1], [1.0, 0.0]),
        ([1], [1.0, -0.1]),
        ([1], [1.0, float("nan")]),
    ],
)
def test_what_is_no_grid_is_refused(timesteps, alpha_bar):
    with pytest.raises(ValueError):
        Grid(torch.tensor(timesteps), torch.tensor(alpha_bar, dtype=torch.float64))
