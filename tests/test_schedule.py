"""A schedule is ascending noise: N conditioning timesteps between N + 1 levels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringmark.inversion.schedule import Schedule

ALPHA_BAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


def make(timesteps, signal, noise) -> Schedule:
    return Schedule(torch.tensor(timesteps), *(torch.tensor(x, dtype=torch.float64) for x in (signal, noise)))


@given(timesteps=st.sets(st.integers(0, 999), min_size=1, max_size=60), data=st.data())
def test_ddim_takes_the_levels_of_its_timesteps_in_any_order(timesteps, data):
    shuffled = data.draw(st.permutations(sorted(timesteps)))
    schedule = Schedule.from_alpha_bar(ALPHA_BAR.float(), torch.tensor(shuffled), 1.0)
    assert len(schedule) == len(timesteps)
    assert schedule.timesteps.tolist() == sorted(timesteps) and schedule.timesteps.dtype == torch.int64
    assert schedule.signal.shape == schedule.noise.shape == (len(schedule) + 1,)
    assert schedule.signal.dtype == schedule.noise.dtype == torch.float64
    assert schedule.at(0) == (1.0, 0.0)
    assert torch.allclose(schedule.signal[1:].square(), ALPHA_BAR.float()[schedule.timesteps].double(), rtol=1e-14)
    assert torch.allclose(schedule.signal.square() + schedule.noise.square(), torch.ones(()).double(), rtol=1e-14)
    assert (schedule.signal.diff() < 0).all() and (schedule.noise.diff() > 0).all()
    for level, t in enumerate(sorted(timesteps), 1):
        assert schedule.timestep(level) == t


def test_the_clean_end_may_equal_the_first_level():
    clean = float(ALPHA_BAR[0])
    schedule = Schedule.from_alpha_bar(ALPHA_BAR, torch.tensor([500, 0]), clean)
    assert schedule.at(0) == schedule.at(1) == (clean**0.5, (1 - clean) ** 0.5)


def test_the_noisy_end_may_have_no_signal():
    alpha_bar = torch.tensor([0.9, 0.5, 0.0])
    assert Schedule.from_alpha_bar(alpha_bar, torch.tensor([0, 2])).at(2) == (0.0, 1.0)


def test_a_timestep_beyond_the_training_schedule():
    for timestep in (-1, 1000):
        with pytest.raises(ValueError, match="999"):
            Schedule.from_alpha_bar(ALPHA_BAR, torch.tensor([500, timestep]))


def test_rectified_flow_is_a_schedule():
    schedule = Schedule.from_sigma(torch.tensor([0.0, 0.25, 1.0]), torch.tensor([250.0, 1000.0]))
    assert [schedule.at(i) for i in range(3)] == [(1, 0), (0.75, 0.25), (0, 1)]
    assert schedule.timestep(1) == 250.0 and schedule.straight
    assert not Schedule.from_alpha_bar(ALPHA_BAR, torch.tensor([250, 500])).straight


def test_a_variance_that_explodes_is_a_schedule():
    assert make([1.0, 80.0], [1, 1, 1], [0, 1, 80]).at(2) == (1, 80)


def test_the_first_levels_are_a_schedule():
    schedule = Schedule.from_alpha_bar(ALPHA_BAR, torch.tensor([100, 500, 900]))
    part = schedule.until(2)
    assert len(part) == 2 and part.timesteps.tolist() == [100, 500]
    assert [part.at(i) for i in range(3)] == [schedule.at(i) for i in range(3)]


@pytest.mark.parametrize(
    ("timesteps", "signal", "noise"),
    [
        ([1, 2], [1, 0.9], [0, 0.1]),
        ([1], [1], [0]),
        ([1], [1, 0.5], [0]),
        ([[1]], [1, 0.9], [0, 0.1]),
        ([1, 2], [1, 0.5, 0.9], [0, 0.1, 0.2]),
        ([1, 2], [1, 0.9, 0.5], [0, 0.2, 0.1]),
        ([1, 2], [1, 0, 0], [0, 1, 1]),
        ([1], [1, -0.1], [0, 1]),
        ([1], [1, 0.9], [-0.1, 0.1]),
        ([1], [1, 0.9], [0, 0]),
        ([1], [1, float("nan")], [0, 0.1]),
        ([1], [float("inf"), 1], [0, 0.1]),
        ([1], [1, 0.9], [0, float("inf")]),
    ],
)
def test_what_is_not_a_schedule_is_refused(timesteps, signal, noise):
    with pytest.raises(ValueError):
        make(timesteps, signal, noise)


def test_levels_are_float64():
    with pytest.raises(ValueError, match="float32"):
        Schedule(torch.tensor([1]), torch.tensor([1.0, 0.9]), torch.tensor([0.0, 0.1]))
