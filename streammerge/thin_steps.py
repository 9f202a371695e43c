"""A matrix step whose experts are adapters: their factors are read and merged, then the base goes by, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from streammerge import methods
from streammerge.adapters import LowRank
from streammerge.checkpoint import TensorEntry
from streammerge.derived import DerivedEntry
from streammerge.errors import MergeError, quoted
from streammerge.outcome import Tally
from streammerge.readahead import Request, cut
from streammerge.solve.cost_thin import THIN_ROWS
from streammerge.solve.thin import Factors, ThinDeltas
from streammerge.step import Step
from streammerge.streamed_deltas import Sources, StepReader, compute_dtype

Take = Callable[[int, TensorEntry], Tensor]
"""Gives an entry of a model whole, [elements] in its stored dtype."""


class ThinSources(Sources):
    """The factors of every expert, one after the other, and then the base."""

    def __init__(self, step: Step) -> None:
        super().__init__(step, passes=1)
        self.factors = factors_of(step)

    @property
    def read_bytes(self) -> int:
        """Bytes of all requests."""
        return self.origin[1].nbytes + sum(entry.nbytes for _, entry in self.factors)

    def requests(self, block_elements: int) -> Iterator[Request]:
        """Every run, in the order it will be taken."""
        for model, entry in (*self.factors, self.origin):
            yield from cut(model, entry, block_elements, last=True)


def factors_of(step: Step) -> list[tuple[int, TensorEntry]]:
    """A and B of every expert that changed the tensor, each with its model's number."""
    experts = zip(step.models[step.base is not None :], step.experts, strict=True)
    return [(model, part) for model, entry in experts for part in _low_rank_parts(entry)]


def merge_thin(step: Step, names: Sequence[str], take: Take, tally: Tally) -> Factors:
    """The merged change of one tensor as factors in float64, [out, in] however it is stored.

    take  gives the factors, asked for in the order of `factors_of`

    Raises MergeError for a factor with a NaN or an infinity, naming it and its model, and what the method raises.
    """
    rows, columns = step.shape
    transposed = step.role.transposed
    deltas = ThinDeltas(
        name=step.name,
        shape=(columns, rows) if transposed else (rows, columns),
        experts=[
            _expert(step, names[model], entry, partial(take, model))
            for model, entry in zip(step.models[step.base is not None :], step.experts, strict=True)
        ],
        dtype=compute_dtype(step),
    )
    merged = methods.describe(step.method).load_thin()(deltas, **step.arguments)
    for number, energy in enumerate(deltas.energies):
        tally.norms.squared[number] = energy
    tally.outcome.facts.update(deltas.facts)
    return merged


class ThinChange:
    """The merged change in the order of the stored tensor's rows, in `dtype`; `transposed` where those are inputs.

    Rows are formed in groups that begin at multiples of THIN_ROWS: no bit depends on how the tensor is cut.
    """

    def __init__(self, merged: Factors, dtype: torch.dtype, *, transposed: bool) -> None:
        left, right = (merged.right.mT, merged.left.mT) if transposed else merged
        self._left, self._right = left.to(dtype).contiguous(), right.to(dtype).contiguous()
        self._tile, self._top = self._left.new_empty(0, self._right.shape[1]), 0

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last`, [last - first, columns]. Asked for in their order, none is formed twice."""
        out = self._left.new_empty(last - first, self._right.shape[1])
        row = first
        while row < last:
            if not self._top <= row < self._top + len(self._tile):
                self._top = row // THIN_ROWS * THIN_ROWS
                self._tile = self._left[self._top : self._top + THIN_ROWS] @ self._right
            end = min(self._top + len(self._tile), last)
            out[row - first : end - first] = self._tile[row - self._top : end - self._top]
            row = end
        return out


def read_factors(step: Step, reader: StepReader, block: int) -> tuple[Take, int]:
    """What `merge_thin` takes the factors by, and how many runs of the reader come before the base's."""
    starts, count = {}, 0
    for model, entry in factors_of(step):
        starts[model, entry.name] = count
        count += -(-entry.elements // block)

    def take(model: int, entry: TensorEntry) -> Tensor:
        runs = []
        start = starts[model, entry.name]
        for position in range(start, start + -(-entry.elements // block)):
            run, give_back = reader.take(position)
            runs.append(run.clone())
            give_back()
        return torch.cat(runs)

    return take, count


def _low_rank_parts(entry: TensorEntry) -> tuple[TensorEntry, ...]:
    return entry.parts[1:] if isinstance(entry, DerivedEntry) and isinstance(entry.derivation, LowRank) else ()


def _expert(step: Step, name: str, entry: TensorEntry, take: Callable[[TensorEntry], Tensor]) -> Factors:
    """One expert's change, [out, in]."""
    rows, columns = step.shape
    if not isinstance(entry, DerivedEntry) or not isinstance(entry.derivation, LowRank):
        out, into = (columns, rows) if step.role.transposed else (rows, columns)
        return Factors(torch.zeros(out, 0, dtype=torch.float64), torch.zeros(0, into, dtype=torch.float64))
    a, b = (_finite(name, part, take(part)) for part in entry.parts[1:])
    rank = entry.derivation.rank(entry)
    left, right = b.view(-1, rank).double().mul_(entry.derivation.scale), a.view(rank, -1).double()
    # B A is [out, in] of the layer; what is stored or merged the other way round swaps the factors
    return Factors(right.mT, left.mT) if entry.derivation.transposed != step.role.transposed else Factors(left, right)


def _finite(name: str, part: TensorEntry, values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise MergeError(
            f"{quoted(part.name)} in {quoted(name)} holds a NaN or an infinity",
            hint="The adapter is damaged or its training diverged. Fetch it again, or leave it out.",
        )
    return values
