"""ACTMat's formulas in float64, and the paper's code as it stands: what streammerge is measured against.

m rows, n columns, D_t = W_t - W_0 [m, n], A = Σ D_tᵀD_t [n, n], N = Σ D_t D_tᵀD_t [m, n].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Solver = Literal["ridge", "exact", "pinv"]
SOLVERS: tuple[Solver, ...] = ("ridge", "exact", "pinv")
RIDGE = 0.1
# what solve_normal_equations promises; pinv: an eigenvalue at the cut may fall on either side of it
TOLERANCES: dict[Solver, float] = {"ridge": 1e-3, "exact": 1e-3, "pinv": 1e-2}
SINGLE_EPSILON = torch.finfo(torch.float32).eps


def deltas64(base: Tensor, experts: Sequence[Tensor]) -> list[Tensor]:
    """Every expert's change, [m, n] float64: exact for bf16 models."""
    return [expert.double() - base.double() for expert in experts]


def system64(deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A [n, n] and N [m, n] in float64."""
    rows, columns = deltas[0].shape
    gram = torch.zeros(columns, columns, dtype=torch.float64)
    right = torch.zeros(rows, columns, dtype=torch.float64)
    for delta in deltas:
        covariance = delta.T @ delta
        gram += covariance
        right += delta @ covariance
    return gram, right


def ridge64(deltas: Sequence[Tensor], ridge: float) -> Tensor:
    """(N + λ mean D)(A + λI)^-1 with λ = ridge·tr(A)/n: mean-anchored Tikhonov."""
    gram, right = system64(deltas)
    shrinkage = ridge * float(gram.trace()) / len(gram)
    right += shrinkage / len(deltas) * sum(deltas[1:], deltas[0])
    gram.diagonal().add_(shrinkage)
    return _solve(gram, right)


def exact64(deltas: Sequence[Tensor]) -> Tensor:
    """N A^+: by Cholesky, on the side of the stacked changes that has full rank."""
    rows, columns = deltas[0].shape
    if len(deltas) * rows > columns:
        return _solve(*system64(deltas))
    stacked = torch.cat(list(deltas))
    left = torch.cat([delta @ delta.T for delta in deltas], dim=1)
    return _solve(stacked @ stacked.T, left) @ stacked


def cut64(deltas: Sequence[Tensor]) -> Tensor:
    """N A^+ with the spectrum cut at n·eps32 of its largest: the paper's formula without its rounding."""
    gram, right = system64(deltas)
    values, vectors = torch.linalg.eigh(gram)
    kept = vectors[:, values > len(gram) * SINGLE_EPSILON * values[-1]]
    merged: Tensor = right @ kept / values[-kept.shape[1] :] @ kept.T
    return merged


def paper32(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """The paper's code: batched float32 products and `torch.linalg.pinv`."""
    deltas = torch.stack([expert.float() - base.float() for expert in experts])  # [T, m, n]
    covariances = deltas.mT @ deltas  # [T, n, n]
    merged: Tensor = (deltas @ covariances).sum(0) @ torch.linalg.pinv(covariances.sum(0))
    return merged


def formula64(solver: Solver, deltas: Sequence[Tensor]) -> Tensor:
    """The formula that a solver stands for."""
    if solver == "ridge":
        return ridge64(deltas, RIDGE)
    return exact64(deltas) if solver == "exact" else cut64(deltas)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth||, in float64."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """right · gram^-1 by Cholesky. Raises torch.linalg.LinAlgError for a gram that is not definite."""
    solved: Tensor = torch.cholesky_solve(right.T, torch.linalg.cholesky(gram)).T
    return solved
