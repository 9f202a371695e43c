"""Spherical average of several models. https://goddard.blog/posts/multislerp-wow-what-a-cool-idea"""

from __future__ import annotations

from torch import Tensor

from streammerge.delta import Deltas, PerExpert
from streammerge.methods import merge_method
from streammerge.solve.geometry import changes_of, combined, unit_mean, weights_of
from streammerge.solve.shares import normalized


@merge_method(
    paper="arXiv:2403.13257",
    needs_base=False,
    takes_base=True,
    streams_by="element",
    cost="streammerge.solve.cost_geometry:weight_gram",
    look="streammerge.solve.geometry:WeightGram",
    ranges={"eps": "[0, inf)"},
    checks={"weight": "streammerge.solve.limits:normalizable"},
)
def multislerp(deltas: Deltas, *, weight: PerExpert = 1.0, normalize_weights: bool = True, eps: float = 1e-8) -> Tensor:
    """Average the experts' directions, weighted, and keep their mean length.

    weight             share of each expert
    normalize_weights  divide by the sum of the weights
    eps                where less than this share of the directions is left, they cancel: the plain mean is taken

    With v_t = W_t, or D_t where there is a base model, and u_t = v_t / ‖v_t‖, flattened: m Σ w_t ‖v_t‖ with m the
    direction of Σ w_t u_t. The published step from there along the mean tangent is always zero, as it is taken
    from the very mean; none is taken here. Vectors of length zero count for the length only. mergekit adds `eps` to
    norms, which matters for changes below it.

    Returns the merged delta, [*shape].
    """
    weights = deltas.per_expert(weight)
    if normalize_weights:
        weights = normalized(weights)
    gram = deltas.seen.gram
    if deltas.based:
        _, *shares = unit_mean(changes_of(gram), gram, weights, eps).tolist()
        return combined(deltas, 0.0, shares)
    surplus, *shares = unit_mean(weights_of(gram), gram, weights, eps).tolist()
    return combined(deltas, surplus - 1.0, shares)
