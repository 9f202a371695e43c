"""LARV: scale each layer's changes before any rule merges them. https://arxiv.org/abs/2602.09413"""

from __future__ import annotations

from torch import Tensor

from streammerge.delta import Deltas, MethodName, Settings
from streammerge.methods import merge_method
from streammerge.methods.inner import inner
from streammerge.solve.inner_deltas import ScaledDeltas
from streammerge.solve.larv import LarvLook


@merge_method(
    paper="arXiv:2602.09413",
    needs_base=True,
    streams_by="matrix",
    cost="streammerge.methods.inner:larv_cost",
    look="streammerge.solve.larv:LarvLook",
)
def larv(
    deltas: Deltas,
    *,
    rule: MethodName = "ties",
    rule_parameters: Settings = None,
    contrast: float = 0.0,
    conflict: float = 0.0,
    low: float = 0.9,
    high: float = 1.1,
) -> Tensor:
    """Scale a matrix's changes by what its spectrum tells, then merge by any rule.

    rule             the method that merges: any that needs no data beside the experts
    rule_parameters  that method's parameters, as a mapping
    contrast         effective-rank contrast above which a change counts as structured, in standard deviations
    conflict         conflict above which a change counts as disturbing, in standard deviations
    low              scale of a matrix whose change disturbs and is not structured
    high             scale of a matrix whose change is structured and does not disturb

    D_t becomes s·D_t for all experts before the rule. With D = Σ D_t and the effective rank
    r(X) = exp(entropy of σ²/Σσ²), the contrast is e = r(W_0)/r(D), and the conflict c = ‖X - Xᵀ‖/2‖X‖ for
    X = W_0ᵀD or W_0Dᵀ, whichever is smaller: 0 where the change only stretches what the base does, about
    0.71 for an unrelated one, 1 where it only turns it. As in the paper both are standardised before any matrix
    is merged: z = (e - mean)/deviation, likewise for c, by the mean and the population standard deviation over
    all matrices that this method merges; 0 where all are alike. s is `high` where z_e > `contrast` and
    z_c ≤ `conflict`, `low` where it is the other way round for both, else 1.
    A matrix whose base or change is zero has neither e nor c; it stays as it is and does not count.
    The paper publishes e, that c comes of a commutator, and that two or three tiers do best. Its formula
    of c, its tiers' values and their thresholds we could not find: those here are our choice.

    Returns the merged delta, [out, in] in the stream's dtype.
    """
    within = inner("larv", {"rule": rule, "rule_parameters": rule_parameters})
    assert deltas.seen is not None, "scaling takes a look: `Method.merge` sees to it"
    look: LarvLook = deltas.seen
    scale, found = 1.0, look.of(deltas.name)
    if found is not None:
        own, standing = found
        structured, disturbing = standing.contrast > contrast, standing.conflict > conflict
        scale = 1.0 if structured == disturbing else high if structured else low
        deltas.note(
            contrast=own.contrast, contrast_z=standing.contrast, conflict=own.conflict, conflict_z=standing.conflict
        )
    deltas.note(scale=scale)
    return within.merge(deltas if scale == 1.0 else ScaledDeltas(deltas, scale))
