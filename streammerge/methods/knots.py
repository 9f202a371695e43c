"""KnOTS: merge the changes in the basis of directions that they share. https://arxiv.org/abs/2410.19735"""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge.delta import Deltas, MethodName, Settings
from streammerge.methods import merge_method
from streammerge.methods.inner import inner
from streammerge.solve.buffers import Buffers
from streammerge.solve.inner_deltas import PartDeltas
from streammerge.solve.polar import eigen_, kept, relative_cut


@merge_method(
    paper="arXiv:2410.19735",
    needs_base=True,
    streams_by="matrix",
    cost="streammerge.methods.inner:knots_cost",
)
def knots(deltas: Deltas, *, rule: MethodName = "ties", rule_parameters: Settings = None) -> Tensor:
    """Merge the changes by any rule, in the basis of their shared directions.

    rule             the method that merges the parts: any that needs no data beside the experts
    rule_parameters  that method's parameters, as a mapping

    [D_1 … D_T] = U Σ [V_1ᵀ … V_Tᵀ]; each part P_t = Σ V_tᵀ = Uᵀ D_t, [rank, in], stands for its expert, the
    rule merges the parts to P, and Δ = U P. Rules that are linear, or that turn with the outputs, give
    what they give by themselves, up to constants that count directions.
    Different from the paper's code: singular values count as zero up to √max(out, T·in)·2⁻²³ of the
    largest, not up to 1e-5; each direction points where its largest element is positive; a rule that trims
    does so tensor by tensor; nothing beside these matrices is special. Where singular values are equal the
    basis is not unique, and neither is what a rule makes of single elements.

    Returns the merged delta, [out, in] in the stream's dtype.
    """
    within = inner("knots", {"rule": rule, "rule_parameters": rule_parameters})
    rows, columns = deltas.shape
    buffers = Buffers(deltas, torch.float64)
    change = buffers.take("change", torch.float64, rows, columns)
    total = buffers.take("gram", torch.float64, rows, rows).zero_()
    for delta in deltas:
        total.addmm_(delta.dense(out=change), change.mT)
    values, vectors = eigen_(total)
    _, rank = kept(values, relative_cut(rows, deltas.experts * columns))
    rank = min(rank, deltas.experts * columns)
    deltas.note(rank=rank)
    if rank == 0:
        return deltas.zeros(rows, columns)
    # largest first
    order = torch.arange(rows - 1, rows - 1 - rank, -1, device=vectors.device)
    basis = torch.index_select(vectors, 0, order, out=buffers.take("basis", torch.float64, rank, rows))
    peaks = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    basis.mul_(peaks.sign())
    product = buffers.take("product", torch.float64, rank, columns)
    parts = []
    for delta in deltas:
        torch.mm(basis, delta.dense(out=change), out=product)
        parts.append(deltas.empty(rank, columns).copy_(product))
    stream = PartDeltas(deltas, parts, deltas.zeros(rank, columns))
    merged = product.copy_(within.merge(stream))
    deltas.note(**stream.facts)
    return deltas.empty(rows, columns).copy_(torch.mm(basis.mT, merged, out=change))
