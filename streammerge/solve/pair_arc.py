"""The arc between two experts, or their changes from a base: of whole tensors, of each row or of each column."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.solve.geometry import arc, wedge
from streammerge.solve.panels import GramSums, gram_rows, per_row, symmetric

# elements multiplied at a time, for columns
_CHUNK = 1 << 18


class PairLook:
    """Look at the inner products of W_0, D_1 and D_2; the arguments are those of `nuslerp`.

    gram  [3, 3] float64 in host memory or, for columns, [inner, columns, 3, 3] on the device: columns along the first
          dimension, `inner` being the product of those between it and the last
    """

    gram: Tensor

    def __init__(
        self, deltas: Deltas, *, nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False, **others: object
    ) -> None:
        self._name = deltas.name
        self._whole = GramSums(by_row=True)
        self._columns: Tensor | None = None
        if not nuslerp_flatten and nuslerp_row_wise and len(deltas.whole) > 1:
            inner, columns = math.prod(deltas.whole[1:-1]), deltas.whole[-1]
            self._columns = torch.zeros(6, inner, columns, dtype=torch.float64, device=deltas.device)

    def look(self, number: int, deltas: Deltas) -> None:
        vectors = [deltas.base(), *(delta.dense(out=deltas.empty(*deltas.shape)) for delta in deltas)]
        if self._columns is None:
            self._whole.add(vectors)
        else:
            _add_columns_(self._columns, vectors, deltas.first_element // self._columns.shape[2])

    def finish(self, number: int) -> None:
        self.gram = self._whole.finish(self._name) if self._columns is None else symmetric(self._columns)


def along_arc(deltas: Deltas, t: float, grain: str, *, zeros_are_orthogonal: bool) -> Tensor:
    """The point at fraction t of the arc from the first expert to the second, as a change from W_0, [*shape].

    grain  "tensor", "rows" or "columns": what has an angle of its own. All but rows were looked at
    """
    found = _shares(deltas, t, grain, zeros_are_orthogonal)
    of_base, *of_changes = (share.to(deltas.device, deltas.dtype) for share in found)
    merged = deltas.base() * of_base
    for delta, share in zip(deltas, of_changes, strict=True):
        merged.add_(delta.dense().mul_(share))
    return merged


def _shares(deltas: Deltas, t: float, grain: str, zeros_are_orthogonal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of W_0, D_1 and D_2, of shapes that broadcast to the block's."""
    if grain == "rows":
        vectors = [deltas.base(), *(delta.dense(out=deltas.empty(*deltas.shape)) for delta in deltas)]
        gram = symmetric(gram_rows(vectors)).view((*per_row(deltas.shape), 3, 3))
    else:
        gram = deltas.seen.gram
    base, with_second = gram[..., 0, 0], gram[..., 0, 2]
    first, both, second = gram[..., 1, 1], gram[..., 1, 2], gram[..., 2, 2]
    based = torch.full_like(first, deltas.based, dtype=torch.bool)
    # without a base the first expert is W_0, and D_2 the difference
    squares = torch.where(based, first, base), torch.where(based, second, base + 2 * with_second + second)
    product = torch.where(based, both, base + with_second)
    area = torch.where(based, wedge(first, second, both), wedge(base, second, with_second))
    surplus, share = arc(squares, product, area, t, zeros_are_orthogonal=zeros_are_orthogonal)
    of_base, of_first = torch.where(based, 0.0, surplus), torch.where(based, 1 + surplus - share, 0.0)
    if gram.ndim == 4 and grain == "columns":
        return _by_row(of_base, deltas), _by_row(of_first, deltas), _by_row(share, deltas)
    return of_base, of_first, share


def _by_row(each: Tensor, deltas: Deltas) -> Tensor:
    """A factor for each column [inner, columns] as the block's rows see it."""
    inner, columns = each.shape
    if inner == 1:
        return each.view(columns)
    rows = math.prod(deltas.shape[:-1])
    first = deltas.first_element // columns
    places = (torch.arange(rows, device=each.device) + first) % inner
    return each[places].view(deltas.shape)


def _add_columns_(sums: Tensor, vectors: list[Tensor], first: int) -> None:
    """Add rows `first`, … of all pairs to [6, inner, columns]: one row after another, whatever the blocks."""
    _, inner, columns = sums.shape
    matrices = [vector.reshape(-1, columns) for vector in vectors]
    size = max(_CHUNK // columns, 1)
    for start in range(0, len(matrices[0]), size):
        wide = [matrix[start : start + size].double() for matrix in matrices]
        products = torch.stack([wide[i] * wide[j] for i in range(3) for j in range(i + 1)])
        for row in range(products.shape[1]):
            sums[:, (first + start + row) % inner] += products[:, row]
