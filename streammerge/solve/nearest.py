"""The nearest matrix of low rank, by subspace iteration (arXiv:0909.4061, algorithm 4.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge.solve.cost import BLOCK_ROWS
from streammerge.solve.thin import Factors

# columns beyond the rank, and passes over the matrix each way: what they leave is below a percent of the best error
OVERSAMPLED, ITERATIONS = 16, 6


def nearest(matrix: Tensor, rank: int) -> tuple[Factors, float]:
    """The nearest change of that rank, and how far it is: the norm of the difference over the norm, both Frobenius.

    matrix  [out, in] float32 or float64; the rank is at most its smaller side

    Exact where the matrix has no more rank. The first directions are drawn with a fixed seed: the same matrix gives
    the same factors. The distance is measured, not estimated.
    """
    rows, columns = matrix.shape
    width = min(rank + OVERSAMPLED, rows, columns)
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(columns, width, generator=generator, dtype=matrix.dtype)
    left = torch.linalg.qr(matrix @ right)[0]
    for _ in range(ITERATIONS):
        right = torch.linalg.qr(matrix.mT @ left)[0]
        left = torch.linalg.qr(matrix @ right)[0]
    basis, triangle = torch.linalg.qr((matrix.mT @ left).double())
    # leftᵀ matrix = triangleᵀ basisᵀ
    u, sigma, v = torch.linalg.svd(triangle.mT)
    root = sigma[:rank].sqrt()
    found = Factors(left.double() @ (u[:, :rank] * root), root[:, None] * (v[:rank] @ basis.mT))
    return found, _distance(matrix, found)


def nearest_bytes(rows: int, columns: int, rank: int, itemsize: int) -> int:
    """What `nearest` takes beside the matrix."""
    width = min(rank + OVERSAMPLED, rows, columns)
    # both sides as iterated and as LAPACK copies them, both in float64; the blocks whose distance is measured
    return (rows + columns) * width * (3 * itemsize + 3 * 8) + 3 * BLOCK_ROWS * columns * 8 + 8 * width**2 * 8


def _distance(matrix: Tensor, factors: Factors) -> float:
    lost, whole = 0.0, 0.0
    for row in range(0, len(matrix), BLOCK_ROWS):
        part = matrix[row : row + BLOCK_ROWS].double()
        whole += part.square().sum().item()
        lost += (part - factors.left[row : row + BLOCK_ROWS] @ factors.right).square().sum().item()
    return (lost / whole) ** 0.5 if whole else 0.0
