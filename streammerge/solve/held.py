"""What a covariance method asks for where every expert is an adapter. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def held(arguments: Mapping[str, Any], shape: tuple[int, int], ranks: Sequence[int]) -> dict[str, Any]:
    """ACTMat's arguments for changes of an [out, in] matrix by so many ranks.

    An adapter of rank r shows r of `in` inputs, and those are where its A was drawn, not where the inputs are: the
    covariances are held back by a ridge (in/r)² times as strong, for the largest rank, towards the rescaled mean.
    """
    if arguments.get("adapters") != "hold" or arguments.get("solver") != "ridge":
        return dict(arguments)
    rank = max(ranks, default=0)
    factor = max(1.0, shape[1] / rank) ** 2 if rank else 1.0
    anchor = "rescaled" if arguments["anchor"] == "auto" else arguments["anchor"]
    return {**arguments, "ridge": arguments["ridge"] * factor, "anchor": anchor}
