"""Singular value calibration: weaken directions that several experts share. https://arxiv.org/abs/2602.05536"""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge.delta import Deltas, MethodName, Settings
from streammerge.methods import merge_method
from streammerge.methods.inner import inner
from streammerge.solve.buffers import Buffers
from streammerge.solve.polar import relative_cut, truncated


@merge_method(
    paper="arXiv:2602.05536",
    needs_base=True,
    streams_by="matrix",
    cost="streammerge.methods.inner:svc_cost",
    ranges={"alpha": "(0, inf)"},
)
def svc(deltas: Deltas, *, rule: MethodName = "ties", rule_parameters: Settings = None, alpha: float = 1.0) -> Tensor:
    """Merge by any rule, then calibrate the strength of each direction.

    rule             the method that merges first: any that needs no data beside the experts
    rule_parameters  that method's parameters, as a mapping
    alpha            least projection counted for an expert; the paper's code has 1, and
                     0.1 to 0.2 after averages, task arithmetic, TIES and Iso

    Δ = U Σ Vᵀ is what the rule gives. For each left direction u_r with a_t = u_rᵀD_t and a = u_rᵀΔ the
    projection is s_t = ⟨a, a_t⟩/‖a_t‖², and σ_r becomes σ_r · T / Σ_t max(α, s_t): where several experts
    push the same way, Δ holds that direction several times and is brought back.
    Different from the paper's code: experts that changed nothing do not count, nor in T; s_t is 0 where
    ‖a_t‖ is at most 2⁻²³ of ‖D_t‖, in place of a floor of 1e-12 under ‖a_t‖². Where singular values are
    equal the directions are not unique, and neither is the result.

    Returns the merged delta, [out, in] in the stream's dtype.
    """
    rows, columns = deltas.shape
    size = min(rows, columns)
    buffers = Buffers(deltas, torch.float64)
    merged = buffers.take("merged", torch.float64, rows, columns)
    merged.copy_(inner("svc", {"rule": rule, "rule_parameters": rule_parameters}).merge(deltas))
    left = buffers.take("left", torch.float64, size, rows)
    along = buffers.take("along", torch.float64, size, columns)
    rank = len(truncated(merged, left, along, buffers))
    deltas.note(rank=rank)
    if rank:
        left, along = left[:rank], torch.mm(left[:rank], merged, out=along[:rank])
        strengths = _strengths(deltas, left, along, alpha, buffers)
        merged.addmm_(left.mT, along.mul_(strengths.sub_(1.0)[:, None]))
    return deltas.empty(rows, columns).copy_(merged)


def _strengths(deltas: Deltas, left: Tensor, along: Tensor, alpha: float, buffers: Buffers) -> Tensor:
    """T / Σ max(α, s_t) for each direction [k], of left directions [k, m] and the merged delta along them [k, n]."""
    change = buffers.take("change", torch.float64, *deltas.shape)
    own = buffers.take("own", torch.float64, *along.shape)
    total = along.new_zeros(len(along))
    used = 0
    for delta in deltas:
        norm = torch.linalg.vector_norm(delta.dense(out=change))
        if not norm:
            continue
        used += 1
        torch.mm(left, change, out=own)
        squares = torch.linalg.vector_norm(own, dim=1).square_()
        products = torch.bmm(own[:, None], along[:, :, None]).view(-1)
        seen = squares > (norm * relative_cut(1, 1)) ** 2
        total.add_(torch.where(seen, products / squares, 0.0).clamp_min_(alpha))
    # without any change the rule made its own: it stays
    return used / total if used else total.fill_(1.0)
