"""Model Breadcrumbs with TIES' election of signs. https://arxiv.org/abs/2312.06795"""

from __future__ import annotations

from torch import Tensor

from streammerge.delta import Deltas, PerExpert
from streammerge.methods import merge_method
from streammerge.solve.election import elected
from streammerge.solve.trim import crumbs_trim


@merge_method(
    paper="arXiv:2312.06795",
    needs_base=True,
    streams_by="element",
    cost="streammerge.solve.cost_trim:breadcrumbs",
    look="streammerge.solve.trim:BreadcrumbsLook",
    ranges={"density": "[0, 1]", "gamma": "[0, 1]"},
)
def breadcrumbs_ties(
    deltas: Deltas,
    *,
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    gamma: PerExpert = 0.01,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool = False,
) -> Tensor:
    """Add what agrees in sign of the changes without outliers and small entries.

    weight     factor of each expert's change, in the vote too
    density    share of each expert's entries kept; at 1 outliers are kept too
    gamma      share of each expert's entries that are outliers, the largest
    normalize  divide each entry's sum by the weights of the experts that agree on it
    lambda     factor of the merged change
    rescale    multiply what is left so that a tensor keeps its sum of magnitudes, in one more reading

    The changes are trimmed, and rescaled, as by `breadcrumbs`; then the sign of Σ w_t D_t is elected, + where it
    is 0, and what agrees is added, as by `ties`. The combination is mergekit's, not the paper's.

    Returns the merged delta, [*shape].
    """
    thin = crumbs_trim(deltas, density)
    return elected(deltas, thin, deltas.per_expert(weight), zero=1.0, normalize=normalize, factor=lambda_)
