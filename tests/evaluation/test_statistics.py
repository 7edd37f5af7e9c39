"""Intervals against known values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.evaluation.statistics import paired_difference, wilson


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(48, 48, 0.9259, 1.0), (0, 10, 0.0, 0.2775), (81, 263, 0.2553, 0.3662)],  # the last: Newcombe 1998
)
def test_wilson(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)


def test_nothing_counted_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert paired_difference([], []) == (0.0, -1.0, 1.0)


def test_only_disagreements_count() -> None:
    value, low, high = paired_difference([True] * 90 + [False] * 10, [True] * 100)
    assert value == pytest.approx(-0.1)
    assert low < -0.1 < high < 0
    value, low, high = paired_difference([True] * 50, [True] * 50)
    assert value == 0.0 and low == -high and 0.03 < high < 0.06


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_the_difference_mirrors_and_stays_in_range(pairs: list[tuple[bool, bool]]) -> None:
    one, two = zip(*pairs, strict=True)
    value, low, high = paired_difference(one, two)
    assert -1 <= low <= high <= 1
    assert paired_difference(two, one) == pytest.approx((-value, -high, -low))
