"""The covariance family in float64, by its definition: Δ = Θ + (N - ΘA) V diag(f/λ) Vᵀ."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reference(
    changes: Tensor,
    *,
    solver: str = "ridge",
    ridge: float = 0.1,
    anchor: str = "auto",
    weight_exponent: float = 0.0,
    top_k: float = 0.0,
    time: float = 300.0,
    factors: Tensor | None = None,
) -> Tensor:
    """The merged change of [T, out, in] float64 changes; C_t is the Gram of `factors`, which are the changes."""
    columns = changes.shape[2]
    norms = changes.flatten(1).norm(dim=1)
    factors = (changes if factors is None else factors)[norms > 0]
    changes, norms = changes[norms > 0], norms[norms > 0]
    weighted = (norms ** (-2 * weight_exponent))[:, None, None] * (factors.mT @ factors)
    total, target = weighted.sum(0), (changes @ weighted).sum(0)
    if anchor == "auto":
        anchor = "base" if solver == "pinv" else "mean"
    theta = {"mean": changes.mean(0), "base": torch.zeros_like(changes[0]), "sum": changes.sum(0)}[anchor]
    values, vectors = torch.linalg.eigh(total)
    values = values.clamp(min=0)
    values = torch.where(values > columns * 2.0**-52 * values[-1], values, 0)
    trace = values.sum().item()
    largest = _largest(values, columns, top_k)
    kept = {
        "ridge": values / (values + ridge * trace / columns),
        "pinv": (values > columns * 2.0**-23 * values[-1]).double(),
        "exact": (values > 0).double(),
        "top_k": largest,
        "flow": largest * -torch.expm1(-values * time * len(changes) / trace),
    }[solver]
    gains = torch.where(values > 0, kept / values, 0)
    return theta + (target - theta @ total) @ vectors @ torch.diag(gains) @ vectors.mT


def _largest(values: Tensor, columns: int, top_k: float) -> Tensor:
    count = math.ceil(columns * top_k)
    if top_k == 0.0:
        count = math.ceil((values.sqrt().sum() ** 2 / values.sum()).item() * (1 - 1e-6))
    kept = torch.zeros_like(values)
    kept[-count:] = 1.0
    return kept * (values > 0)
