"""The first look at a matrix's deltas: norms, scale, and whether there is anything to solve."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from streammerge.delta import Delta, Deltas
from streammerge.errors import MergeError, quoted
from streammerge.solve.buffers import Buffers
from streammerge.solve.cost import BLOCK_ROWS, NORM_PANEL
from streammerge.solve.covariances import OWN, Own
from streammerge.solve.objective import SampledRows

# the root mean squares of deltas whose products of three are far from the ends of float32's range
PLAIN = (2.0**-24, 2.0**8)


@dataclass(slots=True, kw_only=True)
class Survey:
    """What one pass over the experts showed.

    used       indices of the experts that changed the matrix; the others count for nothing
    energy     Σ ‖D_t‖², in float64
    energies   ‖D_t‖² of each used expert
    traces     tr(C_t) of each used expert: its energy again, where C_t is its own Gram
    identical  every used expert made the same change
    columns    how many columns some C_t has entries in; in, where that was not asked for
    scale      power of two that brings the deltas' root mean square to [1/2, 1); 1 where that is in `PLAIN` already
    measured_scale  of A, where it is not made of the deltas
    rows       of every expert, what the objective needs; None where that was not asked for
    """

    used: list[int] = field(default_factory=list)
    energy: float = 0.0
    energies: list[float] = field(default_factory=list)
    traces: list[float] = field(default_factory=list)
    identical: bool = True
    columns: int = 0
    scale: float = 1.0
    measured_scale: float | None = None
    rows: SampledRows | None = None

    @property
    def gram_scale(self) -> float:
        """What A is multiplied by."""
        return self.scale**2 if self.measured_scale is None else self.measured_scale

    def scaled_(self, change: Tensor) -> Tensor:
        """Multiply by the scale, in place."""
        return change if self.scale == 1.0 else change.mul_(self.scale)

    def unscaled_(self, change: Tensor) -> Tensor:
        """Divide by the scale, in place."""
        return change if self.scale == 1.0 else change.mul_(1.0 / self.scale)


def survey(
    deltas: Deltas,
    slot: Callable[[int], Tensor],
    buffers: Buffers,
    *,
    count_columns: bool = False,
    covariances: Own = OWN,
    sample_rows: bool = False,
) -> Survey:
    """Look at every expert once.

    slot  gives the [out, in] buffer for the next delta, from how many were used before it;
          slot(0) keeps the first of them

    Norms are summed over panels of fixed size, so they do not depend on how the experts are read.
    Raises MergeError at the first NaN or infinity.
    """
    seen = Survey(columns=deltas.shape[1], rows=SampledRows(deltas) if sample_rows else None)
    largest = torch.zeros(deltas.shape[1], dtype=deltas.dtype, device=deltas.device) if count_columns else None
    for delta in deltas:
        change = delta.dense(out=slot(len(seen.used)))
        squared = squared_norm(change, buffers)
        if not math.isfinite(squared):
            raise _non_finite(deltas, delta, change)
        if squared == 0.0:
            continue
        if seen.used:
            seen.identical = seen.identical and _equal(change, slot(0))
        seen.used.append(delta.index)
        seen.energy += squared
        seen.energies.append(squared)
        if seen.rows:
            seen.rows.add(change)
        factor = covariances.factor(change)
        seen.traces.append(squared if factor is change else squared_norm(factor, buffers))
        if largest is not None:
            torch.maximum(largest, torch.linalg.vector_norm(factor, math.inf, dim=0), out=largest)
    if largest is not None:
        seen.columns = int(torch.count_nonzero(largest))
    if seen.used:
        root_mean_square = math.sqrt(seen.energy / (len(seen.used) * math.prod(deltas.shape)))
        if not PLAIN[0] <= root_mean_square < PLAIN[1]:
            # past 2^126 float32 has no power of two
            seen.scale = 2.0 ** min(-math.frexp(root_mean_square)[1], 126)
    return seen


def squared_norm(change: Tensor, buffers: Buffers) -> float:
    """‖change‖² in float64; not finite where an element is not."""
    flat, total = change.view(-1), 0.0
    wide = buffers.take("norm", torch.float64, NORM_PANEL)
    for start in range(0, len(flat), NORM_PANEL):
        panel = wide[: min(NORM_PANEL, len(flat) - start)].copy_(flat[start : start + NORM_PANEL])
        total += torch.dot(panel, panel).item()
    return total


def _equal(change: Tensor, first: Tensor) -> bool:
    # by blocks, as the first one nearly always tells
    blocks = range(0, len(change), BLOCK_ROWS)
    return all(torch.equal(change[r : r + BLOCK_ROWS], first[r : r + BLOCK_ROWS]) for r in blocks)


def _non_finite(deltas: Deltas, delta: Delta, change: Tensor) -> MergeError:
    bad = (~torch.isfinite(change)).view(-1).nonzero()
    if len(bad) == 0:
        return MergeError(
            f"{quoted(deltas.name)}: the change made by expert {delta.index} is too large to square",
            hint="Look at this expert's weights: its training diverged, or it belongs to another base.",
        )
    first = int(bad[0])
    kind = "NaN" if math.isnan(change.view(-1)[first].item()) else "an infinity"
    whose = "the base" if not math.isfinite(deltas.base().reshape(-1)[first].item()) else f"expert {delta.index}"
    return MergeError(
        f"{quoted(deltas.name)}: {whose} holds {kind} at element {first} (seen in expert {delta.index})",
        hint="The checkpoint is damaged or its training diverged. Fetch it again, or leave it out.",
    )
