"""What a covariance method asks of the solver."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from streammerge.errors import MergeError
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

    def check(self) -> None:
        """Raise MergeError for a number out of range."""
        for name, value, least, most in (
            ("weight_exponent", self.weight_exponent, 0.0, 1.0),
            ("top_k", self.top_k, 0.0, 1.0),
            ("density", self.density, 0.0, 1.0),
        ):
            if not least <= value <= most or (name == "density" and value == 0.0):
                interval = "more than 0, at most 1" if name == "density" else "0 to 1"
                raise MergeError(f"{name} is {value}, expected {interval}")
        if self.solver == "ridge" and not self.ridge > 0.0:
            raise MergeError(
                f"ridge is {self.ridge}, expected more than 0", hint="Use `solver: exact` for no ridge at all."
            )
        if self.solver == "flow" and not 0.0 < self.time < math.inf:
            raise MergeError(f"time is {self.time}, expected more than 0", hint="Use `solver: top_k` for all of it.")

    @property
    def anchors(self) -> Anchor:
        """What the filter leaves out takes: of the mean, nothing, or the sum."""
        if self.anchor == "auto":
            return "base" if self.solver == "pinv" else "mean"
        return self.anchor
