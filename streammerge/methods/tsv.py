"""TSV-Merge: stack the experts' leading singular directions, made orthogonal. https://arxiv.org/abs/2412.00081"""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method
from streammerge.solve.buffers import Buffers
from streammerge.solve.polar import polar_product, truncated


@merge_method(
    paper="arXiv:2412.00081",
    needs_base=True,
    streams_by="matrix",
    cost="streammerge.solve.cost_spectral:tsv",
)
def tsv(deltas: Deltas, *, lambda_: float = 1.0) -> Tensor:
    """Add the experts' leading singular directions, made orthogonal to each other.

    lambda  factor of the merged change

    Of each D_t = U_t Σ_t V_tᵀ the k = r // T largest directions are kept, r = min(out, in), T the
    number of experts; side by side they make U, σ and V, and Δ = λ · polar(U) · diag(σ) · polar(V)ᵀ with
    polar(X) = P Qᵀ for X = P S Qᵀ. The paper tunes λ on held-out data; 1 is its data-free value.
    Different from its code: directions that do not exist (an expert that changed nothing or at low rank,
    several equal experts) are left out, where an SVD would add arbitrary ones; singular values up to
    √max(out, in)·2⁻²³ of the largest count as zero; the arithmetic is float64. As there, k is r // T
    also where experts changed nothing, and more experts than r give no change at all.

    One expert comes back exactly. Returns the merged delta, [out, in] in the stream's dtype.
    """
    rows, columns = deltas.shape
    if deltas.experts == 1:
        (only,) = deltas
        return only.dense(out=deltas.empty(rows, columns)).mul_(lambda_)
    most = min(rows, columns) // deltas.experts
    buffers = Buffers(deltas, torch.float64)
    change = buffers.take("change", torch.float64, rows, columns)
    left = buffers.take("left", torch.float64, most * deltas.experts, rows)
    right = buffers.take("right", torch.float64, most * deltas.experts, columns)
    values: list[Tensor] = []
    count = 0
    for delta in deltas if most else ():
        delta.dense(out=change)
        values.append(truncated(change, left[count : count + most], right[count : count + most], buffers))
        count += len(values[-1])
    deltas.note(directions=count)
    if count == 0:
        return deltas.zeros(rows, columns)
    merged = polar_product(left[:count], torch.cat(values), right[:count], change, buffers)
    return deltas.empty(rows, columns).copy_(merged.mul_(lambda_))
