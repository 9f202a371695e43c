"""The Karcher mean of the experts: their average on the sphere. https://arxiv.org/abs/2603.04972"""

from __future__ import annotations

from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method
from streammerge.solve.geometry import combined, karcher_mean, weights_of


@merge_method(
    paper="arXiv:2603.04972",
    needs_base=False,
    streams_by="element",
    cost="streammerge.solve.cost_geometry:weight_gram",
    look="streammerge.solve.geometry:WeightGram",
    ranges={"max_iter": "[0, inf)", "tol": "[0, inf)"},
)
def karcher(deltas: Deltas, *, max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    """Average the experts on the sphere: the point nearest to all of them.

    max_iter  how many steps to take at most
    tol       a step, or an angle, below this many radians is not taken

    The minimiser u of Σ θ(u, W_t)² over unit vectors, times the mean of ‖W_t‖, for each flattened tensor; a base
    model only serves to write the result as a change. Like mergekit, it starts from the mean direction, goes along
    mean tangents, and lets tensors that are all zero lower the length. Each step is taken in the span of the
    weights, of which one look gives the float64 inner products; mergekit's absolute thresholds are none of ours.

    Returns the merged delta, [*shape].
    """
    gram = deltas.seen.gram
    surplus, *shares = karcher_mean(weights_of(gram), gram, max_iter, tol).tolist()
    return combined(deltas, surplus - 1.0, shares)
