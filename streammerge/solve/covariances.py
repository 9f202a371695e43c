"""What stands for an expert's input covariance C_t: D_tᵀD_t, that of trimmed or centred changes, or a measured one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.errors import MergeError, quoted
from streammerge.solve.buffers import Buffers
from streammerge.solve.largest_entries import keep_largest_
from streammerge_kernels.gram import gram_, mirror_


class Own:
    """C_t = D_tᵀD_t.

    factored  C_t is the Gram matrix of something else than D_t
    given     C_t comes from outside and has no factor
    """

    factored = False
    given = False

    def factor(self, change: Tensor) -> Tensor:
        """F_t with C_t = F_tᵀF_t: here `change` itself, elsewhere in a buffer that the next factor overwrites."""
        return change

    def fill_(self, out: Tensor, change: Tensor, index: int) -> Tensor:
        """C_t, both triangles, in place of `out` [n, n]."""
        return mirror_(gram_(out, self.factor(change)))


OWN = Own()


class Shaped(Own):
    """C_t = F_tᵀF_t, F_t the largest entries of D_t, less each column's mean where `center`.

    density  share of the entries kept, by magnitude; at least one is
    """

    factored = True

    def __init__(self, buffers: Buffers, *, density: float, center: bool) -> None:
        self._buffers, self._density, self._center = buffers, density, center

    def factor(self, change: Tensor) -> Tensor:
        factor = self._buffers.take("factor", change.dtype, *change.shape).copy_(change)
        if self._density < 1.0:
            keep_largest_(factor, max(1, round(self._density * factor.numel())))
        return centered_(factor) if self._center else factor


class Measured(Own):
    """w_t C_t from beside the expert, the entries off the diagonal multiplied by `reduce`.

    weights  [T] w_t
    scale    power of two that brings the mean eigenvalue of Σ w_t C_t to about one; known after `look`
    """

    factored = True
    given = True

    def __init__(self, deltas: Deltas, *, reduce: float, weights: Sequence[float]) -> None:
        self._deltas, self._reduce, self.weights = deltas, reduce, weights
        self.scale = 1.0

    def look(self) -> tuple[list[float], int]:
        """w_t tr(C_t) of every expert, and how many inputs any of them saw.

        Raises MergeError for a C_t that is no covariance.
        """
        traces, columns = [], self._deltas.shape[1]
        seen = torch.zeros(columns, dtype=torch.bool, device=self._deltas.device)
        for index, weight in enumerate(self.weights):
            covariance = self._of(index)
            diagonal = covariance.diagonal().double()
            # what is not finite reaches the norm, and nothing else does
            size = torch.linalg.vector_norm(covariance, math.inf).item()
            if not (math.isfinite(size) and diagonal.min().item() >= 0.0):
                raise MergeError(
                    f"{quoted(self._deltas.name)}: the covariance beside expert {index} has an entry that is not "
                    "finite, or a negative one on its diagonal",
                    hint="It is no sum of x·xᵀ. Collect it again, in float32 or float64.",
                )
            traces.append(weight * diagonal.sum().item())
            if weight:
                seen |= (diagonal != 0).to(seen.device)
        mean = math.fsum(traces) / columns
        self.scale = 2.0 ** -math.frexp(mean)[1] if mean > 0.0 else 1.0
        return traces, int(seen.sum())

    def fill_(self, out: Tensor, change: Tensor, index: int) -> Tensor:
        out.copy_(self._of(index)).mul_(self.weights[index] * self.scale)
        if self._reduce != 1.0:
            diagonal = out.diagonal().clone()
            out.mul_(self._reduce).diagonal().copy_(diagonal)
        return out

    def _of(self, index: int) -> Tensor:
        covariance = self._deltas.beside(index)
        assert covariance is not None, f"expert {index} has no covariance beside it"
        return covariance


def centered_(matrix: Tensor) -> Tensor:
    """Subtract each column's mean over the rows, in place."""
    return matrix.sub_(matrix.mean(0, keepdim=True))
