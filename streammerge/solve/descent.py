"""Adam on the covariance methods' loss, by its gradient in closed form."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.solve.buffers import Buffers
from streammerge.solve.survey import survey
from streammerge.solve.systems import primal
from streammerge.solve.terms import Terms, weights_by_norm
from streammerge_kernels.matmul import fast_matmul

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


def descend(deltas: Deltas, *, iterations: int, learning_rate: float) -> Tensor:
    """Take Adam's steps on Σ ‖(Δ - D_t) D_tᵀ‖² / ‖D_t‖² from Δ = Σ D_t; [out, in] in `deltas.dtype`.

    The gradient 2(ΔA - N) is that of the loss in the weights' own units, whatever the system is scaled by.
    Experts without a change are left out. Raises MergeError for a NaN and an infinity.
    """
    rows, columns = deltas.shape
    dtype, buffers = deltas.dtype, Buffers(deltas, deltas.dtype)

    def slot(used: int) -> Tensor:
        return buffers.take("delta" if used else "anchor", dtype, rows, columns)

    seen = survey(deltas, slot, buffers)
    deltas.note(solver="adam" if seen.used else "none", form="primal" if seen.used else "none")
    if not seen.used:
        return slot(0).zero_()
    terms = Terms(experts=len(seen.used), anchor="sum", weights=weights_by_norm(seen.energies, 1.0))
    with fast_matmul() if deltas.device.type == "cpu" else nullcontext():
        # the start is the system's anchor: what moves is the way from there
        system = primal(deltas, seen, dtype, buffers, anchored=True, terms=terms, to_anchor=True)
        target = seen.unscaled_(system.right)
        unit = 2.0 / (seen.gram_scale * seen.energy / len(seen.used))
        way = buffers.take("way", dtype, rows, columns).zero_()
        gradient = buffers.take("delta", dtype, rows, columns)
        first = buffers.take("first", dtype, rows, columns).zero_()
        second = buffers.take("second", dtype, rows, columns).zero_()
        for step in range(1, iterations + 1):
            torch.mm(way, system.gram, out=gradient).sub_(target).mul_(unit)
            first.lerp_(gradient, 1.0 - _BETAS[0])
            second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1.0 - _BETAS[1])
            torch.sqrt(second, out=gradient).div_(math.sqrt(1.0 - _BETAS[1] ** step)).add_(_EPSILON)
            way.addcdiv_(first, gradient, value=-learning_rate / (1.0 - _BETAS[0] ** step))
    assert system.anchor is not None, "the system has no anchor"
    return way.add_(system.anchor, alpha=1.0 / seen.scale)
