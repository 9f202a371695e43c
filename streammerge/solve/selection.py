"""SCE's three steps: entries of largest variance, weights by energy, and the average of what agrees in sign."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.solve.panels import panel_sums, total
from streammerge_kernels.magnitude import HIGH_BINS, LOW_BINS, Cut, count_magnitudes_, find_bin, trim_

# mergekit's floors, of the sum of all mean squares and of the sum of weights
_LEAST_ENERGY, _LEAST_WEIGHT = 1e-6, 1e-6


class SceLook:
    """Look for where the selection ends, in two passes, and at the energy of what it keeps; else at the energies only.

    weights         of the experts, by their energies; all zero where no expert changed the tensor
    equal_weights   what mergekit takes instead where energies are small, else `weights`
    """

    weights: list[float]
    equal_weights: list[float]

    def __init__(self, deltas: Deltas, *, select_topk: float = 1.0, **others: object) -> None:
        self._name, self._topk, self._whole = deltas.name, select_topk, math.prod(deltas.whole)
        self._energies: list[list[Tensor]] = [[] for _ in range(deltas.experts)]
        self._counts = torch.zeros(HIGH_BINS, dtype=torch.int64, device=deltas.device)
        self._varying = torch.zeros((), dtype=torch.int64, device=deltas.device)
        self._prefix: Tensor | None = None
        self._rank = self._varying
        self._cut: Cut | None = None
        # by the block's first element: what is left of the cut's ties there
        self._ties: dict[int, Tensor] = {}
        self._energy_pass = 2 if select_topk < 1.0 else 0

    def look(self, number: int, deltas: Deltas) -> None:
        if number < self._energy_pass:
            variances = _variances(deltas)
            count_magnitudes_(self._counts, variances, prefix=self._prefix)
            if number == 0:
                self._varying += torch.count_nonzero(variances)
            return
        kept = self._kept_of_next_block(deltas)
        for index, change in _kept_changes(deltas, kept):
            self._energies[index].append(panel_sums(change, change))

    def finish(self, number: int) -> None:
        if number == self._energy_pass:
            self._weigh()
        elif number == 0:
            rank = (self._varying.double() * max(self._topk, 0.0)).floor().long()
            self._prefix, self._rank = find_bin(self._counts, rank)
            self._counts = self._counts.new_zeros(LOW_BINS)
        else:
            assert self._prefix is not None, "the second pass follows the first"
            low, ties = find_bin(self._counts, self._rank)
            self._cut = Cut(pattern=(self._prefix * LOW_BINS + low).to(torch.int32), ties=ties)

    def kept(self, deltas: Deltas) -> Tensor | None:
        """Which entries of a block are kept, [*shape] bool; None for all."""
        if self._cut is None:
            return None
        cut = Cut(pattern=self._cut.pattern, ties=self._ties[deltas.first_element].clone())
        return trim_(_variances(deltas), cut) != 0.0

    def _kept_of_next_block(self, deltas: Deltas) -> Tensor | None:
        if self._cut is None:
            return None
        self._ties[deltas.first_element] = self._cut.ties.clone()
        return trim_(_variances(deltas), self._cut) != 0.0

    def _weigh(self) -> None:
        energies = [total(blocks, self._name) for blocks in self._energies]
        energy, count = math.fsum(energies), len(energies)
        self.weights = [each / energy if energy > 0.0 else 0.0 for each in energies]
        small = energy / max(self._whole, 1) < _LEAST_ENERGY
        self.equal_weights = [1.0 / count] * count if small else self.weights


def erased(deltas: Deltas, *, as_mergekit: bool) -> Tensor:
    """The weighted average of the kept changes whose sign is that of their sum, [*shape]."""
    seen: SceLook = deltas.seen
    weights = seen.equal_weights if as_mergekit else seen.weights
    kept = seen.kept(deltas)
    votes = deltas.zeros(*deltas.shape)
    for _, change in _kept_changes(deltas, kept):
        votes.add_(change)
    negative = votes < 0.0
    merged, divisor = votes.zero_(), deltas.zeros(*deltas.shape)
    for index, change in _kept_changes(deltas, kept):
        agrees = torch.where(negative, change < 0.0, change > 0.0)
        merged.add_(torch.where(agrees, change, 0.0), alpha=weights[index])
        divisor.add_(agrees, alpha=weights[index])
    if as_mergekit:
        return merged.div_(divisor.clamp_(min=_LEAST_WEIGHT))
    return merged.div_(torch.where(divisor > 0.0, divisor, 1.0))


def _kept_changes(deltas: Deltas, kept: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    for delta in deltas:
        change = delta.dense()
        yield delta.index, change if kept is None else change.mul_(kept)


def _variances(deltas: Deltas) -> Tensor:
    """The population variance of each entry over the experts, [*shape] float32; exactly 0 where they are equal."""
    mean, first = deltas.zeros(*deltas.shape), deltas.empty(*deltas.shape)
    # taken of differences from the first expert, so that equal changes leave no rounding
    for delta in deltas:
        if delta.index == 0:
            delta.dense(out=first)
        else:
            mean.add_(delta.dense().sub_(first))
    # the first expert's own difference is zero
    variance = mean.div_(deltas.experts).square()
    for delta in deltas:
        if delta.index:
            variance.add_(delta.dense().sub_(first).sub_(mean).square_())
    return variance.div_(deltas.experts).float().contiguous()
