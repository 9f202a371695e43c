"""What LARV's look knows of each matrix: how rich and how disturbing its change is, beside those of the model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.solve.buffers import Buffers
from streammerge.solve.polar import gram

# what rounding may have made of none
_NO_DEVIATION = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostics:
    """A matrix's effective-rank contrast and conflict, by themselves or in standard deviations from the mean."""

    contrast: float
    conflict: float


class LarvLook:
    """The diagnostics of every matrix in one pass, and where each stands in the model. Arguments make no difference."""

    def __init__(self, deltas: Deltas, **arguments: object) -> None:
        del deltas, arguments
        self._found: dict[str, Diagnostics] = {}
        self._standing: dict[str, Diagnostics] = {}

    def look(self, number: int, deltas: Deltas) -> None:
        found = diagnostics(deltas)
        if found is not None:
            self._found[deltas.name] = found

    def finish(self, number: int) -> None:
        contrasts = standardised([found.contrast for found in self._found.values()])
        conflicts = standardised([found.conflict for found in self._found.values()])
        self._standing = {
            name: Diagnostics(contrast=contrast, conflict=conflict)
            for name, contrast, conflict in zip(self._found, contrasts, conflicts, strict=True)
        }

    def of(self, name: str) -> tuple[Diagnostics, Diagnostics] | None:
        """A matrix's diagnostics, and the same standardised; None where its base or its change is zero."""
        return (self._found[name], self._standing[name]) if name in self._found else None


def standardised(values: Sequence[float]) -> list[float]:
    """Each value's distance from the mean in population standard deviations; zeros where all are alike.

    They are where the deviation is at most 10⁻⁹ of the mean, or 10⁻⁹ where that is less than 1. Sums are exact, so
    that the order of the values makes no difference.
    """
    if not values:
        return []
    mean, deviation = statistics.mean(values), statistics.pstdev(values)
    if deviation <= _NO_DEVIATION * max(1.0, abs(mean)):
        return [0.0] * len(values)
    return [(value - mean) / deviation for value in values]


def diagnostics(deltas: Deltas) -> Diagnostics | None:
    """Contrast e and conflict c of a matrix, as `larv` defines them; None where its base or its change is zero."""
    rows, columns = deltas.shape
    buffers = Buffers(deltas, torch.float64)
    total = buffers.take("total", torch.float64, rows, columns).zero_()
    for delta in deltas:
        total.add_(delta.dense())
    base = buffers.take("base", torch.float64, rows, columns).copy_(deltas.base())
    ranks = _effective_rank(base, buffers), _effective_rank(total, buffers)
    if not all(ranks):
        return None
    across = (base, total.mT) if rows <= columns else (base.mT, total)
    size = min(rows, columns)
    turned = torch.mm(*across, out=buffers.take("gram", torch.float64, size, size))
    norm = torch.linalg.vector_norm(turned).item()
    antisymmetric = torch.linalg.vector_norm(turned - turned.mT).item()
    return Diagnostics(contrast=ranks[0] / ranks[1], conflict=antisymmetric / (2.0 * norm) if norm else 0.0)


def _effective_rank(matrix: Tensor, buffers: Buffers) -> float:
    energies = torch.linalg.eigvalsh(gram(matrix, buffers)).clamp_min_(0.0)
    total = energies.sum()
    return math.exp(torch.special.entr(energies / total).sum().item()) if total > 0.0 else 0.0
