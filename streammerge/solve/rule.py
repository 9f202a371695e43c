"""What a covariance method asks of the solver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streammerge.solve.terms import Anchor

SolverName = Literal["ridge", "pinv", "exact", "top_k", "flow"]
AnchorName = Literal["auto", "mean", "base", "sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a method asks of the solver; the words are those of `solve_normal_equations`."""

    solver: SolverName
    ridge: float = 0.1
    anchor: AnchorName = "auto"
    weight_exponent: float = 0.0
    top_k: float = 0.0
    time: float = 300.0
    density: float = 1.0
    center: bool = False

    @property
    def anchors(self) -> Anchor:
        """What the filter leaves out takes: of the mean, nothing, or the sum."""
        if self.anchor == "auto":
            return "base" if self.solver == "pinv" else "mean"
        return self.anchor
