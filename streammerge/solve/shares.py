"""Per-expert weights, divided by their sum."""

from __future__ import annotations

import math
from collections.abc import Sequence

from streammerge.errors import MergeError, quoted

# a sum this small beside its terms is rounding, and dividing by it would blow the merge up
_CANCELLED = 1e-9


def normalized(weights: Sequence[float], tensor: str) -> list[float]:
    """The weights over their sum. Raises MergeError where they cancel; `tensor` is named in it."""
    total = math.fsum(weights)
    if not abs(total) > _CANCELLED * math.fsum(abs(w) for w in weights):
        shown = ", ".join(f"{w:g}" for w in weights)
        raise MergeError(
            f"{quoted(tensor)}: the weights {shown} sum to {total:g} and cannot be normalized",
            hint="Set `normalize: false`, or choose weights with another sum.",
        )
    return [w / total for w in weights]
