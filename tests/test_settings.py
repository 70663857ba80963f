"""Settings are compared by name, and typed values are what they say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringmark.data.settings import differences, flatten, typed

VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("abc", min_size=1, max_size=1), inner),
    max_leaves=6,
)
SETTINGS = st.dictionaries(st.text("abc", min_size=1, max_size=1), VALUES, max_size=4)


def test_each_difference_is_named():
    old = {"steps": 50, "size": (128, 128), "model": {"name": "pocket", "shape": [4, 8, 8]}, "seed": None}
    new = {"steps": 20, "size": [128, 128], "model": {"name": "other", "shape": [4, 8, 8]}, "lean": True}
    assert differences(old, new) == [
        "steps was 50, is 20",
        "model name was pocket, is other",
        "seed was null, is not set",
        "lean was not set, is true",
    ]
    assert differences(old, new, ignore=("steps", "model name", "seed", "lean")) == []


def test_long_values_are_cut_and_stay_different():
    (difference,) = differences({"keys": ["a" * 16] * 50}, {"keys": ["a" * 16] * 49 + ["b"]})
    assert len(difference) < 150


@given(SETTINGS, SETTINGS)
def test_no_difference_means_equal(old, new):
    assert differences(old, old) == []
    assert bool(differences(old, new)) == (flatten(old) != flatten(new)) == bool(differences(new, old))


@dataclass(frozen=True)
class Point:
    x: int
    name: str
    values: list[float]
    more: dict[str, Any]


def test_typed_values():
    value = {"x": 1, "name": "\udcff", "values": [1.5, 2.0], "more": {"deep": [1]}, "unknown": 3}
    point = typed(Point, json.loads(json.dumps(value)))
    assert point == Point(x=1, name="\udcff", values=[1.5, 2.0], more={"deep": [1]}) and isinstance(point, Point)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"x": "1"}, "x"),
        ({"x": True}, "x"),
        ({"x": 1.0}, "x"),
        ({"name": None}, "name"),
        ({"values": ["a"]}, "values 0"),
    ],
)
def test_fields_of_other_types_are_named(change, name):
    with pytest.raises(ValueError, match=f"^{name}: ") as caught:
        typed(Point, {"x": 1, "name": "a", "values": [], "more": {}} | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, [], "text", {}, {"x": 1}])
def test_what_lacks_fields_is_refused(value):
    with pytest.raises(ValueError):
        typed(Point, value)
