"""What a covariance method asks for where every expert is an adapter. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def held(arguments: Mapping[str, Any], shape: tuple[int, int], ranks: Sequence[int]) -> dict[str, Any]:
    """ACTMat's arguments for changes of an [out, in] matrix by so many ranks.

    An adapter of rank r shows r of `in` inputs, and those are where its A was drawn, not where the inputs are: the
    covariances are held back by a ridge (in/r)² times as strong, for the largest rank. Measured in bench/quality.
    """
    rank = max(ranks, default=0)
    if arguments["adapters"] != "hold" or arguments["solver"] != "ridge" or not rank:
        return dict(arguments)
    return {**arguments, "ridge": arguments["ridge"] * max(1.0, shape[1] / rank) ** 2}
