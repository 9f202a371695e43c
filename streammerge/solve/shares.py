"""Per-expert weights, divided by their sum."""

from __future__ import annotations

import math
from collections.abc import Sequence


def normalized(weights: Sequence[float]) -> list[float]:
    """The weights over their sum, which `limits.normalizable` refused to be zero."""
    total = math.fsum(weights)
    return [weight / total for weight in weights]
