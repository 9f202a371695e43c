"""Streams that a wrapping method hands to the rule inside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from streammerge.delta import Delta, Deltas, TensorDeltas


class PartDeltas(TensorDeltas):
    """Changes [k, n] each, in memory, in place of a stream's own; buffers come from that stream."""

    def __init__(self, outer: Deltas, changes: Sequence[Tensor], zeros: Tensor) -> None:
        super().__init__(zeros, changes, name=outer.name, seed=outer.seed)
        self._outer = outer

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self._outer.empty(*shape, dtype=dtype or self.dtype)


class ScaledDelta(Delta):
    """One expert's change, times a factor."""

    def __init__(self, delta: Delta, factor: float) -> None:
        self.index, self.first_element = delta.index, delta.first_element
        self._delta, self._factor = delta, factor

    def dense(self, out: Tensor | None = None) -> Tensor:
        return self._delta.dense(out).mul_(self._factor)


class ScaledDeltas(Deltas):
    """Every expert's change, times a factor."""

    def __init__(self, outer: Deltas, factor: float) -> None:
        self.name, self.shape, self.whole = outer.name, outer.shape, outer.whole
        self.dtype, self.device, self.experts = outer.dtype, outer.device, outer.experts
        self.facts, self.seed, self.first_element = outer.facts, outer.seed, outer.first_element
        self._outer, self._factor = outer, factor

    def __iter__(self) -> Iterator[Delta]:
        for delta in self._outer:
            yield ScaledDelta(delta, self._factor)

    def base(self) -> Tensor:
        return self._outer.base()

    def beside(self, index: int) -> Tensor | None:
        return self._outer.beside(index)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self._outer.empty(*shape, dtype=dtype)
