"""Inverses of a Gram matrix: by an equilibrated Cholesky factor, or by its spectrum, filtered."""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge.errors import MergeError
from streammerge.solve.cholesky import cholesky
from streammerge.solve.cost import BLOCK_ROWS
from streammerge.solve.filters import Filter
from streammerge.solve.systems import System

# added to the unit diagonal of the equilibrated Gram: below every pivot of a regular one
_SHIFT = {torch.float32: 1e-7, torch.float64: 2e-16}


class Ridge:
    """(H + λI)⁻¹; `usable` is False where that was not numerically positive definite."""

    def __init__(self, system: System, ridge_lambda: float) -> None:
        matrix = system.spare
        if matrix is not system.gram:
            matrix.copy_(system.gram)
        matrix.diagonal().add_(ridge_lambda)
        self._factor = cholesky(matrix, len(system.right), system.buffers)
        self.usable = self._factor.positive

    def solve_(self, right: Tensor) -> Tensor:
        """Replace `right` [r, k] by right · (H + λI)⁻¹."""
        return self._factor.solve_(right)


class Equilibrated:
    """H⁻¹ by a Cholesky factor of H scaled to a unit diagonal; `usable` is False where H is near singular.

    A zero on H's diagonal, a column that no expert changed, becomes one: its row of Y is zero anyway.
    """

    def __init__(self, system: System) -> None:
        gram, matrix = system.gram, system.spare
        shift, size = _SHIFT[gram.dtype], len(gram)
        diagonal = gram.diagonal()
        diagonal.masked_fill_(diagonal == 0, 1.0)
        self._scale = diagonal.rsqrt()
        matrix.copy_(gram).mul_(self._scale).mul_(self._scale[:, None]).diagonal().add_(shift)
        self._factor = cholesky(matrix, len(system.right), system.buffers)
        # deficient matrices have pivots of about the shift, regular ones of 1e-4 and more
        least = max(10 * shift, size * torch.finfo(gram.dtype).eps)
        self.usable = self._factor.positive and self._factor.smallest_pivot >= least

    def solve_(self, right: Tensor) -> Tensor:
        """Replace `right` [r, k] by right · H⁻¹."""
        return self._factor.solve_(right.mul_(self._scale)).mul_(self._scale)


class Spectral:
    """V diag(f/λ) Vᵀ of H = V diag(λ) Vᵀ, f by a filter; `rank` eigenvalues are kept.

    The spectrum is taken in float64 also of a float32 H: beside the cut float32's eigenvectors are
    wrong by 1e-2, float64's by no more than H's own rounding, 1e-6 to 1e-3. Needs `system.spare` to
    lie in a buffer of float64's size.
    """

    def __init__(self, system: System, select: Filter) -> None:
        self._buffers = system.buffers
        size = len(system.gram)
        wide = self._buffers.take("spare", torch.float64, size, size).copy_(system.gram)
        values = torch.empty(size, dtype=torch.float64, device=wide.device)
        try:
            if wide.device.type == "cpu":
                # LAPACK leaves each eigenvector in a row of `wide`: its columns are the rows of ours
                torch.linalg.eigh(wide.mT, out=(values, wide.mT))
            else:
                values, vectors = torch.linalg.eigh(wide)
                wide.copy_(vectors.mT)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise MergeError(
                "the spectrum of the experts' covariance did not converge", hint="Use `solver: ridge`."
            ) from error
        divisors = select(values)
        self.rank = len(divisors)
        self._values = divisors.to(system.gram.dtype)
        self._share = (values[size - self.rank :].clamp(min=0.0) / divisors).to(system.gram.dtype)
        self._vectors = self._narrowed(wide[size - self.rank :], system.gram.dtype)

    def _narrowed(self, wide: Tensor, dtype: torch.dtype) -> Tensor:
        """`wide` [rank, k] in `dtype`, at the front of its own buffer, by way of a block that it passes through."""
        if dtype == wide.dtype:
            return wide
        rows, size = wide.shape
        narrow = self._buffers.take("spare", dtype, rows, size)
        block = self._buffers.take("block", dtype, min(BLOCK_ROWS, rows), size)
        for row in range(0, rows, BLOCK_ROWS):
            part = wide[row : row + BLOCK_ROWS]
            narrow[row : row + BLOCK_ROWS] = block[: len(part)].copy_(part)
        return narrow

    def solve_(self, right: Tensor) -> Tensor:
        """Replace `right` [r, k] by right · V diag(f/λ) Vᵀ."""
        along = self._buffers.take("delta", right.dtype, len(right), self.rank)
        torch.mm(right, self._vectors.mT, out=along).div_(self._values)
        return torch.mm(along, self._vectors, out=right)

    def filtered(self, right: Tensor) -> Tensor:
        """right · V diag(f) Vᵀ: what a product of the solution with H gives back."""
        if bool((self._share == 1.0).all()):
            return right
        return (right @ self._vectors.mT * self._share) @ self._vectors
