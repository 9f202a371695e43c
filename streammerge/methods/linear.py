"""The weighted mean of the experts. https://arxiv.org/abs/2203.05482"""

from __future__ import annotations

import math

from torch import Tensor

from streammerge.delta import Deltas, PerExpert
from streammerge.methods import merge_method
from streammerge.solve.shares import normalized


@merge_method(
    paper="arXiv:2203.05482",
    needs_base=False,
    streams_by="element",
    thin="streammerge.solve.thin:linear",
    checks={"weight": "streammerge.solve.limits:normalizable"},
    thin_checks={"weight": "streammerge.solve.limits:one_base"},
)
def linear(deltas: Deltas, *, weight: PerExpert = 1.0, normalize: bool = True) -> Tensor:
    """Average the experts, weighted.

    weight     share of each expert; only ratios matter while `normalize` is on
    normalize  divide by the sum of the weights

    W = Σ w_t W_t / Σ w_t, the "uniform soup" of the paper for equal weights. Computed as a change
    from W_0 (the first expert where there is no base), so that small differences keep their digits.
    Returns the merged delta, [*shape].
    """
    weights = deltas.per_expert(weight)
    if normalize:
        weights = normalized(weights)
    merged = deltas.weighted_sum(weights)
    surplus = math.fsum(weights) - 1.0
    if not normalize and surplus != 0.0:
        merged.add_(deltas.base(), alpha=surplus)
    return merged
