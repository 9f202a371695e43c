"""By what the rest of a thinned change is multiplied so that each tensor keeps its sum of magnitudes."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from streammerge.delta import Delta, Deltas
from streammerge.solve.election import Thin
from streammerge.solve.panels import panel_magnitudes, row_magnitudes, total

Sums = Tensor | list[float]


def _kept(sums: Tensor) -> Sums:
    # a small tensor that stays amid large ones that go would keep the allocator from giving their memory back
    if sums.device.type != "cpu":
        return sums
    kept: list[float] = sums.tolist()
    return kept


class NormRatios:
    """By tensor and expert: the sum of magnitudes of a change over that of what is left of it, 1 where that is 0.

    thinned  the experts of whose changes anything is left out
    by_row   blocks are whole rows, beginning anywhere; else they begin at multiples of PANEL
    """

    def __init__(self, thinned: Collection[int], *, by_row: bool = False) -> None:
        self._thinned, self._block_sums = thinned, row_magnitudes if by_row else panel_magnitudes
        self._name = ""
        self._sums: dict[int, tuple[list[Sums], list[Sums]]] = {}
        self._ratios: dict[tuple[str, int], float] = {}

    def look(self, deltas: Deltas, thin: Thin) -> None:
        """See one block; all of a tensor's come before another's."""
        if deltas.name != self._name:
            # a model's panels are too many to keep
            self.finish()
            self._name = deltas.name

        def sums(delta: Delta, change: Tensor) -> tuple[Sums, Sums]:
            return _kept(self._block_sums(change)), _kept(self._block_sums(thin(delta, change)))

        for index, pieces in enumerate(deltas.each(sums)[1]):
            if index in self._thinned:
                wholes, lefts = self._sums.setdefault(index, ([], []))
                for whole, left in pieces:
                    wholes.append(whole)
                    lefts.append(left)

    def finish(self) -> None:
        """All blocks of the last tensor were seen."""
        for index, (whole, left) in self._sums.items():
            divisor = total(left, self._name)
            self._ratios[self._name, index] = total(whole, self._name) / divisor if divisor else 1.0
        self._sums = {}

    def rescaled(self, name: str, thin: Thin) -> Thin:
        """What thins a change of the tensor `name` and rescales what is left."""

        def rescale(delta: Delta, change: Tensor) -> Tensor:
            change = thin(delta, change)
            return change.mul_(self._ratios.get((name, delta.index), 1.0)) if delta.index in self._thinned else change

        return rescale
