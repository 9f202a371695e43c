"""What the relatives of ACTMat cost on one matrix, known before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streammerge.solve.cost import BLOCK_ROWS, NORM_PANEL, PANEL, Cost, by_left_gram, form, normal_equations

# packing buffers of the matrix products, and what is smaller; on an accelerator its libraries' workspaces
_SMALL_BYTES = 8 << 20
_DEVICE_SMALL_BYTES = 96 << 20


def tact(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of TACT."""
    return normal_equations(shape, experts, {"density": 0.5, **parameters}, itemsize)


def swudi(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of SWUDI."""
    return normal_equations(shape, experts, {"anchor": "sum", **parameters, "solver": "flow"}, itemsize)


def aswudi(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of ASWUDI."""
    return normal_equations(shape, experts, {"anchor": "sum", **parameters, "solver": "top_k"}, itemsize)


def regmean(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of RegMean, without the covariances themselves."""
    solved = {"solver": "exact", "ridge": 0.01, **parameters, "measured": True}
    return normal_equations(shape, experts, solved, itemsize)


def wudi(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of WUDI: of its closed form, or of Adam's steps with their moments."""
    rows, columns = shape
    iterations = int(parameters.get("iterations", 0))
    solver = str(parameters.get("solver", "ridge"))
    if not iterations:
        anchor = "sum" if solver == "ridge" else "auto"
        ridge = parameters.get("ridge", 0.1)
        return normal_equations(shape, experts, {"solver": solver, "anchor": anchor, "ridge": ridge}, itemsize)
    # anchor, gradient, target, way and two moments; the Gram and one expert's Gram
    held = (6 * rows * columns + 2 * columns**2 + _panels(rows, columns)) * itemsize + 8 * NORM_PANEL
    return Cost(
        workspace_bytes=held + _SMALL_BYTES,
        flops=_system_flops(rows, columns, experts) + (2 * iterations + 2) * rows * columns**2,
        passes=2,
        device_bytes=held + 4 * rows * columns * itemsize + _DEVICE_SMALL_BYTES,
    )


def ace(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of ACE-Merging, all in float64, with its refinement, which only the norms decide about."""
    rows, columns = shape
    matrix, small = rows * columns, min(shape)
    sizes = {t * rows for t in range(1, experts + 1) if t * rows <= columns}
    # anchor, delta, factor, sum; right-hand side
    forms = [
        5 * matrix + 2 * columns**2,
        *(5 * matrix + size * columns + 2 * size**2 + 2 * rows * size for size in sizes),
    ]
    if form(experts, rows, columns) == "dual":
        forms.pop(0)
    held = 8 * (max(forms) + small**2 + _panels(rows, columns)) + 8 * NORM_PANEL
    lapack = 8 * (2 * small**2 + 8 * small)
    refined = 3 * experts * rows * columns * small + 9 * small**3 + 4 * matrix * small
    return Cost(
        workspace_bytes=held + lapack + _SMALL_BYTES,
        flops=_system_flops(rows, columns, experts) + columns**3 // 3 + 2 * rows * columns**2 + refined,
        passes=2,
        device_bytes=held + 2 * lapack + 8 * (2 * columns**2 + 2 * matrix) + _DEVICE_SMALL_BYTES,
    )


def _system_flops(rows: int, columns: int, experts: int) -> int:
    share = 4 * rows**2 * columns if by_left_gram(rows, columns) else 2 * rows * columns**2
    return experts * rows * columns**2 + (experts - 1) * share


def _panels(rows: int, columns: int) -> int:
    return (2 * max(rows, columns) + BLOCK_ROWS) * (PANEL + BLOCK_ROWS)
