"""What methods by norms, angles and counts of whole tensors cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streammerge.solve.cost import BLOCK_BUFFERS, Cost

_Parameters = Mapping[str, Any]


def weight_gram(shape: tuple[int, int], experts: int, parameters: _Parameters, itemsize: int) -> Cost:
    """One look at the inner products of the base and all changes."""
    return _looks(shape, experts, 1, _gram_flops(experts + 1))


def model_stock(shape: tuple[int, int], experts: int, parameters: _Parameters, itemsize: int) -> Cost:
    """A look at the changes' inner products; those of rows are known from a block."""
    return _looks(shape, experts, 0 if parameters.get("filter_wise", False) else 1, _gram_flops(experts))


def nuslerp(shape: tuple[int, int], experts: int, parameters: _Parameters, itemsize: int) -> Cost:
    """A look at the inner products, of the tensor or of its columns; those of rows are known from a block."""
    by_rows = not parameters.get("nuslerp_flatten", True) and not parameters.get("nuslerp_row_wise", False)
    return _looks(shape, experts, 0 if by_rows else 1, _gram_flops(experts + 1))


def norms(shape: tuple[int, int], experts: int, parameters: _Parameters, itemsize: int) -> Cost:
    """A look at the changes' norms, unless their power is 0."""
    return _looks(shape, experts, 1 if parameters.get("k", 1.0) else 0, 2 * experts)


def sce(shape: tuple[int, int], experts: int, parameters: _Parameters, itemsize: int) -> Cost:
    """A look at the changes' norms; with a selection two more before it, which find where it ends."""
    selects = parameters.get("select_topk", 1.0) < 1.0
    return _looks(shape, experts, 3 if selects else 1, 14 * experts if selects else 6 * experts)


def counts(shape: tuple[int, int], experts: int, parameters: _Parameters, itemsize: int) -> Cost:
    """A look that counts which entries changed."""
    return _looks(shape, experts, 1, 4 * experts)


def quartiles(shape: tuple[int, int], experts: int, parameters: _Parameters, itemsize: int) -> Cost:
    """Two looks that find three order statistics of a score that takes some forty operations."""
    return _looks(shape, experts, 2, 120)


def _gram_flops(vectors: int) -> int:
    return vectors * (vectors + 1)


def _looks(shape: tuple[int, int], experts: int, looks: int, flops: int) -> Cost:
    """`flops` for each element in all looks, and the weighted sum that follows."""
    elements = shape[0] * shape[1]
    return Cost(
        workspace_bytes=0,
        flops=(flops + 2 * experts) * elements,
        passes=1,
        looks=looks,
        block_buffers=max(BLOCK_BUFFERS, experts + 4),
    )
