"""The published expansion: equal to another implementation of it and to fixed vectors; normal and independent."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ringmark.watermark.keys.expansion import normal

SECRET = bytes(range(32))


def uniforms(secret: bytes, label: str, count: int) -> list[Fraction]:
    """The numbers in (0, 1) as the documentation describes them, in exact arithmetic."""
    found: list[Fraction] = []
    for counter in range(count):
        digest = hashlib.sha256(secret + label.encode("utf-8") + counter.to_bytes(8, byteorder="big")).digest()
        words = (int.from_bytes(digest[8 * i : 8 * i + 8], byteorder="big") for i in range(4))
        found += [Fraction(2 * (word // 2**12) + 1, 2**53) for word in words]
    return found[:count]


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.text(max_size=20), st.integers(0, 50))
def test_it_is_what_is_published(secret, label, count):
    expected = [NormalDist().inv_cdf(float(u)) for u in uniforms(secret, label, count)]
    assert np.allclose(normal(secret, label, count), expected, rtol=1e-9, atol=1e-12)


def test_the_fixed_vectors():
    assert normal(SECRET, "", 4) == pytest.approx(
        [0.42185694317567457, -0.7659231693539623, 0.12463388869743773, 0.649431679375777], abs=1e-13
    )
    assert normal(SECRET, "tree-ring rand centred 64x64 channel 0", 5) == pytest.approx(
        [-1.1583700012319114, 1.5135826056414057, 0.8886233504807646, 0.866076076431551, -1.2296099547331845], abs=1e-13
    )


def test_a_longer_stream_begins_with_the_shorter():
    assert np.array_equal(normal(SECRET, "x", 1000)[:37], normal(SECRET, "x", 37))
    assert normal(SECRET, "x", 0).shape == (0,)


def test_no_word_gives_an_infinite_number():
    """The words of only zeros and of only ones give the smallest and the largest number."""
    ends = [NormalDist().inv_cdf(u) for u in (2.0**-53, 1 - 2.0**-53)]
    assert ends == pytest.approx([-8.21, 8.21], abs=0.01)


def test_numbers_are_unit_normal():
    numbers = normal(SECRET, "many", 200_000)
    assert stats.kstest(numbers, "norm").pvalue > 0.01
    assert abs(numbers.mean()) < 4 / len(numbers) ** 0.5 and abs(numbers.var() - 1) < 4 * (2 / len(numbers)) ** 0.5
    lags = [np.mean(numbers[:-lag] * numbers[lag:]) for lag in range(1, 9)]  # within a hash and across hashes
    assert np.abs(lags).max() < 4.5 / len(numbers) ** 0.5


def test_labels_and_secrets_give_independent_numbers():
    streams = [normal(SECRET, label, 20_000) for label in ("a", "b", "ab", "a ", "A")]
    streams += [normal(bytes([i]) + SECRET[1:], "a", 20_000) for i in (1, 2, 128)]
    correlations = [np.corrcoef(x, y)[0, 1] for x, y in combinations(streams, 2)]
    assert np.abs(correlations).max() < 4.5 / 20_000**0.5
