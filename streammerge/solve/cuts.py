"""Which of an expert's changes are its largest, in a tensor or a model that is looked at block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from streammerge_kernels.magnitude import HIGH_BINS, LOW_BINS, count_magnitudes_, find_bin


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Where the largest magnitudes end, of values as float32 holds them.

    magnitude  of the smallest that is kept
    below      the next smaller magnitude
    last       of the entries of that magnitude, by tensor the flat index of the last that is kept, -1 for none;
               None where all are
    """

    magnitude: float
    below: float
    last: Mapping[str, int] | None

    def keep_(self, values: Tensor, name: str, first_element: int) -> Tensor:
        """Set what is not among the largest to zero, in place.

        values         [*shape] contiguous, a run of the tensor `name` that begins at flat index `first_element`

        Depends on nothing but its arguments: blocks may come in any order. Returns `values`.
        """
        if values.dtype != torch.float32:
            return values.mul_(self.keep_(values.float(), name, first_element) != 0.0)
        flat = values.view(-1)
        equals = len(flat)
        if self.last is not None:
            equals = min(max(self.last[name] + 1 - first_element, 0), len(flat))
        for part, bound in ((flat[:equals], self.below), (flat[equals:], self.magnitude)):
            torch.ops.aten.hardshrink.out(part, bound, out=part)
        return values


class CutSearch:
    """Find where the largest magnitudes of one expert end: show every block in order, once a pass.

    keep    of the number of entries that are shown, how many are the largest
    equals  "first": exactly so many, of equal magnitudes those of the lowest index, tensors in the order shown;
            takes three passes. "all": and those that equal the smallest of them; takes two
    """

    def __init__(self, keep: Callable[[int], int], *, equals: str, device: torch.device) -> None:
        self._keep, self._equals, self._device = keep, equals, device
        self._shown = 0
        self._prefix: Tensor | None = None
        self._counts: Tensor | None = self._zeros(HIGH_BINS)
        self._rank = self._left = self._zeros()
        self._last: dict[str, Tensor] | None = None
        self._magnitude = self._below = torch.inf
        self._found: Cut | None = None

    def look(self, number: int, values: Tensor, name: str, first_element: int) -> None:
        """See one block in pass `number`, [*shape] float32."""
        if number == 2:
            self._look_for_last(values, name, first_element)
            return
        if number == 0:
            self._shown += values.numel()
        if self._counts is not None:
            count_magnitudes_(self._counts, values, prefix=self._prefix)

    def finish(self, number: int) -> None:
        """End a pass."""
        if number == 0:
            keep = min(self._keep(self._shown), self._shown)
            if keep == 0:
                self._counts = None
            else:
                assert self._counts is not None, "the first pass counts"
                self._prefix, self._rank = find_bin(self._counts, self._zeros() + keep)
                self._counts = self._zeros(LOW_BINS)
        elif number == 1 and self._counts is not None:
            assert self._prefix is not None, "the second pass follows the first"
            low, kept = find_bin(self._counts, self._rank)
            pattern = (self._prefix * LOW_BINS + low).to(torch.int32)
            patterns = torch.stack((pattern, (pattern - 1).clamp_(min=0)))
            self._magnitude, self._below = patterns.view(torch.float32).tolist()
            if self._equals == "first" and bool(kept < self._counts[low]):
                self._last, self._left = {}, kept
            self._counts = None
        if number == (2 if self._equals == "first" else 1):
            last: dict[str, int] | None = None
            if self._last is not None:
                last = dict(zip(self._last, torch.stack([*self._last.values()]).tolist(), strict=True))
            self._found = Cut(magnitude=self._magnitude, below=self._below, last=last)

    @property
    def cut(self) -> Cut:
        """The result of all passes."""
        assert self._found is not None, "not all passes were made"
        return self._found

    def _look_for_last(self, values: Tensor, name: str, first_element: int) -> None:
        if self._last is None:
            return
        ranks = (values.abs() == self._magnitude).reshape(-1).cumsum(0)
        place = torch.searchsorted(ranks, self._left.view(1)).clamp_(max=len(ranks) - 1).view(())
        before = self._last.get(name, torch.full_like(place, -1))
        self._last[name] = torch.where(self._left > 0, place + first_element, before)
        self._left = (self._left - ranks[-1]).clamp_(min=0)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self._device)
