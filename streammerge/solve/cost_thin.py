"""What the low-rank form of a covariance method costs, and whether the method's settings have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streammerge.solve.cost import Cost

# rows of the change that are formed at a time, beginning at multiples of it
THIN_ROWS = 128
# LAPACK's workspaces, and what is smaller
_SMALL_BYTES = 4 << 20


def thin_cost(
    shape: tuple[int, int], ranks: Sequence[int], parameters: Mapping[str, Any], itemsize: int
) -> Cost | None:
    """Price of `solve.thin` for one [out, in] matrix; None where the dense form is what there is, or is smaller.

    ranks  of each expert's change; 0 where it changed nothing

    The workspace is what allocators give: factors in float64 are decomposed by LAPACK, which takes copies.
    """
    rows, columns = shape
    total = sum(min(rank, rows) for rank in ranks)
    if total >= columns or not has_thin_form(parameters):
        return None
    # the result in the arithmetic's dtype, and the rows being formed
    out = ((rows + columns) * total + max(shape) * THIN_ROWS) * itemsize
    flops = (
        4 * rows * sum(rank**2 for rank in ranks) + 8 * columns * total**2 + 30 * total**3 + 2 * rows * columns * total
    )
    return Cost(workspace_bytes=factors_bytes(shape, ranks) + out, flops=flops, passes=1)


def factors_bytes(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """What merging factors takes up to the merged ones."""
    rows, columns = shape
    total, widest = sum(ranks), max(ranks, default=0)
    # as given; the orthonormal factors of both sides, and of one what LAPACK and a transposition copy; what shortens
    elements = (2 * rows + 5 * columns) * total + 3 * (rows + columns) * widest + 12 * total**2
    return elements * 8 + _SMALL_BYTES


def has_thin_form(parameters: Mapping[str, Any]) -> bool:
    """Whether a method that merges factors does so with these settings."""
    # a pool's matrices share what they read, not their factors; a descent has no closed form
    return parameters.get("pool", "none") == "none" and not parameters.get("iterations")
