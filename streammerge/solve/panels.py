"""Sums of products over a whole tensor that come out the same however it was cut, on any device and any threads.

Products and sums are float64. A panel, or a row, is summed by adding its second half to its first until one number
is left, which are plain element-wise additions and therefore the same everywhere; the panels' sums are then added
exactly and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.errors import MergeError, quoted
from streammerge.solve.cost import PANEL_ELEMENTS as PANEL

# elements multiplied at a time: the float64 temporaries then stay in a CPU's cache; a GPU wants few launches
_CHUNK = 1 << 17
_DEVICE_CHUNK = 1 << 24
_NARROW = 256


def panel_sums(left: Tensor, right: Tensor) -> Tensor:
    """Σ left · right over each panel of PANEL elements of a tensor, of which a block is shown.

    left, right  [*shape] float32 or float64, read in row-major order; they may be the same tensor. The block
                 begins at a multiple of PANEL in the flattened tensor and ends at one, or with the tensor

    Returns [panels] float64, on the device. Add them up with `total`.
    """
    return _over_panels([left, right], 1, _product)[0]


def row_sums(left: Tensor, right: Tensor) -> Tensor:
    """Σ left · right over each row: [rows, columns] -> [rows] float64. Fewer dimensions are one row."""
    return _over_rows([left, right], 1, _product)[0]


def panel_magnitudes(values: Tensor) -> Tensor:
    """Σ |values| over each panel, as `panel_sums` cuts them: [panels] float64."""
    return _over_panels([values], 1, _magnitude)[0]


def row_magnitudes(values: Tensor) -> Tensor:
    """Σ |values| over each row: [rows, columns] -> [rows] float64. Fewer dimensions are one row."""
    return _over_rows([values], 1, _magnitude)[0]


def gram_panels(vectors: Sequence[Tensor]) -> Tensor:
    """The panel sums of all pairs: [pairs, panels], in the order (0, 0), (1, 0), (1, 1), (2, 0), …"""
    return _over_panels(vectors, _pairs(len(vectors)), _all_products)


def gram_rows(vectors: Sequence[Tensor]) -> Tensor:
    """The row sums of all pairs: [pairs, rows], pairs ordered as by `gram_panels`."""
    return _over_rows(vectors, _pairs(len(vectors)), _all_products)


def total(sums: Sequence[Tensor | list[float]], name: str) -> float:
    """The sum of the panel or row sums of all blocks, exactly rounded.

    Raises MergeError, naming the tensor `name`, where one of them is not finite: products overflow float64.
    """
    parts = [part for block in sums for part in (block if isinstance(block, list) else block.tolist())]
    if not all(map(math.isfinite, parts)):
        raise MergeError(
            f"{quoted(name)}: a weight or a change is too large to square",
            hint="Look at the experts' weights: a training diverged, or one belongs to another base.",
        )
    return math.fsum(parts)


class GramSums:
    """Inner products of vectors that are shown block by block.

    by_row  blocks are whole rows, beginning anywhere; else they begin at multiples of PANEL
    """

    def __init__(self, *, by_row: bool = False) -> None:
        self._by_row = by_row
        self._sums: list[Tensor] = []

    def add(self, vectors: Sequence[Tensor]) -> None:
        """Add one block of each vector."""
        self._sums.append((gram_rows if self._by_row else gram_panels)(vectors))

    def finish(self, name: str) -> Tensor:
        """The Gram matrix [n, n], float64 in host memory; the tensor's name is for messages, see `total`."""
        pairs = [total([block[pair] for block in self._sums], name) for pair in range(len(self._sums[0]))]
        return symmetric(torch.tensor(pairs, dtype=torch.float64))


def symmetric(pairs: Tensor) -> Tensor:
    """The Gram matrices [..., n, n] of pairs [pairs, ...], ordered as by `gram_panels`."""
    count = (math.isqrt(8 * len(pairs) + 1) - 1) // 2
    rows = [[pairs[_place(i, j)] for j in range(count)] for i in range(count)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def per_row(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that one number for each row of `shape` has beside it."""
    return (*shape[:-1], 1) if shape else ()


def stacked_changes(deltas: Deltas) -> Tensor:
    """All experts' changes of a block at once: [T, *shape] in the stream's dtype."""
    changes = deltas.empty(deltas.experts, *deltas.shape)
    for delta in deltas:
        delta.dense(out=changes[delta.index])
    return changes


Terms = Callable[[Sequence[Tensor]], Iterator[Tensor]]
"""What is summed of vectors [rows, width] float64, which it may overwrite: terms of that shape, one at a time."""


def _product(vectors: Sequence[Tensor]) -> Iterator[Tensor]:
    left, right = vectors
    yield left.mul_(right)


def _magnitude(vectors: Sequence[Tensor]) -> Iterator[Tensor]:
    yield vectors[0].abs_()


def _all_products(vectors: Sequence[Tensor]) -> Iterator[Tensor]:
    for i, left in enumerate(vectors):
        for right in vectors[: i + 1]:
            yield left * right


def _over_panels(vectors: Sequence[Tensor], sums: int, terms: Terms) -> Tensor:
    """Sums over panels of each of the `sums` terms: [sums, panels]."""
    flat = [vector.reshape(-1) for vector in vectors]
    elements, device = flat[0].numel(), flat[0].device
    whole = elements // PANEL
    found = torch.empty(sums, -(-elements // PANEL), dtype=torch.float64, device=device)
    for panels in _chunks(whole, PANEL, device):
        part = slice(panels.start * PANEL, panels.stop * PANEL)
        _fold_terms([vector[part].view(-1, PANEL) for vector in flat], terms, found[:, panels])
    if elements > whole * PANEL:
        _fold_terms([vector[whole * PANEL :].view(1, -1) for vector in flat], terms, found[:, whole:])
    return found


def _over_rows(vectors: Sequence[Tensor], sums: int, terms: Terms) -> Tensor:
    """Sums over rows of each of the `sums` terms: [sums, rows]."""
    shape = vectors[0].shape
    rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
    matrices = [vector.reshape(rows, columns) for vector in vectors]
    found = torch.empty(sums, rows, dtype=torch.float64, device=matrices[0].device)
    for part in _chunks(rows, columns, found.device):
        _fold_terms([matrix[part] for matrix in matrices], terms, found[:, part])
    return found


def _fold_terms(vectors: Sequence[Tensor], terms: Terms, out: Tensor) -> None:
    """Sum each term along the rows of [rows, width] into [terms, rows]."""
    for number, term in enumerate(terms([vector.to(torch.float64, copy=True) for vector in vectors])):
        out[number] = _fold_(term)


def _fold_(products: Tensor) -> Tensor:
    width = products.shape[1]
    if width == 0:
        return products.new_zeros(len(products))
    while width > 1:
        if width <= _NARROW < products.shape[1]:
            # short rows of long strides are slow; as columns the same additions run along memory
            return _fold_columns_(products[:, :width].T.contiguous())
        kept = (width + 1) // 2
        products[:, : width - kept] += products[:, kept:width]
        width = kept
    return products[:, 0]


def _fold_columns_(products: Tensor) -> Tensor:
    width = len(products)
    while width > 1:
        kept = (width + 1) // 2
        products[: width - kept] += products[kept:width]
        width = kept
    return products[0]


def _chunks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    size = max((_CHUNK if device.type == "cpu" else _DEVICE_CHUNK) // max(columns, 1), 1)
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def _pairs(count: int) -> int:
    return count * (count + 1) // 2


def _place(i: int, j: int) -> int:
    low, high = sorted((i, j))
    return _pairs(high) + low
