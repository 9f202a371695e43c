"""The covariance methods' system from deltas in the matrix kernels' working format, float16 of D · 2¹².

One look at the deltas' facts takes the place of a pass over the experts; products run on matrix units, with
the float32 factor split in two halves (see `streammerge_kernels.moment`). Y is anchored at zero in the primal
form and comes out of the Gram itself in the dual one, so nothing is formed twice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.solve.buffers import Buffers
from streammerge.solve.survey import Survey
from streammerge.solve.systems import System
from streammerge.solve.terms import Terms
from streammerge_kernels.delta_pack import SCALE, Packed
from streammerge_kernels.gram import add_gram_, gram_, mirror_
from streammerge_kernels.moment import add_moment_

# what may be lost in packing, relative to an expert's change: float16 keeps 2⁻¹² of each entry, which ridge
# takes over unamplified and the solvers without one multiply by the square root of A's condition number
MOST_LOST = {"ridge": 2.0**-12}
_MOST_LOST_OTHERWISE = 2.0**-15


def packed_survey(deltas: Deltas, solver: str) -> tuple[Packed, Survey] | None:
    """The deltas as packed and what they show; None where they come dense, or would lose too much in packing."""
    packed = deltas.packed()
    if packed is None:
        return None
    squares = packed.column_squares
    facts = torch.stack((squares.sum(1), packed.lost_squares, packed.changed.double(), packed.largest.double()))
    energies, lost, changed, largest = facts.tolist()
    most_lost = MOST_LOST.get(solver, _MOST_LOST_OTHERWISE)
    fits = all(
        biggest * SCALE < torch.finfo(torch.float16).max
        and gone <= most_lost**2 * energy
        and (energy > 0.0 or not count)
        for energy, gone, count, biggest in zip(energies, lost, changed, largest, strict=True)
    )
    if not fits:
        return None
    used = [index for index, energy in enumerate(energies) if energy > 0.0]
    seen = Survey(
        used=used,
        energy=math.fsum(energies),
        energies=[energies[index] for index in used],
        traces=[energies[index] for index in used],
        identical=all(_equal(packed, used[0], other) for other in used[1:]),
        columns=int(torch.count_nonzero(squares.sum(0))),
        scale=SCALE,
    )
    return packed, seen


def packed_primal(
    packed: Packed,
    seen: Survey,
    buffers: Buffers,
    *,
    ridge_lambda: float,
    left: bool | None = None,
    terms: Terms | None = None,
    to_anchor: bool = False,
) -> System:
    """H = A [n, n] and Y = N + λΘ [m, n], in float32 and multiplied by the powers of two of the scale.

    Each moment by the cheaper of D (DᵀD) and (D Dᵀ) D unless `left` says. The mean is the anchor and all
    weights are 1 without `terms`. `to_anchor` makes it Y = N - ΘA.
    """
    terms = terms or Terms(experts=len(seen.used))
    changes = [packed.values[index] for index in seen.used]
    rows, columns = changes[0].shape
    # every moment takes two products, one for each half of its Gram
    left = 5 * rows < 4 * columns if left is None else left
    gram = buffers.take("gram", torch.float32, columns, columns).zero_()
    spare = buffers.take("spare", torch.float32, columns, columns)
    right = buffers.take("right", torch.float32, rows, columns).zero_()
    for number, change in enumerate(changes):
        weight = terms.weight(number)
        if left:
            if weight == 1.0:
                add_gram_(gram, change)
            else:
                gram.add_(gram_(spare, change), alpha=weight)
            across = mirror_(gram_(buffers.take("across", torch.float32, rows, rows), change.mT))
            add_moment_(right, change, across if weight == 1.0 else across.mul_(weight), left=True)
        else:
            mirror_(gram_(spare, change))
            gram.add_(spare if weight == 1.0 else spare.mul_(weight))
            add_moment_(right, change, spare)
    if ridge_lambda:
        for number, change in enumerate(changes):
            right.add_(change, alpha=terms.pull(number, ridge_lambda))
    if left:
        mirror_(gram)
    anchor: Tensor | None = None
    if to_anchor:
        anchor = buffers.take("anchor", torch.float32, rows, columns).zero_()
        for number, change in enumerate(changes):
            anchor.add_(change, alpha=terms.share(number))
        right.addmm_(anchor, gram, alpha=-1.0)
    return System(anchor=anchor, gram=gram, right=right, spare=spare, stack=None, buffers=buffers)


def packed_dual(
    packed: Packed, seen: Survey, buffers: Buffers, *, anchored: bool, keep_gram: bool, terms: Terms | None = None
) -> System:
    """H = S Sᵀ [T·m, T·m] and Y from its blocks: D_t D_tᵀ, less the anchor's Σ a_s D_s D_tᵀ where `anchored`."""
    terms = terms or Terms(experts=len(seen.used))
    values = packed.values if len(seen.used) == len(packed.values) else packed.values[seen.used]
    experts, rows, columns = values.shape
    stack, size = values.reshape(-1, columns), experts * rows
    gram = mirror_(gram_(buffers.take("gram", torch.float32, size, size), stack.mT))
    spare = buffers.take("spare", torch.float32, size, size) if keep_gram else gram
    right = buffers.take("right", torch.float32, rows, size)
    blocks = gram.view(experts, rows, experts, rows)
    for number in range(experts):
        right[:, number * rows : (number + 1) * rows] = blocks[number, :, number]
    anchor: Tensor | None = None
    if anchored:
        anchor = buffers.take("anchor", torch.float32, rows, columns).zero_()
        for number, change in enumerate(values):
            right.sub_(blocks[number].view(rows, size), alpha=terms.share(number))
            anchor.add_(change, alpha=terms.share(number))
    system = System(anchor=anchor, gram=gram, right=right, spare=spare, stack=stack, buffers=buffers)
    return system.weighted_(terms)


def _equal(packed: Packed, first: int, second: int) -> bool:
    # the sums are of the exact changes, so they also tell apart what packing made equal
    return torch.equal(packed.column_squares[first], packed.column_squares[second]) and torch.equal(
        packed.values[first], packed.values[second]
    )
