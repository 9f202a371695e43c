"""Task arithmetic: add the experts' changes. https://arxiv.org/abs/2212.04089"""

from __future__ import annotations

from torch import Tensor

from streammerge.delta import Deltas, PerExpert
from streammerge.methods import merge_method
from streammerge.solve.shares import normalized


@merge_method(
    paper="arXiv:2212.04089",
    needs_base=True,
    streams_by="element",
    thin="streammerge.solve.thin:task_arithmetic",
    checks={"weight": "streammerge.solve.limits:normalizable"},
)
def task_arithmetic(
    deltas: Deltas, *, weight: PerExpert = 1.0, normalize: bool = False, lambda_: float = 1.0
) -> Tensor:
    """Add the experts' changes to the base, weighted.

    weight     factor of each expert's change
    normalize  divide by the sum of the weights
    lambda     factor of the merged change

    Δ = λ Σ w_t Δ_t. The paper tunes one λ on held-out data for equal weights; nothing is tuned here.
    Returns the merged delta, [*shape].
    """
    weights = deltas.per_expert(weight)
    if normalize:
        weights = normalized(weights)
    return deltas.weighted_sum([share * lambda_ for share in weights])
