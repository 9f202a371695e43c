"""Tensors with a row for each token of another vocabulary: whose rows they take, and how a run of them is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streammerge.checkpoint import DTYPE_BYTES
from streammerge.derived import DerivedEntry, ReadPart

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

ZERO, MEAN, PADDING = -1, -2, -3
"""Rows that are copied from nowhere: zeros, a mean of several models' rows, the mean of all rows that have a token."""
PIECE_ELEMENTS = 1 << 15


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segments:
    """Where rows come from, as runs of rows that lie one after the other in their source too.

    starts   [n] the first row of each run, ascending from 0; `rows` ends the last
    sources  [n] which of the entry's parts, or ZERO, MEAN, PADDING
    firsts   [n] the row there of the run's first row; of a MEAN, how many rows it is the mean of
    """

    starts: NDArray[np.int64]
    sources: NDArray[np.int64]
    firsts: NDArray[np.int64]
    rows: int

    @staticmethod
    def of(sources: NDArray[np.int64], rows: NDArray[np.int64]) -> Segments:
        """From the source and the row there of every row, each [n]."""
        import numpy as np

        ahead = np.where(sources >= 0, rows - np.arange(len(rows)), rows)
        ends = (sources[1:] != sources[:-1]) | (ahead[1:] != ahead[:-1])
        starts = np.concatenate([[0], np.flatnonzero(ends) + 1])
        return Segments(starts=starts, sources=sources[starts], firsts=rows[starts], rows=len(rows))

    def between(self, first: int, last: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
        """The runs that cover the elements [first, last): source, first element there (or a MEAN's count), bounds."""
        number = int(self.starts.searchsorted(first // columns, "right")) - 1
        while number < len(self.starts):
            start = int(self.starts[number]) * columns
            if start >= last:
                return
            number += 1
            end = int(self.starts[number]) * columns if number < len(self.starts) else self.rows * columns
            source, row = int(self.sources[number - 1]), int(self.firsts[number - 1])
            begin = max(start, first)
            yield source, row * columns + begin - start if source >= 0 else row, begin, min(end, last)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MappedRows:
    """A matrix or vector whose rows are picked from the entry's parts.

    rows     where each row comes from
    summed   what a MEAN is of: one for each model, ZERO where that model has no row for it

    Means are of rows as stored, in float64, rounded once to the entry's dtype.
    """

    rows: Segments
    summed: tuple[Segments, ...] = ()
    # the row that PADDING has, once it is known: finding it reads the whole tensor
    _padding: list[Tensor] = field(default_factory=list, repr=False)

    def scratch_bytes(self, entry: DerivedEntry, elements: int) -> int:
        """A part's run, and in float64 a piece of a mean."""
        piece = max(PIECE_ELEMENTS, self._columns(entry)) if (self.rows.sources < ZERO).any() else 0
        longest, run = max(elements, piece), 0
        for part in entry.parts:
            inside = part.scratch_bytes(longest) if isinstance(part, DerivedEntry) else 0
            run = max(run, longest * DTYPE_BYTES[part.dtype] + inside)
        # the piece as stored and in float64, and the place of each element in a row
        return run + piece * 3 * 8

    def fill(self, entry: DerivedEntry, out: Tensor, first_element: int, read: ReadPart) -> None:
        """Write a run: copies of parts' runs, and between them what is computed."""
        last = first_element + out.numel()
        for source, place, begin, end in self.rows.between(first_element, last, self._columns(entry)):
            run = out[begin - first_element : end - first_element]
            if source >= 0:
                run.copy_(read(entry.parts[source], place, end - begin))
            elif source == ZERO:
                run.zero_()
            elif source == MEAN:
                self._fill_means(entry, run, begin, place, read)
            else:
                self._fill_padding(entry, run, begin, read)

    def _columns(self, entry: DerivedEntry) -> int:
        return entry.elements // self.rows.rows

    def _fill_means(self, entry: DerivedEntry, out: Tensor, first: int, count: int, read: ReadPart) -> None:
        import torch

        for done in range(0, out.numel(), PIECE_ELEMENTS):
            piece = out[done : done + PIECE_ELEMENTS]
            total, start = torch.zeros(piece.numel(), dtype=torch.float64), first + done
            for rows in self.summed:
                for source, place, begin, end in rows.between(start, start + piece.numel(), self._columns(entry)):
                    if source >= 0:
                        total[begin - start : end - start] += read(entry.parts[source], place, end - begin)
            piece.copy_(total.div_(count))

    def _fill_padding(self, entry: DerivedEntry, out: Tensor, first: int, read: ReadPart) -> None:
        import torch

        if not self._padding:
            self._padding.append(self._mean_of_all(entry, out.dtype, read))
        row, columns = self._padding[0], self._columns(entry)
        for done in range(0, out.numel(), PIECE_ELEMENTS):
            piece = out[done : done + PIECE_ELEMENTS]
            piece.copy_(row[(torch.arange(piece.numel()) + (first + done)) % columns])

    def _mean_of_all(self, entry: DerivedEntry, dtype: torch.dtype, read: ReadPart) -> Tensor:
        import torch

        columns, count = self._columns(entry), 0
        step = max(PIECE_ELEMENTS // columns, 1) * columns
        total = torch.zeros(columns, dtype=torch.float64)
        for source, _, first, last in self.rows.between(0, self.rows.rows * columns, columns):
            if source == PADDING:
                continue
            count += (last - first) // columns
            for begin in range(first, last, step):
                piece = torch.empty(min(step, last - begin), dtype=dtype)
                self.fill(entry, piece, begin, read)
                total += piece.view(-1, columns).double().sum(0)
        return total.div_(max(count, 1))
