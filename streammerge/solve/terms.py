"""How each expert enters a covariance method's system: its weight, and its share of the anchor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Anchor = Literal["mean", "base", "sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the used experts contribute to A = Σ w_t C_t, N = Σ w_t D_t C_t and the anchor Θ = Σ a_t D_t.

    anchor   which a_t: 1/T, 0 or 1; not read where there are `shares`
    shares   a_t of each expert, None for the anchor's
    weights  w_t of each expert, None where all are 1
    """

    experts: int
    anchor: Anchor = "mean"
    shares: tuple[float, ...] | None = None
    weights: tuple[float, ...] | None = None

    def weight(self, number: int) -> float:
        """w_t of the number-th used expert."""
        return 1.0 if self.weights is None else self.weights[number]

    def share(self, number: int) -> float:
        """a_t of the number-th used expert."""
        if self.shares is not None:
            return self.shares[number]
        return {"mean": 1.0 / self.experts, "base": 0.0, "sum": 1.0}[self.anchor]

    def pull(self, number: int, strength: float) -> float:
        """`strength` · a_t, for the mean without rounding twice."""
        if self.shares is None and self.anchor == "mean":
            return strength / self.experts
        return strength * self.share(number)

    @property
    def surplus(self) -> float:
        """Σ a_t - 1: what is left of one expert's change where all made the same."""
        if self.shares is not None:
            return math.fsum(self.shares) - 1.0
        return {"mean": 0.0, "base": -1.0, "sum": self.experts - 1.0}[self.anchor]


def weights_by_norm(energies: Sequence[float], exponent: float) -> tuple[float, ...] | None:
    """w_t = ‖D_t‖^(-2·exponent) up to a common factor, which leaves the weighted norms about as large as the norms.

    energies  ‖D_t‖², each more than 0. None for exponent 0.
    """
    if exponent == 0.0:
        return None
    mean = math.fsum(energies) / len(energies)
    return tuple((energy / mean) ** -exponent for energy in energies)
