"""Positions are those of a dict, in little memory."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringmark.data import positions
from ringmark.data.positions import Positions

pairs = st.lists(st.tuples(st.text(max_size=2), st.integers(0, 2**62)))


@given(pairs=pairs, recent=st.integers(0, 5))
def test_the_last_number_of_a_name_counts(pairs: list[tuple[str, int]], recent: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(positions, "RECENT", recent)
        found, expected = Positions(), dict(pairs)
        for name, number in pairs:
            found[name] = number
            assert found.get(name) == number
    assert {name: found.get(name) for name in expected} == expected
    assert len(found) == len(expected) and found.get("another") is None
    assert found.numbers().tolist() == sorted(expected.values())


def test_a_name_takes_few_bytes() -> None:
    tracemalloc.start()
    found, numbers = Positions(), list(range(30_000))
    random.Random(0).shuffle(numbers)
    before = tracemalloc.get_traced_memory()[0]
    for number in numbers:
        found[f"s3://bucket/a/long/folder/{number}.png"] = number
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert held < 35 * len(numbers)
