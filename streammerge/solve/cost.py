"""What a method costs on one tensor, known before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Form = Literal["primal", "dual"]

EPS32 = 2.0**-23
# rows worked on at a time, width of a Cholesky panel, elements whose squares are summed at a time
BLOCK_ROWS = 256
PANEL = 128
NORM_PANEL = 1 << 18
# blocks of elements begin at multiples of this, so that sums over panels do not depend on the cut
PANEL_ELEMENTS = 1 << 13
# packing buffers of the matrix products, and what is smaller
_SMALL_BYTES = 8 << 20
# workspaces of cuBLAS and cuSOLVER, partial sums
_DEVICE_SMALL_BYTES = 96 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Price of one step: workspace beyond the tensors being read, arithmetic, passes over the experts.

    passes        of an element-wise method: one, and those that its look at the whole tensor takes
    device_bytes  the same workspace on an accelerator, what its libraries take included; None where the
                  method does there what it does on the CPU
    look_scope    whether a look sees one tensor, or all tensors of the model before the first is merged
    """

    workspace_bytes: int
    flops: int
    passes: int
    device_bytes: int | None = None
    look_scope: Literal["tensor", "model"] = "tensor"


def elementwise(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """One multiply-add per element and expert, in blocks that the stream bounds by itself."""
    rows, columns = shape
    return Cost(workspace_bytes=0, flops=2 * experts * rows * columns, passes=1)


def form(experts: int, rows: int, columns: int) -> Form:
    """Which of the two systems is regular, and the smaller: [in, in], or [experts * out, experts * out]."""
    return "dual" if experts * rows <= columns else "primal"


def by_left_gram(rows: int, columns: int) -> bool:
    """Whether (E Dᵀ) D, 4·out²·in operations, is cheaper than E (DᵀD), 2·out·in² beyond A's own share."""
    return 2 * rows < columns


def may_escalate(solver: str, ridge: float, columns: int, itemsize: int) -> bool:
    """Whether float32 may turn out too narrow, so that float64 buffers have to be planned for.

    With λ = ridge·tr(A)/in the condition number is at most 1 + in/ridge; from ridge = 8·in·eps32 up,
    rounding in the Gram and in its factor cannot make the system look indefinite.
    """
    if itemsize == 8 or solver == "pinv":
        return False
    return solver == "exact" or ridge < 8 * columns * EPS32


def normal_equations(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of `solve.normal_equations`: the most over how many experts may turn out to have changed."""
    rows, columns = shape
    solver, ridge = str(parameters.get("solver", "ridge")), float(parameters.get("ridge", 0.1))
    one_pass = form(experts, rows, columns) == "dual" and solver != "exact"
    sizes = {experts * rows} if one_pass else {t * rows for t in range(1, experts + 1) if t * rows <= columns}
    elements = max(_dual_elements(rows, columns, size, solver, one_pass) for size in sizes | {rows})
    if not one_pass:
        elements = max(elements, _primal_elements(rows, columns))
    widest = 8 if may_escalate(solver, ridge, columns, itemsize) else itemsize
    largest = columns if not one_pass else experts * rows
    # the spectrum is taken in float64: its work, and for pinv the other half of the buffer it lies in
    lapack = 0 if solver == "ridge" else (2 * largest**2 + 6 * largest + 1) * 8
    lapack += largest**2 * (8 - itemsize) if solver == "pinv" else 0
    panels = (2 * max(rows, columns, largest) + BLOCK_ROWS) * (PANEL + BLOCK_ROWS)
    return Cost(
        workspace_bytes=(elements + panels) * widest + 8 * NORM_PANEL + lapack + _SMALL_BYTES,
        flops=_flops(rows, columns, experts, solver),
        passes=1 if one_pass else 2,
        device_bytes=_device_bytes(rows, columns, experts, solver, widest, one_pass),
    )


def _device_bytes(rows: int, columns: int, experts: int, solver: str, widest: int, one_pass: bool) -> int:
    """The most of the two forms: what the solver holds, and copies that torch's libraries make of it."""
    matrix, packed = rows * columns, 2 * experts * rows * columns
    primal = 0 if one_pass else widest * (4 * columns**2 + 5 * matrix) + 4 * max(rows, columns) ** 2
    size = min(experts * rows, columns)
    dual = widest * (4 * size**2 + 2 * rows * size + 3 * matrix) + 4 * rows * size
    # float64 has no working format: the deltas are stacked as they are
    dual += 8 * size * columns if widest == 8 else 0
    spectrum = 0 if solver == "ridge" else 32 * (size if one_pass else columns) ** 2
    return max(primal, dual) + packed + spectrum + _DEVICE_SMALL_BYTES


def _primal_elements(rows: int, columns: int) -> int:
    # anchor, delta, right-hand side; the Gram and one expert's Gram, later the factor
    return 3 * rows * columns + 2 * columns**2


def _dual_elements(rows: int, columns: int, size: int, solver: str, one_pass: bool) -> int:
    # anchor, stacked deltas, Gram, right-hand side; the delta surveyed before or the spectral product;
    # a copy of the Gram where it is needed again
    spectral = solver != "ridge"
    spare = 0 if one_pass and not spectral else rows * (size if one_pass else columns)
    return rows * columns + size * columns + size**2 * (1 + spectral) + rows * size + spare


def _flops(rows: int, columns: int, experts: int, solver: str) -> int:
    stacked = experts * rows
    if form(experts, rows, columns) == "dual":
        size = stacked
        gram = stacked**2 * columns + 2 * rows * stacked * columns
        spread = 2 * rows * stacked * columns
    else:
        size = columns
        left = by_left_gram(rows, columns)
        share = 4 * rows**2 * columns if left else 2 * rows * columns**2
        # the expert that is the anchor needs no product
        gram = stacked * columns**2 + (experts if solver == "pinv" else experts - 1) * share
        spread = 0
    factor = 9 * size**3 if solver == "pinv" else size**3 // 3
    solve = (4 if solver == "pinv" else 2) * rows * size**2
    return gram + factor + solve + spread
