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
# of an element-wise block: merged, delta, base, and three temporaries of torch's own
BLOCK_BUFFERS = 6
# packing buffers of the matrix products, and what is smaller
_SMALL_BYTES = 8 << 20
# workspaces of cuBLAS and cuSOLVER, partial sums
_DEVICE_SMALL_BYTES = 96 << 20
# solvers that take the spectrum, in float64 whatever the dtype
SPECTRAL = ("pinv", "top_k", "flow")
# integers that a search for the largest entries works with, on an accelerator for more entries at a time
_SEARCH_BYTES = 16 << 20
_DEVICE_SEARCHED = 1 << 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Price of one step: workspace beyond the tensors being read, arithmetic, passes over the experts.

    passes        that the merge takes: more than one for methods by matrix only
    looks         that the method's look takes before
    device_bytes  the same workspace on an accelerator, what its libraries take included; None where the
                  method does there what it does on the CPU
    kept_bytes    what a look keeps of each expert's element for the merge, of tensors that are held meanwhile
    block_buffers how many buffers of a block's size a method by element or row holds at once
    look_scope    whether a look sees one tensor, or all tensors of the model before the first is merged, as it
                  does for methods by matrix
    """

    workspace_bytes: int
    flops: int
    passes: int
    looks: int = 0
    device_bytes: int | None = None
    look_scope: Literal["tensor", "model"] = "tensor"
    block_buffers: int = BLOCK_BUFFERS
    kept_bytes: int = 0


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
    if itemsize == 8 or solver in SPECTRAL:
        return False
    return solver == "exact" or ridge < 8 * columns * EPS32


@dataclass(frozen=True, slots=True, kw_only=True)
class _System:
    """What a price depends on, beside the shape."""

    solver: str
    ridge: float
    anchored: bool
    to_anchor: bool
    shaped: bool
    trimmed: bool
    measured: bool

    @property
    def spectral(self) -> bool:
        return self.solver in SPECTRAL


def _system(parameters: Mapping[str, Any]) -> _System:
    solver, anchor = str(parameters.get("solver", "ridge")), str(parameters.get("anchor", "auto"))
    trimmed, measured = float(parameters.get("density", 1.0)) < 1.0, bool(parameters.get("measured"))
    shaped = trimmed or bool(parameters.get("center", False))
    to_anchor = solver in SPECTRAL or (solver == "exact" and (shaped or measured))
    from_base = anchor == "base" or (anchor == "auto" and solver == "pinv")
    return _System(
        solver=solver,
        ridge=float(parameters.get("ridge", 0.1)),
        anchored=not (to_anchor and from_base),
        to_anchor=to_anchor and not from_base,
        shaped=shaped,
        trimmed=trimmed,
        measured=measured,
    )


def normal_equations(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of `solve.normal_equations`: the most over how many experts may turn out to have changed.

    The parameters are its own; `measured` says that the covariances come from outside.
    """
    rows, columns = shape
    system = _system(parameters)
    solver = system.solver
    primal_alone = system.measured or form(experts, rows, columns) == "primal"
    one_pass = not primal_alone and solver != "exact" and not system.shaped
    sizes = {experts * rows} if one_pass else {t * rows for t in range(1, experts + 1) if t * rows <= columns}
    if system.measured:
        sizes = set()
    elements = max((_dual_elements(rows, columns, size, system, one_pass) for size in sizes), default=0)
    if not one_pass:
        elements = max(elements, _primal_elements(rows, columns, system))
    widest = 8 if may_escalate(solver, system.ridge, columns, itemsize) else itemsize
    largest = columns if not one_pass else experts * rows
    # the spectrum is taken in float64: its work, and where it is the solver the other half of the buffer it lies in
    lapack = 0 if solver == "ridge" else (2 * largest**2 + 6 * largest + 1) * 8
    lapack += largest**2 * (8 - itemsize) if system.spectral else 0
    panels = (2 * max(rows, columns, largest) + BLOCK_ROWS) * (PANEL + BLOCK_ROWS)
    small = _SMALL_BYTES + (_SEARCH_BYTES if system.trimmed else 0)
    return Cost(
        workspace_bytes=(elements + panels) * widest + 8 * NORM_PANEL + lapack + small,
        flops=_flops(rows, columns, experts, system),
        passes=1 if one_pass else 2,
        device_bytes=_device_bytes(rows, columns, experts, system, widest, one_pass),
    )


def _device_bytes(rows: int, columns: int, experts: int, system: _System, widest: int, one_pass: bool) -> int:
    """The most of the two forms: what the solver holds, and copies that torch's libraries make of it."""
    matrix, packed = rows * columns, 2 * experts * rows * columns
    primal = 0 if one_pass else widest * (4 * columns**2 + 5 * matrix) + 4 * max(rows, columns) ** 2
    size = min(experts * rows, columns)
    dual = widest * (4 * size**2 + 2 * rows * size + 3 * matrix) + 4 * rows * size
    # float64 has no working format, nor have factors other than the deltas: they are stacked as they are
    dual += widest * size * columns if widest == 8 or system.shaped else 0
    spectrum = 0 if system.solver == "ridge" else 32 * (size if one_pass else columns) ** 2
    further = widest * matrix * (system.to_anchor + system.shaped)
    search = 20 * min(matrix, _DEVICE_SEARCHED) if system.trimmed else 0
    return max(primal, dual) + packed + spectrum + further + search + _DEVICE_SMALL_BYTES


def _primal_elements(rows: int, columns: int, system: _System) -> int:
    # anchor, delta, right-hand side; the way to another anchor, what a covariance is made of in place of
    # the delta; the Gram and one expert's Gram, later the factor, in whose place the way may lie
    in_its_place = by_left_gram(rows, columns) and not system.measured
    moved = (system.to_anchor or system.solver == "ridge") and not in_its_place
    return (3 + moved + system.shaped) * rows * columns + 2 * columns**2


def _dual_elements(rows: int, columns: int, size: int, system: _System, one_pass: bool) -> int:
    # anchor, stacked deltas, Gram, right-hand side; the delta surveyed before or the spectral product;
    # a copy of the Gram where it is needed again
    if system.shaped:
        return 3 * rows * columns + size * columns + 2 * size**2 + rows * size
    spectral = system.solver != "ridge"
    spare = 0 if one_pass and not spectral else rows * (size if one_pass else columns)
    return rows * columns + size * columns + size**2 * (1 + spectral) + rows * size + spare


def _flops(rows: int, columns: int, experts: int, system: _System) -> int:
    stacked = experts * rows
    if form(experts, rows, columns) == "dual" and not system.measured:
        size = stacked
        gram = stacked**2 * columns + 2 * rows * stacked * columns
        spread = 2 * rows * stacked * columns
    else:
        size = columns
        left = by_left_gram(rows, columns) and not system.measured
        share = 4 * rows**2 * columns if left else 2 * rows * columns**2
        # the expert that is the anchor needs no product
        gram = (0 if system.measured else stacked * columns**2) + (experts - system.anchored) * share
        spread = 2 * rows * columns**2 * system.to_anchor
    factor = 9 * size**3 if system.spectral else size**3 // 3
    solve = (4 if system.spectral else 2) * rows * size**2
    return gram + factor + solve + spread
