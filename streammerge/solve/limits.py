"""Which settings do not go together, or not with the shape that they are for. Loads no torch.

Each takes a method's arguments, the [out, in] shape and the number of experts, and answers what is wrong and what to
do, or None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Refused = tuple[str, str] | None

# a sum this small beside its terms is rounding, and dividing by it would blow the merge up
_CANCELLED = 1e-9


def each_of(value: float | Sequence[float], experts: int) -> list[float]:
    """A parameter's value for each expert; a single number counts for all."""
    return [float(value)] * experts if isinstance(value, (int, float)) else [float(each) for each in value]


def normalizable(arguments: Mapping[str, Any], shape: tuple[int, int], experts: int) -> Refused:
    """Weights that are to be divided by their sum, which is zero."""
    normalize = "normalize" if "normalize" in arguments else "normalize_weights"
    if not arguments[normalize]:
        return None
    weights = each_of(arguments["weight"], experts)
    total = math.fsum(weights)
    if abs(total) > _CANCELLED * math.fsum(abs(w) for w in weights):
        return None
    message = f"the weights {_shown(weights)} sum to {total:g} and cannot be normalized"
    return message, f"Set `{normalize}: false`, or choose weights with another sum."


def one_base(arguments: Mapping[str, Any], shape: tuple[int, int], experts: int) -> Refused:
    """Weights that leave more or less than one base."""
    total = math.fsum(each_of(arguments["weight"], experts))
    if arguments["normalize"] or abs(total - 1.0) <= _CANCELLED:
        return None
    message = f"weights that sum to {total:g} scale the base, which no adapter does"
    return message, "Set `normalize: true`, or use `task_arithmetic`."


def some_weight(arguments: Mapping[str, Any], shape: tuple[int, int], experts: int) -> Refused:
    """Weights of which none counts."""
    weights = each_of(arguments["weight"], experts)
    if any(weights):
        return None
    return f"the weights are {_shown(weights)}, expected one above 0", "Give an expert a `weight`."


def ridge(arguments: Mapping[str, Any], shape: tuple[int, int], experts: int) -> Refused:
    """A ridge solver without a ridge."""
    if arguments["solver"] != "ridge" or arguments["ridge"] > 0.0:
        return None
    return "`ridge` is 0, expected more than 0", "Use `solver: exact` for no ridge at all."


def probabilities(arguments: Mapping[str, Any], shape: tuple[int, int], experts: int) -> Refused:
    """DELLA's density - epsilon or density + epsilon that is no probability."""
    pairs = zip(each_of(arguments["density"], experts), each_of(arguments["epsilon"], experts), strict=True)
    for share, reach in pairs:
        if share not in (0.0, 1.0) and not (share - reach > 0.0 and share + reach < 1.0):
            return (
                f"`density` {share:g} and `epsilon` {reach:g} keep entries with probabilities from {share - reach:g} "
                f"to {share + reach:g}, expected more than 0 and less than 1",
                "Choose an `epsilon` less than `density` and less than 1 - `density`.",
            )
    return None


def refinable(arguments: Mapping[str, Any], shape: tuple[int, int], experts: int) -> Refused:
    """A share of the singular directions that is none, where the paper's formula of ACE has no value."""
    size, share = min(shape), arguments["k_frac"]
    if arguments["compat"] != "paper" or int(size * share):
        return None
    return (
        f"{share} of {size} singular directions are none, and the paper's formula has no value",
        "Set `compat: none`, which refines at least one.",
    )


def _shown(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:g}" for weight in weights)
