"""Intervals of numbers, written as mathematics writes them: [0, 1], (0, inf)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_WRITTEN = re.compile(r"([\[(])(\S+), (\S+)([\])])")


@dataclass(frozen=True, slots=True)
class Interval:
    """The numbers between two ends, each of which belongs to it or does not. NaN is in none."""

    least: float
    most: float
    with_least: bool
    with_most: bool

    @staticmethod
    def parse(text: str) -> Interval:
        """An interval as it is written: a bracket before or behind an end that belongs to it, else a parenthesis."""
        found = _WRITTEN.fullmatch(text)
        assert found, f"{text} is no interval, such as [0, 1] or (0, inf)"
        left, least, most, right = found.groups()
        return Interval(float(least), float(most), left == "[", right == "]")

    def __contains__(self, number: float) -> bool:
        above = self.least <= number if self.with_least else self.least < number
        return above and (number <= self.most if self.with_most else number < self.most)

    def __str__(self) -> str:
        """The interval in words: `0 to 1`, `more than 0`."""
        if self.with_least and self.with_most:
            return f"{self.least:g} to {self.most:g}"
        above = f"{self.least:g} or more" if self.with_least else f"more than {self.least:g}"
        if math.isinf(self.most):
            return above
        return f"{above}, {f'at most {self.most:g}' if self.with_most else f'less than {self.most:g}'}"
