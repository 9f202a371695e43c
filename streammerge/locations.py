"""Where models lie: whether two locations are one, and short names that set them apart."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping


def same_model(location: str, other: str | None) -> bool:
    """Whether two locations are one: the same text, or paths that exist and lead to the same place."""
    if other is None or location == other:
        return location == other
    return all(map(os.path.exists, (location, other))) and os.path.abspath(location) == os.path.abspath(other)


def short_names(locations: list[str]) -> tuple[str, ...]:
    """As many last path components as set a location apart from the others; repeats are numbered."""
    # of a commit as much as people write
    parts = {
        location: re.sub(r"(@[0-9a-f]{7})[0-9a-f]{33}$", r"\1", os.path.normpath(location)).split(os.sep)
        for location in locations
    }
    names: list[str] = []
    for location in locations:
        short = _shortest(location, parts)
        repeats = locations[: len(names)].count(location)
        names.append(f"{short} #{repeats + 1}" if repeats else short)
    return tuple(names)


def _shortest(location: str, parts: Mapping[str, list[str]]) -> str:
    for depth in range(1, len(parts[location]) + 1):
        tail = parts[location][-depth:]
        if not any(other[-depth:] == tail for each, other in parts.items() if each != location):
            return "/".join(tail)
    return location
