"""What the lab tries beyond ACTMat: other covariances, ridges, anchors and weights, one formula in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method


@merge_method(needs_base=True, streams_by="matrix", cost="streammerge.solve.cost_spectral:tsv")
def blended(
    deltas: Deltas,
    *,
    power: float = 1.0,
    ridge: float = 0.1,
    ridge_by: Literal["mean", "rank", "freedom"] = "mean",
    anchor: Literal["mean", "base", "sum", "energy", "multiple"] = "mean",
    weigh: Literal["none", "norm", "rank"] = "none",
    exponent: float = 1.0,
) -> Tensor:
    """Merge as ACTMat does, with more choices than the product has.

    power     C_t is (D_tᵀD_t)^power: below 1 its spectrum is flatter, towards the plain average at 0
    ridge     how strong the pull towards the anchor is
    ridge_by  of what: of A's mean eigenvalue; of tr(A) over A's effective rank tr(A)²/‖A‖²; or the share
              of the directions that the anchor decides, 1 - Σ λ_i/(λ_i + λ)/in
    anchor    the experts' mean, nothing, their sum, their mean weighted by tr C_t (as if each C_t had a part
              of the identity), or the multiple of their sum that interferes least
    weigh     expert t's C_t is divided by ‖C_t‖^exponent of the trace norm, or by (tr C_t / r_t)^exponent, its
              scale in the r_t = tr(C_t)²/‖C_t‖² directions that it changed

    Returns [out, in] in the stream's dtype.
    """
    changes = [delta.dense().double().clone() for delta in deltas]
    covariances = [_powered(change, power) for change in changes]
    covariances = [c * w for c, w in zip(covariances, _weights(covariances, weigh, exponent), strict=True)]
    total = torch.stack(covariances).sum(0)
    right = sum((d @ c for d, c in zip(changes, covariances, strict=True)), torch.zeros_like(changes[0]))
    if not total.trace() > 0:
        return deltas.zeros(*deltas.shape)
    strength = _ridge(total, ridge, ridge_by)
    start = _anchor(changes, covariances, total, right, anchor)
    regular = total + strength * torch.eye(len(total), dtype=torch.float64)
    merged = torch.cholesky_solve((right + strength * start).T, torch.linalg.cholesky(regular)).T
    deltas.note(ridge_lambda=float(strength))
    return deltas.empty(*deltas.shape).copy_(merged)


def _powered(change: Tensor, power: float) -> Tensor:
    if power == 1.0:
        return change.T @ change
    values, vectors = torch.linalg.eigh(change.T @ change)
    kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    return (vectors * torch.where(kept, values.clamp(min=0.0), 0.0).pow(power).where(kept, 0.0)) @ vectors.T


def _weights(covariances: Sequence[Tensor], weigh: str, exponent: float) -> list[float]:
    def scale(c: Tensor) -> float:
        trace = float(c.trace())
        if trace == 0.0 or weigh == "none":
            return 1.0
        return trace if weigh == "norm" else float(c.square().sum()) / trace

    return [scale(c) ** -exponent for c in covariances]


def _ridge(total: Tensor, ridge: float, by: str) -> float:
    trace, size = float(total.trace()), len(total)
    if by == "mean":
        return ridge * trace / size
    if by == "rank":
        return ridge * float(total.square().sum()) / trace
    values = torch.linalg.eigvalsh(total).clamp(min=0.0)
    low, high = 1e-12 * trace, 1e3 * trace
    for _ in range(80):
        middle = (low * high) ** 0.5
        share = 1.0 - float((values / (values + middle)).mean())
        low, high = (middle, high) if share < ridge else (low, middle)
    return high


def _anchor(
    changes: Sequence[Tensor], covariances: Sequence[Tensor], total: Tensor, right: Tensor, name: str
) -> Tensor:
    added = torch.stack(list(changes)).sum(0)
    if name == "base":
        return torch.zeros_like(added)
    if name == "sum":
        return added
    if name == "mean":
        return added / sum(bool(change.any()) for change in changes)
    if name == "energy":
        traces = [c.trace() for c in covariances]
        return sum((t * d for t, d in zip(traces, changes, strict=True)), torch.zeros_like(added)) / total.trace()
    return added * ((right * added).sum() / ((added @ total) * added).sum())
