"""Experts as training leaves them, a stream that counts what it is asked for, and float64 references."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from streammerge.delta import TensorDeltas

KINDS = ("sft", "rl", "low_rank", "outlier_columns")


def experts(kind: str, rows: int, columns: int, count: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A bf16 base [rows, columns] and `count` bf16 experts fine-tuned from it in the way of `kind`."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    base = (randn(rows, columns) * 0.02).bfloat16()
    changed = []
    for _ in range(count):
        if kind == "sft":
            spread = torch.logspace(0, -1.3, columns)[torch.randperm(columns, generator=g)]
            change = randn(rows, columns) * 5e-4 * spread
        elif kind == "rl":
            change = randn(rows, columns) * 2e-4 * (torch.rand(rows, columns, generator=g) < 0.1)
        elif kind == "low_rank":
            change = randn(rows, 16) @ randn(16, columns) * 3e-4
        else:
            change = randn(rows, columns) * 3e-4
            change[:, :4] *= 40
        changed.append((base.float() + change).bfloat16())
    return base, changed


class CountingDeltas(TensorDeltas):
    """Counts the bytes taken from the workspace and the passes over the experts; its memory is poisoned."""

    taken = 0
    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()

    def empty(self, *shape, dtype=None):
        buffer = super().empty(*shape, dtype=dtype)
        self.taken += buffer.nbytes
        return buffer.fill_(torch.nan if buffer.dtype.is_floating_point else 0)


def exact(base: Tensor, changed: list[Tensor], cut: float | None = None) -> Tensor:
    """N A⁺ in float64, without eigenvalues up to `cut` of the largest."""
    covariance, target, _ = _normal(base, changed)
    return target @ torch.linalg.pinv(covariance, hermitian=True, rtol=cut)


def with_ridge(base: Tensor, changed: list[Tensor], ridge: float) -> Tensor:
    """(N + λ mean)(A + λI)⁻¹ in float64."""
    covariance, target, mean = _normal(base, changed)
    amount = ridge * covariance.trace() / len(covariance)
    shifted = covariance + amount * torch.eye(len(covariance), dtype=torch.float64)
    return torch.linalg.solve(shifted, target + amount * mean, left=False)


def _normal(base: Tensor, changed: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    changes = torch.stack([e.double() - base.double() for e in changed])
    changes = changes[changes.flatten(1).any(1)]
    covariances = changes.mT @ changes
    return covariances.sum(0), (changes @ covariances).sum(0), changes.mean(0)


def relative_error(result: Tensor, reference: Tensor) -> float:
    """‖result - reference‖ / ‖reference‖ in float64."""
    return float((result.double() - reference.double()).norm() / reference.double().norm())


def most_held(call: Callable[[], object]) -> int:
    """Most bytes that the allocator held at once for `call`, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
