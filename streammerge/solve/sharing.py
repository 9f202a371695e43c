"""Which experts changed an entry: counted in a look, and the merge by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streammerge.delta import Deltas


class SharingLook:
    """Count, for each expert, the entries that it and another changed (`shared`), and those only it did (`own`)."""

    shared: list[int]
    own: list[int]

    def __init__(self, deltas: Deltas, *, epsilon: float = 1e-5, **others: object) -> None:
        self._epsilon = epsilon
        self._counts = torch.zeros(2, deltas.experts, dtype=torch.int64, device=deltas.device)

    def look(self, number: int, deltas: Deltas) -> None:
        changers = _changers(deltas, self._epsilon)
        for delta in deltas:
            changed = delta.dense().abs() > self._epsilon
            self._counts[0, delta.index] += (changed & (changers > 1)).sum()
            self._counts[1, delta.index] += (changed & (changers == 1)).sum()

    def finish(self, number: int) -> None:
        self.shared, self.own = self._counts.tolist()


def merge_by_sharing(deltas: Deltas, epsilon: float, factors: Sequence[float]) -> Tensor:
    """The mean over those who changed an entry; what one alone changed is multiplied by its factor. [*shape]."""
    changers = _changers(deltas, epsilon)
    merged = deltas.zeros(*deltas.shape)
    for factor, delta in zip(factors, deltas, strict=True):
        change = delta.dense()
        change = torch.where(change.abs() > epsilon, change, 0.0)
        merged.add_(change if factor == 1.0 else torch.where(changers == 1, change * factor, change))
    return merged.div_(changers.clamp_(min=1))


def _changers(deltas: Deltas, epsilon: float) -> Tensor:
    """How many experts moved an entry by more than epsilon: [*shape] int32."""
    changers = deltas.zeros(*deltas.shape, dtype=torch.int32)
    for delta in deltas:
        changers += delta.dense().abs() > epsilon
    return changers
