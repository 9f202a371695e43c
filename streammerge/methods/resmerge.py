"""ResMerge: a consensus of what is left beside each expert's leading direction. https://arxiv.org/abs/2606.02252"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method
from streammerge.solve.buffers import Buffers
from streammerge.solve.polar import relative_cut, truncated

# linear layers of attention and feed-forward blocks, by the names that models give them
_SCORED = re.compile(r"attention|self_attn|\.attn\.|mlp|ffn|feed_forward|(q|k|v|o|gate|up|down)_proj", re.IGNORECASE)
# a coherence this close above that of unrelated residuals is rounding
_CHANCE = 1.0 + 1e-9


@merge_method(
    paper="arXiv:2606.02252",
    needs_base=True,
    streams_by="matrix",
    cost="streammerge.solve.cost_spectral:residual",
    ranges={"head_rank": "[1, inf)"},
)
def resmerge(
    deltas: Deltas, *, head_rank: int = 1, beta_min: float = 0.7, beta_max: float = 1.0, head_ratio: float = 0.2
) -> Tensor:
    """Merge what lies beside each expert's leading direction, then add that back.

    head_rank   how many leading singular directions make an expert's head
    beta_min    exponent of the residuals' coherence where they agree
    beta_max    exponent where they oppose each other, and outside attention and feed-forward layers
    head_ratio  norm of the heads' part beside the residuals', where the heads agree

    D_t = H_t + R_t, H_t the head; q = Σ R_t/‖R_t‖, c = ‖q‖/T the coherence (the mean cosine of a residual
    with q), s the mean pairwise cosine of residuals, g the mean pairwise cosine of heads, negative ones as 0.
    β = β_max - (β_max - β_min)·½((s+1)/2 + (c+1)/2); the backbone is c^β · mean‖R_t‖ · q/‖q‖, or where
    c ≤ 1/√T, no more than unrelated residuals have, mean R_t.
    Δ = backbone + head_ratio · g · ‖backbone‖ · H̄/‖H̄‖, H̄ the mean head. For RL experts.
    Different from the paper's code: experts that changed nothing are left out, where they would lower the
    coherence; residuals and heads count as zero beside their own change's norm, not below 1e-8; the
    arithmetic is float64, and every product of residuals comes from the one running sum.
    As there, one expert does not come back, and changes of rank `head_rank` vanish.

    Returns the merged delta, [out, in] in the stream's dtype.
    """
    rows, columns = deltas.shape
    most, cut = min(head_rank, rows, columns), relative_cut(rows, columns)
    buffers = Buffers(deltas, torch.float64)
    change = buffers.take("change", torch.float64, rows, columns)
    consensus = buffers.take("consensus", torch.float64, rows, columns).zero_()
    mean = buffers.take("mean", torch.float64, rows, columns).zero_()
    left = buffers.take("left", torch.float64, most * deltas.experts, rows).zero_()
    right = buffers.take("right", torch.float64, most * deltas.experts, columns).zero_()
    norms: list[float] = []
    for delta in deltas:
        norm = _norm(delta.dense(out=change))
        if norm == 0.0:
            continue
        part = slice(len(norms) * most, (len(norms) + 1) * most)
        values = truncated(change, left[part], right[part], buffers)
        # heads are kept as U diag(σ) and V
        head = left[part][: len(values)].mul_(values[:, None])
        residual = _norm(change.addmm_(head.mT, right[part][: len(values)], alpha=-1))
        norms.append(residual if residual > cut * norm else 0.0)
        if norms[-1]:
            consensus.add_(change, alpha=1.0 / residual)
            mean.add_(change)
    used = len(norms)
    if not any(norms):
        return deltas.zeros(rows, columns)
    length = _norm(consensus)
    coherence = min(length / used, 1.0)
    if coherence * math.sqrt(used) <= _CHANCE:
        backbone = mean.div_(used)
    else:
        backbone = consensus.mul_(coherence ** _beta(deltas, coherence, norms, beta_min, beta_max))
        backbone.mul_(math.fsum(norms) / used / length)
    inner = ((left @ left.mT) * (right @ right.mT)).view(deltas.experts, most, deltas.experts, most).sum((1, 3))
    agreement, strength = _agreement(inner[:used, :used])
    deltas.note(coherence=coherence, head_agreement=agreement)
    if strength > 0.0:
        backbone.addmm_(left.mT, right, alpha=head_ratio * agreement * _norm(backbone) / strength)
    return deltas.empty(rows, columns).copy_(backbone)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix))


def _beta(deltas: Deltas, coherence: float, norms: list[float], least: float, most: float) -> float:
    used = len(norms)
    if not _SCORED.search(deltas.name):
        return most
    residuals = sum(norm > 0.0 for norm in norms)
    pairwise = ((coherence * used) ** 2 - residuals) / (used * (used - 1)) if used > 1 else 1.0
    score = 0.5 * ((pairwise + 1.0) / 2 + (coherence + 1.0) / 2)
    return most - (most - least) * min(max(score, 0.0), 1.0)


def _agreement(inner: Tensor) -> tuple[float, float]:
    """Mean pairwise cosine of the heads, negative ones as 0, and the norm of their sum, from inner products [t, t]."""
    norms = inner.diagonal().sqrt()
    used = len(norms)
    cosines = (inner / norms / norms[:, None]).clamp_(0.0, 1.0)
    pairs = (cosines.sum() - cosines.diagonal().sum()).item()
    agreement = pairs / (used * (used - 1)) if used > 1 else 1.0
    total = inner.sum().clamp_min(0.0).sqrt().item()
    # heads that cancel leave no direction, only rounding
    return agreement, total if total > 1e-7 * norms.sum().item() else 0.0
