"""Numerical rank, truncated singular value decompositions and polar factors, through the smaller Gram in float64.

Products of float32 numbers are exact in float64, so a direction with singular value σ is wrong by 2⁻⁵²(σ_max/σ)²,
far less than float32 rounding of the changes: a thousandth of it, measured on polar factors of 300 to 600 rows with
spectra down to σ_max · 10⁻⁵.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from streammerge.errors import MergeError
from streammerge.solve.buffers import Buffers
from streammerge.solve.cost import EPS32


def relative_cut(rows: int, columns: int) -> float:
    """Singular values up to this much of the largest count as zero: √max(m, n) · 2⁻²³.

    Rounding each entry to float32 moves no singular value by more than half of it. Float64 inputs are
    cut there too, so that a checkpoint's dtype does not change its rank.
    """
    return math.sqrt(max(rows, columns)) * EPS32


def gram(matrix: Tensor, buffers: Buffers, name: str = "gram") -> Tensor:
    """D Dᵀ or Dᵀ D, whichever is smaller, [r, r]."""
    rows, columns = matrix.shape
    size = min(rows, columns)
    wide = matrix if rows <= columns else matrix.mT
    return torch.mm(wide, wide.mT, out=buffers.take(name, matrix.dtype, size, size))


def eigen_(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [r] of a symmetric float64 matrix, ascending, and its eigenvectors as the rows of its own memory."""
    values = torch.empty(len(matrix), dtype=matrix.dtype, device=matrix.device)
    try:
        if matrix.device.type == "cpu":
            # LAPACK leaves each eigenvector in a column of what it is given: the rows of ours
            torch.linalg.eigh(matrix.mT, out=(values, matrix.mT))
            return values, matrix
        values, vectors = torch.linalg.eigh(matrix)
        return values, matrix.copy_(vectors.mT)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise MergeError(
            "the spectrum of the experts' changes did not converge",
            hint="Merge this tensor by another method: give it a rule of its own in the recipe.",
        ) from error


def kept(values: Tensor, cut: float, *, floor: float = 0.0) -> tuple[Tensor, int]:
    """Singular values from a Gram's ascending eigenvalues, and how many exceed `cut` of the largest and `floor`."""
    singular = values.clamp_min(0.0).sqrt_()
    least = torch.clamp_min(singular[-1] * cut, floor)
    return singular, int(torch.count_nonzero(singular > least))


def truncated(matrix: Tensor, left: Tensor, right: Tensor, buffers: Buffers, *, floor: float = 0.0) -> Tensor:
    """The largest singular values [k] of a float64 matrix [m, n], ascending, and their directions.

    left   [most, m]  its first k rows become the left directions; k ≤ most, and no more than the rank
    right  [most, n]  its first k rows become the right ones
    floor             singular values up to it count as zero, beside those up to `relative_cut` of the largest

    A direction's sign is free, but the same on both sides.
    """
    rows, columns = matrix.shape
    values, vectors = eigen_(gram(matrix, buffers))
    singular, rank = kept(values, relative_cut(rows, columns), floor=floor)
    count = min(rank, len(left))
    singular, vectors = singular[len(singular) - count :], vectors[len(vectors) - count :]
    if rows <= columns:
        left[:count] = vectors
        torch.mm(vectors, matrix, out=right[:count]).div_(singular[:, None])
    else:
        right[:count] = vectors
        torch.mm(vectors, matrix.mT, out=left[:count]).div_(singular[:, None])
    return singular


def inverse_root(matrix: Tensor, cut: float, out: Tensor) -> Tensor:
    """(G⁺)^½ of a Gram [r, r] in `out`; G's memory is given up.

    Returns the singular values of what the Gram was formed of, ascending; those that were cut are zero.
    """
    values, vectors = eigen_(matrix)
    singular, rank = kept(values, cut)
    dropped = len(singular) - rank
    scaled = vectors[dropped:].div_(singular[dropped:, None].sqrt())
    torch.mm(scaled.mT, scaled, out=out)
    singular[:dropped] = 0.0
    return singular


def polar_product(left: Tensor, values: Tensor, right: Tensor, out: Tensor, buffers: Buffers) -> Tensor:
    """polar(U) · diag(values) · polar(V)ᵀ, [m, n], of stacked directions.

    left    [k, m]  U's columns as rows
    values  [k]
    right   [k, n]  V's columns as rows

    polar(X) = P Qᵀ for X = P Σ Qᵀ is the nearest matrix with orthonormal columns. Directions that X does not
    have are left out, as P Qᵀ is arbitrary there: polar(U) = U (UᵀU)⁺^½.
    """
    count = len(values)
    cuts = relative_cut(count, left.shape[1]), relative_cut(count, right.shape[1])
    roots = []
    for number, (stack, cut) in enumerate(zip((left, right), cuts, strict=True)):
        overlap = torch.mm(stack, stack.mT, out=buffers.take("gram", stack.dtype, count, count))
        root = buffers.take(f"root {number}", stack.dtype, count, count)
        inverse_root(overlap, cut, root)
        roots.append(root)
    core = torch.mm(roots[0].mul_(values), roots[1], out=buffers.take("gram", left.dtype, count, count))
    spread = torch.mm(core, right, out=buffers.take("spread", left.dtype, *right.shape))
    return torch.mm(left.mT, spread, out=out)
