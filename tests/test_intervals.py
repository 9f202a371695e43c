from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.intervals import Interval


@pytest.mark.parametrize(
    ("text", "inside", "outside", "words"),
    [
        ("[0, 1]", (0, 0.5, 1), (-1e-9, 1.1), "0 to 1"),
        ("(0, 1]", (1e-300, 1), (0, 2), "more than 0, at most 1"),
        ("[0, 1)", (0, 0.999), (1, -1), "0 or more, less than 1"),
        ("(0, inf)", (1e-300, 1e300), (0, float("inf")), "more than 0"),
        ("[1, inf)", (1, 7), (0, 0.9), "1 or more"),
    ],
)
def test_an_interval_is_what_mathematics_means_by_it(text, inside, outside, words):
    interval = Interval.parse(text)
    assert all(number in interval for number in inside)
    assert not any(number in interval for number in (*outside, float("nan")))
    assert str(interval) == words


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_between_two_numbers_of_an_interval_there_is_none_outside_of_it(first, last, share):
    assert first + share * (last - first) in Interval.parse("[0, 1]")


@pytest.mark.parametrize("text", ["", "0, 1", "[0 1]", "[0, 1", "[a, b]"])
def test_what_is_no_interval_is_a_mistake(text):
    with pytest.raises((AssertionError, ValueError)):
        Interval.parse(text)
