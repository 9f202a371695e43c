"""Which eigenvalues of the covariance count, and by what each is divided: Δ = Θ + (N - ΘA) V diag(f/λ) Vᵀ."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Filter = Callable[[Tensor], Tensor]
"""From all eigenvalues, ascending float64 [k], the divisors λ/f of those kept: the last of them, in their order."""


def cut_at(share: float) -> Filter:
    """f = 1 for eigenvalues above `share` of the largest, else 0."""

    def cut(values: Tensor) -> Tensor:
        return values[len(values) - int((values > share * values[-1]).sum()) :]

    return cut


def largest(columns: int, top_k: float, dtype: torch.dtype) -> Filter:
    """f = 1 for the largest eigenvalues, else 0: as many as `kept` says. Rounding of a Gram in `dtype` is left out."""

    def top(values: Tensor) -> Tensor:
        values = _above_rounding(values, dtype)
        return values[max(0, len(values) - kept(values, columns, top_k)) :]

    return top


def flow(columns: int, top_k: float, dtype: torch.dtype, time: float) -> Filter:
    """f = 1 - exp(-λ·time) for the largest eigenvalues, else 0: gradient flow from the anchor, ended at `time`."""

    def flowing(values: Tensor) -> Tensor:
        count = kept(_above_rounding(values, dtype), columns, top_k)
        steps = values[max(0, len(values) - count) :].clamp(min=torch.finfo(values.dtype).tiny) * time
        return steps / -torch.expm1(-steps) / time

    return flowing


def kept(values: Tensor, columns: int, top_k: float) -> int:
    """⌈in · top_k⌉; for top_k 0 the participation ratio of the singular values σ = √λ, ⌈(Σσ)² / Σσ²⌉."""
    if top_k > 0.0:
        return math.ceil(columns * top_k)
    total = values.sum().item()
    if total <= 0.0:
        return 0
    # equal eigenvalues give a whole number, up to rounding that must not add one
    return math.ceil(values.sqrt().sum().item() ** 2 / total * (1.0 - 1e-6))


def _above_rounding(values: Tensor, dtype: torch.dtype) -> Tensor:
    least = max(8.0, math.sqrt(len(values))) * torch.finfo(dtype).eps
    return cut_at(least)(values)
