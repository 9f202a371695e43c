"""Cholesky factor and solution: on the CPU in place by panels, on an accelerator by its own library.

Panels make nearly all of it matrix products. On the machine measured (2 cores, float32, n = 2048) that is
2.5 to 3 times faster than torch's LAPACK calls, which also copy both operands.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from streammerge.solve.buffers import Buffers
from streammerge.solve.cost import PANEL

# the smallest n from which X H = R is solved by H's inverse and a product instead of two triangular solves
INVERSE_FROM = 1 << 62


class Factor(Protocol):
    """The factor of a symmetric positive definite H = L Lᵀ.

    `positive` is False where H was not numerically positive definite; nothing can be solved then.
    `smallest_pivot` is the least squared diagonal element of L.
    """

    positive: bool
    smallest_pivot: float

    def solve_(self, right: Tensor) -> Tensor:
        """Replace `right` [m, n] by right · H⁻¹, in place."""
        ...


def cholesky(matrix: Tensor, rows: int, buffers: Buffers) -> Factor:
    """Factor H [n, n], whose memory is given up; `rows` is the most rows that will be solved for."""
    if matrix.device.type == "cpu":
        return PanelCholesky(matrix, rows, buffers)
    return LibraryCholesky(matrix, by_inverse=len(matrix) >= INVERSE_FROM)


class LibraryCholesky:
    """By `torch.linalg`, which on a GPU keeps its own panels there.

    by_inverse  form H⁻¹ once and multiply, in place of two triangular solves
    """

    def __init__(self, matrix: Tensor, *, by_inverse: bool = False) -> None:
        self._lower, failed = torch.linalg.cholesky_ex(matrix)
        least, greatest = torch.stack(self._lower.diagonal().aminmax()).tolist()
        self.positive = failed.item() == 0 and 0.0 < least <= greatest < float("inf")
        self.smallest_pivot = least**2 if self.positive else 0.0
        self._inverse = torch.cholesky_inverse(self._lower) if by_inverse and self.positive else None

    def solve_(self, right: Tensor) -> Tensor:
        """Replace `right` [m, n] by right · H⁻¹, in place."""
        if self._inverse is not None:
            return right.copy_(right @ self._inverse)
        half = torch.linalg.solve_triangular(self._lower.mT, right, upper=True, left=False)
        return right.copy_(torch.linalg.solve_triangular(self._lower, half, upper=False, left=False))


class PanelCholesky:
    """In H's own memory, by panels.

    matrix  [n, n]  H; only its lower triangle is read, and L replaces it
    rows            the most rows that solve_ will be given
    """

    def __init__(self, matrix: Tensor, rows: int, buffers: Buffers) -> None:
        n = matrix.shape[0]
        self._lower = matrix
        self._panel = buffers.take("panel", matrix.dtype, max(n, rows) * PANEL)
        self._inverses = buffers.take("inverses", matrix.dtype, -(-n // PANEL), PANEL, PANEL)
        self.positive = all(self._eliminate(start, min(start + PANEL, n)) for start in range(0, n, PANEL))
        self.smallest_pivot = float(matrix.diagonal().min() ** 2) if self.positive else 0.0

    def _eliminate(self, start: int, end: int) -> bool:
        lower = self._lower
        if start:
            lower[start:, start:end].addmm_(lower[start:, :start], lower[start:end, :start].mT, alpha=-1)
        corner, failed = torch.linalg.cholesky_ex(lower[start:end, start:end])
        if failed.item() or not torch.isfinite(corner.diagonal()).all():
            return False
        lower[start:end, start:end] = corner
        inverse = self._inverse(start, end)
        torch.linalg.solve_triangular(corner, torch.eye(end - start, dtype=corner.dtype), upper=False, out=inverse)
        self._multiply(lower[end:, start:end], inverse.mT)
        return True

    def _inverse(self, start: int, end: int) -> Tensor:
        width = end - start
        return self._inverses[start // PANEL].view(-1)[: width * width].view(width, width)

    def _multiply(self, columns: Tensor, factor: Tensor) -> None:
        out = self._panel[: columns.numel()].view(columns.shape)
        columns.copy_(torch.mm(columns, factor, out=out))

    def solve_(self, right: Tensor) -> Tensor:
        """Replace `right` [m, n] by right · H⁻¹, in place."""
        self._forward(right, 0, len(self._lower))
        self._backward(right, 0, len(self._lower))
        return right

    def _forward(self, right: Tensor, start: int, end: int) -> None:
        """Divide columns start … end by Lᵀ's corner; halving keeps nearly all work in large products."""
        if end - start <= PANEL:
            self._multiply(right[:, start:end], self._inverse(start, end).mT)
            return
        middle = _middle(start, end)
        self._forward(right, start, middle)
        below = self._lower[middle:end, start:middle]
        right[:, middle:end].addmm_(right[:, start:middle], below.mT, alpha=-1)
        self._forward(right, middle, end)

    def _backward(self, right: Tensor, start: int, end: int) -> None:
        """Divide columns start … end by L's corner."""
        if end - start <= PANEL:
            self._multiply(right[:, start:end], self._inverse(start, end))
            return
        middle = _middle(start, end)
        self._backward(right, middle, end)
        below = self._lower[middle:end, start:middle]
        right[:, start:middle].addmm_(right[:, middle:end], below, alpha=-1)
        self._backward(right, start, middle)


def _middle(start: int, end: int) -> int:
    panels = -(-(end - start) // PANEL)
    return start + (panels + 1) // 2 * PANEL
