"""Random drops: which entries DARE and DELLA keep, and by what they rescale them.

https://arxiv.org/abs/2311.03099, https://arxiv.org/abs/2406.11617
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from streammerge.delta import Delta, Deltas, PerExpert
from streammerge.solve.cost_trim import norm_is_kept, spans
from streammerge.solve.election import Thin
from streammerge.solve.rescale import NormRatios
from streammerge_kernels.drop import drop_key, keep_mask
from streammerge_kernels.round import random_lanes

# elements ranked and drawn at a time, in whole rows: the integer temporaries then stay in a CPU's cache
_CHUNK = 1 << 15
_DEVICE_CHUNK = 1 << 22
_WORDS = 1 << 32


class Drop(ABC):
    """A rule of which entries of a change are kept.

    What a look draws of a tensor that is held is kept for its merge: drawing costs more than all the rest.
    """

    def __init__(self) -> None:
        self._masks: dict[tuple[int, int], Tensor] = {}

    def mask(self, deltas: Deltas, delta: Delta, draw: Callable[[], Tensor]) -> Tensor:
        """What is kept of a piece, [*shape] bool: as it was drawn before, or else as `draw` draws it."""
        place = delta.index, delta.first_element
        found = self._masks.pop(place, None)
        if found is None:
            found = draw()
            if deltas.held:
                self._masks[place] = found
        return found

    @abstractmethod
    def keeps_all(self, index: int) -> bool:
        """Whether nothing of expert `index` is dropped."""

    @abstractmethod
    def drop_(self, deltas: Deltas, delta: Delta, change: Tensor, *, rescale: bool) -> Tensor:
        """Set what is dropped of a piece of a change to zero, in place; `rescale` divides the rest by its chance."""


class Dare(Drop):
    """Each entry is kept with probability `density`."""

    def __init__(self, deltas: Deltas, density: PerExpert) -> None:
        super().__init__()
        self._densities = deltas.per_expert(density)

    def keeps_all(self, index: int) -> bool:
        return self._densities[index] == 1.0

    def drop_(self, deltas: Deltas, delta: Delta, change: Tensor, *, rescale: bool) -> Tensor:
        density = self._densities[delta.index]

        def draw() -> Tensor:
            return keep_mask(
                change.shape,
                density=density,
                seed=deltas.seed,
                name=deltas.name,
                expert=str(delta.index),
                first_index=delta.first_element,
                device=change.device,
            )

        change.mul_(self.mask(deltas, delta, draw))
        return change.div_(density) if rescale and density > 0.0 else change


class Della(Drop):
    """An entry is kept with a probability that grows with its rank in its row, by magnitude."""

    def __init__(self, deltas: Deltas, density: PerExpert, epsilon: PerExpert) -> None:
        super().__init__()
        self._spans = spans(density, epsilon, deltas.experts)

    def keeps_all(self, index: int) -> bool:
        return self._spans[index] == (1.0, 1.0)

    def drop_(self, deltas: Deltas, delta: Delta, change: Tensor, *, rescale: bool) -> Tensor:
        if self._spans[delta.index][1] == 0.0:
            return change.zero_()
        if not rescale:
            return change.mul_(self.mask(deltas, delta, lambda: self._draw(deltas, delta, change, rescale=False)))
        self._draw(deltas, delta, change, rescale=True)
        return change

    def _draw(self, deltas: Deltas, delta: Delta, change: Tensor, *, rescale: bool) -> Tensor:
        """Which entries are kept, [*shape] bool; `rescale` drops the others and divides the rest by its chance."""
        least, most = self._spans[delta.index]
        kept = torch.empty(change.shape, dtype=torch.bool, device=change.device)
        rows = change.view(-1, change.shape[-1] if change.ndim else 1)
        columns = rows.shape[1]
        words = drop_key(deltas.seed, deltas.name, str(delta.index))
        size = max((_CHUNK if change.device.type == "cpu" else _DEVICE_CHUNK) // max(columns, 1), 1)
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            chance = chances(part, least, most)
            start, skipped = divmod(delta.first_element + first * columns, 4)
            drawn = random_lanes(words, start, -(-(skipped + part.numel()) // 4), change.device).view(-1)
            below = (chance * _WORDS).round_().view(-1)
            mask = kept.view(-1)[first * columns : first * columns + part.numel()]
            torch.lt(drawn[skipped : skipped + part.numel()], below, out=mask)
            if rescale:
                part.mul_(mask.view(part.shape)).div_(chance)
        return kept


def chances(rows: Tensor, least: float, most: float) -> Tensor:
    """DELLA's probability of being kept: from `least`, for the smallest of its row, to `most`; [rows, columns] float64.

    Of equal magnitudes the first is the larger. A row of one entry has the mean of both.
    """
    columns = rows.shape[1]
    if columns == 1:
        return torch.full_like(rows, (least + most) / 2, dtype=torch.float64)
    order = torch.sort(rows.abs(), dim=1, descending=True, stable=True).indices
    steps = torch.arange(columns - 1, -1, -1, dtype=torch.float64, device=rows.device)
    steps.div_(columns - 1).mul_(most - least).add_(least)
    return torch.empty_like(rows, dtype=torch.float64).scatter_(1, order, steps.expand(order.shape))


class DropLook:
    """Sums of the magnitudes of each expert's change, of all and of what is kept: their `ratios`."""

    def __init__(self, deltas: Deltas, drop: Drop, *, by_row: bool) -> None:
        self.drop = drop
        self.ratios = NormRatios([t for t in range(deltas.experts) if not drop.keeps_all(t)], by_row=by_row)

    def look(self, number: int, deltas: Deltas) -> None:
        def thin(delta: Delta, change: Tensor) -> Tensor:
            return self.drop.drop_(deltas, delta, change, rescale=False)

        self.ratios.look(deltas, thin)

    def finish(self, number: int) -> None:
        self.ratios.finish()


class DareLook(DropLook):
    """What `dare_linear` and `dare_ties` rescale by; the arguments are theirs."""

    def __init__(self, deltas: Deltas, *, density: PerExpert = 1.0, **others: object) -> None:
        super().__init__(deltas, Dare(deltas, density), by_row=False)


class DellaLook(DropLook):
    """What `della` and `della_linear` rescale by; the arguments are theirs."""

    def __init__(
        self, deltas: Deltas, *, density: PerExpert = 1.0, epsilon: PerExpert = 0.15, **others: object
    ) -> None:
        super().__init__(deltas, Della(deltas, density, epsilon), by_row=True)


def drop_entries(deltas: Deltas, drop: Drop, *, rescale: bool, rescale_by: str) -> Thin:
    """What drops entries of a change and rescales the rest: by the look's ratio, or each by its chance."""
    by_norm = norm_is_kept({"rescale": rescale, "rescale_by": rescale_by})
    # the look's own, of the same settings, has what it drew
    drop = deltas.seen.drop if deltas.seen else drop
    drops = not all(map(drop.keeps_all, range(deltas.experts)))
    assert deltas.seen or not (by_norm and drops), "rescaling takes a look: `Method.merge` sees to it"

    def thin(delta: Delta, change: Tensor) -> Tensor:
        if drop.keeps_all(delta.index):
            return change
        return drop.drop_(deltas, delta, change, rescale=rescale and not by_norm)

    return deltas.seen.ratios.rescaled(deltas.name, thin) if by_norm and drops else thin
