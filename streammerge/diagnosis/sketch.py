"""Sketches of matrices: random combinations of a change's rows, from which its products with others are estimated.

With signs g_i, rows of a random ±1 matrix G [SKETCH, out], and b_t,i = g_i D_t, all that is wanted are averages over
i ≠ j of products of b_s,i · b_t,j: as g_i and g_j are independent, the mean of (b_s,i · b_t,j)(b_u,i · b_t,j) is
⟨D_s D_tᵀ, D_u D_tᵀ⟩ exactly. An average over SKETCH² pairs is off by some percent where a change spreads over many
directions, by about a third where one direction carries it all; ratios are off by less, as the same signs enter both.
The same idea, for traces of Grams: Kong and Valiant, https://arxiv.org/abs/1602.00061.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import Executor

import torch
from torch import Tensor

from streammerge.diagnosis.result import MatrixFindings, pairs

SKETCH = 64
# rows that are multiplied at a time, whatever the blocks they come in: the sums are then the same for any budget
_PANEL_ROWS = 64
_RIDGE = 0.1


class RowSketches:
    """G D_t [SKETCH, in] of every change D_t of one matrix, whose entries come in any runs, in order.

    transposed   the matrix is stored [in, out]
    """

    def __init__(
        self, name: str, shape: tuple[int, int], count: int, *, transposed: bool, seed: int, dtype: torch.dtype
    ) -> None:
        stored_rows, stored_columns = shape
        self.rows, self.columns = (stored_columns, stored_rows) if transposed else shape
        self._transposed = transposed
        self._signs = _signs(name, seed, self.rows).to(dtype)
        self._sketches = [torch.zeros(SKETCH, self.columns, dtype=dtype) for _ in range(count)]
        self._panels = [torch.empty(_PANEL_ROWS, stored_columns, dtype=dtype) for _ in range(count)]
        self._first_row, self._filled = 0, 0

    @staticmethod
    def nbytes(shape: tuple[int, int], count: int, itemsize: int) -> int:
        """What the sketches of a matrix take."""
        longest, columns = max(shape), shape[1]
        signs = SKETCH * longest * (itemsize + 1)
        return signs + count * itemsize * (SKETCH * longest + _PANEL_ROWS * columns)

    def add(self, changes: Sequence[Tensor], workers: Executor) -> None:
        """See the next run of every change, flattened in stored order."""
        done, elements = 0, changes[0].numel()
        size = self._panels[0].numel()
        while done < elements:
            step = min(elements - done, size - self._filled)
            for panel, change in zip(self._panels, changes, strict=True):
                panel.view(-1)[self._filled : self._filled + step] = change.view(-1)[done : done + step]
            self._filled += step
            done += step
            if self._filled == size:
                self._multiply(workers)

    def finish(self, workers: Executor) -> list[Tensor]:
        """Each sketch in float64, after the last run."""
        if self._filled:
            self._multiply(workers)
        return [sketch.double() for sketch in self._sketches]

    def _multiply(self, workers: Executor) -> None:
        columns = self._panels[0].shape[1]
        count = self._filled // columns
        rows = slice(self._first_row, self._first_row + count)

        def one(number: int) -> None:
            panel, sketch = self._panels[number][:count], self._sketches[number]
            if self._transposed:
                sketch[:, rows] = torch.mm(self._signs, panel.mT)
            else:
                sketch.addmm_(self._signs[:, rows], panel)

        # each on one thread: on several the order of the sums could depend on how many there are
        list(workers.map(one, range(len(self._panels))))
        self._first_row, self._filled = rows.stop, 0


def sketched(
    sketches: Sequence[Tensor], squared_norms: Sequence[float], rows: int, experts: int
) -> MatrixFindings | None:
    """What the sketches tell of a matrix; None where no expert changed it.

    sketches       [SKETCH, in] float64 of each expert's change, then of each finished merge's
    squared_norms  of the experts' changes, exact
    """
    used = [index for index in range(experts) if squared_norms[index] > 0.0]
    if not used:
        return None
    columns = sketches[0].shape[1]
    # products of norm 1, so that squares of small changes do not vanish
    unit = 1.0 / math.sqrt(sum(squared_norms))
    scaled = [sketch * unit for sketch in sketches]
    norms = [squared * unit**2 for squared in squared_norms]
    # [SKETCH, SKETCH] of change s with expert t, without its diagonal
    across = {(s, t): _off_diagonal(scaled[s] @ scaled[t].mT) for s in range(len(sketches)) for t in used}
    # tr(C_s C_t), symmetric up to what was drawn
    products = {(s, t): _mean(across[s, t], across[s, t]) for s in used for t in used}
    own = sum(products[t, t] for t in used)
    whole = sum(products.values())

    def wrong(weights: Sequence[float]) -> float:
        total = 0.0
        for t in used:
            off = -across[t, t]
            for s, weight in enumerate(weights):
                if weight:
                    off.add_(across[s, t], alpha=weight)
            total += _mean(off, off)
        return total / own if own else 0.0

    summed = {t: torch.stack([across[s, t] for s in used]).sum(dim=0) for t in used}
    quadratic = sum(_mean(summed[t], summed[t]) for t in used)
    linear = sum(_mean(summed[t], across[t, t]) for t in used)
    scale = max(linear / quadratic, 0.0) if quadratic else 0.0
    ones = [1.0 if index in used else 0.0 for index in range(len(sketches))]
    return MatrixFindings(
        rows=rows,
        columns=columns,
        peak=len(used) * rows / columns,
        effective_ranks=tuple(
            _rank(norms[t], products[t, t], rows, columns) if t in used else None for t in range(experts)
        ),
        effective_rank=_rank(sum(norms), whole, rows * len(used), columns),
        condition=1.0 + columns / _RIDGE * math.sqrt(whole) / sum(norms),
        overlaps=tuple(_overlap(products, *pair) for pair in pairs(experts)),
        interference_mean=wrong([one / len(used) for one in ones]),
        interference_sum=wrong(ones),
        scale=scale,
        conflict=wrong([scale * one for one in ones]),
        interference_merged=tuple(
            wrong([float(index == number) for index in range(len(sketches))])
            for number in range(experts, len(sketches))
        ),
    )


def _signs(name: str, seed: int, rows: int) -> Tensor:
    key = hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogatepass")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    return torch.randint(0, 2, (SKETCH, rows), generator=generator, dtype=torch.int8).mul_(2).sub_(1)


def _off_diagonal(products: Tensor) -> Tensor:
    return products.fill_diagonal_(0.0)


def _mean(left: Tensor, right: Tensor) -> float:
    return (left * right).sum().item() / (SKETCH * (SKETCH - 1))


def _rank(trace: float, squared: float, rows: int, columns: int) -> float:
    # an estimate may leave the bounds that every matrix keeps
    most = float(min(rows, columns))
    return min(max(trace**2 / squared, 1.0), most) if squared else most


def _overlap(products: dict[tuple[int, int], float], first: int, second: int) -> float | None:
    if (first, second) not in products:
        return None
    both = math.sqrt(products[first, second] * products[second, first])
    whole = math.sqrt(products[first, first] * products[second, second])
    return min(both / whole, 1.0) if whole else None
