"""ACTMat's objective, of a few rows: how wrong a merged change is on what each expert's change reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from streammerge.delta import Deltas

# a pass over every expert at 4·ROWS operations an element: a small part of what a merge reads and multiplies
ROWS = 8


class SampledRows:
    """F(Δ) = Σ_t ‖(Δ - D_t) D_tᵀ‖² over F(0) = Σ_t ‖D_t D_tᵀ‖², of ROWS rows evenly spread over a matrix.

    Row i of Δ contributes δAδᵀ - 2δ·n + c with A = Σ D_tᵀD_t, n = Σ d_t D_tᵀD_t and c = Σ ‖d_t D_tᵀ‖², d_t being
    row i of D_t: n and c are summed as the experts pass by.
    """

    def __init__(self, deltas: Deltas) -> None:
        rows, columns = deltas.shape
        count = min(ROWS, rows)
        self.rows = torch.arange(count) * rows // count
        self._moment = torch.zeros(count, columns, dtype=torch.float64)
        self._own = 0.0

    def add(self, change: Tensor) -> None:
        """See one expert's change D_t, [out, in]."""
        across = torch.mm(change[self.rows], change.mT)
        self._own += torch.linalg.vector_norm(across).item() ** 2
        self._moment += torch.mm(across, change)

    def interference(self, merged: Tensor, covered: Callable[[Tensor], Tensor]) -> float | None:
        """F(merged) / F(0): 0 where every expert is served as if it were alone, 1 where the base is as good.

        merged   the merged change, [out, in]
        covered  x [ROWS, in] -> x · A in the same dtype

        Exact to about 1e-5 of F(0), at float32. None where F(0) is too small or too large a number.
        """
        change = merged[self.rows]
        size = torch.linalg.vector_norm(change).item()
        if not 1e-30 < self._own < 1e30 or not size < 1e15:
            return 1.0 if size == 0.0 and self._own > 0.0 else None
        quadratic = (change.double() * covered(change)).sum().item()
        linear = (change.double() * self._moment).sum().item()
        return max((quadratic - 2.0 * linear + self._own) / self._own, 0.0)
