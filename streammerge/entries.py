"""What a journal's line may say of a finished tensor: distrusted, like all text that is read back. Loads no torch."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from streammerge.errors import quoted


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor whose bytes are on the device: their SHA-256, and what happened to it: the fields of an `Outcome`."""

    name: str
    sha256: str
    outcome: dict[str, Any]


def entry_of(line: object) -> Entry:
    """Read what a line says. Raises ValueError, whose text goes on after the name of the line."""
    if not isinstance(line, dict) or line.keys() != {"name", "sha256", "outcome"}:
        raise ValueError(f"is {quoted(json.dumps(line))}, expected a name, a sha256 and an outcome")
    name, sha256, outcome = line["name"], line["sha256"], line["outcome"]
    if not isinstance(name, str):
        raise ValueError(f"has the name {quoted(json.dumps(name))}, expected text")
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(
            f"has the sha256 {quoted(json.dumps(sha256))} of {quoted(name)}, expected 64 hexadecimal digits"
        )
    if not isinstance(outcome, dict) or outcome.keys() != OUTCOME.keys():
        raise ValueError(
            f"has the outcome {quoted(json.dumps(outcome))} of {quoted(name)}, expected {', '.join(OUTCOME)}"
        )
    for key, value in outcome.items():
        expected, is_sound = OUTCOME[key]
        if not is_sound(value):
            raise ValueError(f"has the {key} {quoted(json.dumps(value))} of {quoted(name)}, expected {expected}")
    if outcome["name"] != name:
        raise ValueError(f"has the outcome of {quoted(outcome['name'])} for {quoted(name)}")
    return Entry(name, sha256, outcome)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value.isascii() and value.isidentifier()


def _is_number(value: object) -> bool:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**63)


def _is_number_or_none(value: object) -> bool:
    return value is None or _is_number(value)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_facts(value: object) -> bool:
    # what a method notes may be infinite
    return isinstance(value, dict) and all(
        isinstance(each, (str, bool, float)) or _is_number(each) for each in value.values()
    )


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _are_numbers_or_none(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_number_or_none, value))


_NUMBER = "a finite number or null", _is_number_or_none
_COUNT = "a count", _is_count
OUTCOME = {
    "name": ("text", _is_text),
    "method": ("a method's name", _is_word),
    "facts": ("numbers and texts by name", _are_facts),
    "norm_ratio": _NUMBER,
    "rounding_loss": _NUMBER,
    "changed": _NUMBER,
    "growth": _NUMBER,
    "non_finite": _COUNT,
    "non_finite_inputs": _COUNT,
    "seconds": ("a finite number", _is_number),
    "kind": ("text", _is_text),
    "shape": ("a list of sizes", _are_counts),
    "base_norm": _NUMBER,
    "expert_norms": ("a list of finite numbers and nulls", _are_numbers_or_none),
}
