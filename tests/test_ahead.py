"""Work ahead of its consumer is in order, bounded, and stops when nobody wants more."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringmark.data.ahead import ahead


@given(st.lists(st.integers(), max_size=50), st.integers(0, 4), st.integers(1, 4))
def test_everything_comes_once_and_in_order(items, workers, depth):
    assert list(ahead(lambda x: x + 1, items, workers, depth)) == [(x, x + 1) for x in items]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_in_its_turn(workers):
    def fail(x):
        if x == 2:
            raise KeyError(x)
        return x

    def broken():
        yield from range(2)
        raise OSError

    found = ahead(fail, range(5), workers)
    assert [next(found)[1], next(found)[1]] == [0, 1]
    with pytest.raises(KeyError):
        next(found)
    found = ahead(fail, broken(), workers)
    assert [next(found)[1], next(found)[1]] == [0, 1]
    with pytest.raises(OSError):
        next(found)


def test_no_more_is_held_than_is_allowed():
    taken = []

    def items():
        for x in range(100):
            taken.append(x)
            yield x

    found = ahead(lambda x: x, items(), workers=2, depth=3)
    for _ in range(10):
        next(found)
        assert len(taken) <= 10 + 3 + 2
    found.close()


def test_work_goes_on_beside_its_consumer():
    """Two calls are under way at once, while the consumer waits for the first."""
    both = threading.Barrier(2, timeout=10)
    assert [x for x, _ in ahead(lambda _: both.wait(), range(4), workers=2)] == [0, 1, 2, 3]


def test_a_consumer_that_leaves_stops_the_threads():
    before = threading.active_count()
    found = ahead(lambda x: x, iter(int, 1), workers=2, depth=2)
    next(found)
    found.close()
    until = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before
