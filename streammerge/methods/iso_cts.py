"""Iso-CTS: a flat spectrum over common and task-specific directions. https://arxiv.org/abs/2502.04959"""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method
from streammerge.solve.buffers import Buffers
from streammerge.solve.cost import EPS32
from streammerge.solve.cost_spectral import shared_directions
from streammerge.solve.polar import polar_product, truncated


@merge_method(
    paper="arXiv:2502.04959",
    needs_base=True,
    streams_by="matrix",
    cost="streammerge.solve.cost_spectral:iso_cts",
    ranges={"common_space_fraction": "[0, 1]"},
)
def iso_cts(deltas: Deltas, *, common_space_fraction: float = 0.8, lambda_: float = 1.0) -> Tensor:
    """Join the sum's leading directions and each expert's own, at equal strength.

    common_space_fraction  share of the directions that the experts' sum gives;
                           each expert gives an equal part of the others
    lambda                 factor of the merged change

    Of r = min(out, in) directions T experts give q = round((r - int(r·fraction)) / T) each, halves to even,
    and the sum Σ D_t the c = r - T·q largest of its own. An expert's own are the largest of
    D_t - U_c U_cᵀ D_t, U_c the sum's left directions. All side by side make U, σ and V;
    Δ = λ · mean(σ) · polar(U) · polar(V)ᵀ. Where q = 0 this is Iso-C.
    Different from the paper's code: q is at most r // T, as more would leave a negative c; directions that
    do not exist are left out of U and V, as in Iso-C, and count as zeros in mean(σ), which is over r;
    the arithmetic is float64.

    Returns the merged delta, [out, in] in the stream's dtype.
    """
    rows, columns = deltas.shape
    size = min(rows, columns)
    common, own = shared_directions(size, deltas.experts, common_space_fraction)
    buffers = Buffers(deltas, torch.float64)
    change = buffers.take("change", torch.float64, rows, columns).zero_()
    for delta in deltas:
        change.add_(delta.dense())
    left = buffers.take("left", torch.float64, size, rows)
    right = buffers.take("right", torch.float64, size, columns)
    values = [truncated(change, left[:common], right[:common], buffers)]
    count = shared = len(values[0])
    for delta in deltas if own else ():
        delta.dense(out=change)
        norm = torch.linalg.vector_norm(change).item()
        along = torch.mm(left[:shared], change, out=buffers.take("spread", torch.float64, shared, columns))
        change.addmm_(left[:shared].mT, along, alpha=-1)
        part = slice(count, count + own)
        # what is left of an expert within the common directions is rounding
        values.append(truncated(change, left[part], right[part], buffers, floor=EPS32 * norm))
        count += len(values[-1])
    deltas.note(directions=count)
    if count == 0:
        return deltas.zeros(rows, columns)
    strength = torch.cat(values).sum() * (lambda_ / size)
    merged = polar_product(left[:count], strength.expand(count), right[:count], change, buffers)
    return deltas.empty(rows, columns).copy_(merged)
