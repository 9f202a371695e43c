"""LARV: scale each layer's changes before any rule merges them. https://arxiv.org/abs/2602.09413"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from streammerge.delta import Deltas, Settings
from streammerge.methods import merge_method
from streammerge.methods.inner import inner
from streammerge.solve.buffers import Buffers
from streammerge.solve.inner_deltas import ScaledDeltas
from streammerge.solve.polar import gram


@merge_method(
    paper="arXiv:2602.09413",
    needs_base=True,
    streams_by="matrix",
    cost="streammerge.methods.inner:larv_cost",
)
def larv(
    deltas: Deltas,
    *,
    rule: str = "ties",
    rule_parameters: Settings = None,
    contrast: float = 1.0,
    conflict: float = 0.75,
    low: float = 0.9,
    high: float = 1.1,
) -> Tensor:
    """Scale a matrix's changes by what its spectrum tells, then merge by any rule.

    rule             the method that merges: any that needs no data beside the experts
    rule_parameters  that method's parameters, as a mapping
    contrast         effective-rank contrast above which a change counts as structured
    conflict         conflict above which a change counts as disturbing, in [0, 1]
    low              scale of a matrix whose change disturbs and is not structured
    high             scale of a matrix whose change is structured and does not disturb

    D_t becomes s·D_t for all experts before the rule. With D = Σ D_t and the effective rank
    r(X) = exp(entropy of σ²/Σσ²), the contrast is e = r(W_0)/r(D), and the conflict c = ‖X - Xᵀ‖/2‖X‖ for
    X = W_0ᵀD or W_0Dᵀ, whichever is smaller: 0 where the change only stretches what the base does, about
    0.71 for an unrelated one, 1 where it only turns it. s is `high`, 1 or `low`.
    The paper publishes e, that c comes of a commutator, and that two or three tiers do best. Its formula
    of c, its tiers' values and their thresholds we could not find: those here are our choice, and so is
    that each matrix is judged by itself, where the paper first standardises e and c over all layers.

    Returns the merged delta, [out, in] in the stream's dtype. Raises MergeError for a rule or a parameter
    that does not exist, and for rules that need data beside the experts or look at the whole model.
    """
    within = inner("larv", rule, rule_parameters)
    richness, against = _diagnostics(deltas)
    structured, disturbing = richness > contrast, against > conflict
    scale = 1.0 if structured == disturbing else high if structured else low
    deltas.note(contrast=richness, conflict=against, scale=scale)
    return within.merge(deltas if scale == 1.0 else ScaledDeltas(deltas, scale))


def _diagnostics(deltas: Deltas) -> tuple[float, float]:
    """Effective-rank contrast and conflict; 1 and 0 where the base or the change is zero."""
    rows, columns = deltas.shape
    buffers = Buffers(deltas, torch.float64)
    total = buffers.take("total", torch.float64, rows, columns).zero_()
    for delta in deltas:
        total.add_(delta.dense())
    base = buffers.take("base", torch.float64, rows, columns).copy_(deltas.base())
    ranks = _effective_rank(base, buffers), _effective_rank(total, buffers)
    if not all(ranks):
        return 1.0, 0.0
    across = (base, total.mT) if rows <= columns else (base.mT, total)
    size = min(rows, columns)
    turned = torch.mm(*across, out=buffers.take("gram", torch.float64, size, size))
    norm = torch.linalg.vector_norm(turned).item()
    antisymmetric = torch.linalg.vector_norm(turned - turned.mT).item()
    return ranks[0] / ranks[1], antisymmetric / (2.0 * norm) if norm else 0.0


def _effective_rank(matrix: Tensor, buffers: Buffers) -> float:
    energies = torch.linalg.eigvalsh(gram(matrix, buffers)).clamp_min_(0.0)
    total = energies.sum()
    return math.exp(torch.special.entr(energies / total).sum().item()) if total > 0.0 else 0.0
