"""Model Breadcrumbs: add the changes without outliers and small entries. https://arxiv.org/abs/2312.06795"""

from __future__ import annotations

from torch import Tensor

from streammerge.delta import Deltas, PerExpert
from streammerge.methods import merge_method
from streammerge.solve.election import added
from streammerge.solve.trim import crumbs_trim


@merge_method(
    paper="arXiv:2312.06795",
    needs_base=True,
    streams_by="element",
    cost="streammerge.solve.cost_trim:breadcrumbs",
    look="streammerge.solve.trim:BreadcrumbsLook",
    ranges={"density": "[0, 1]", "gamma": "[0, 1]"},
    checks={"weight": "streammerge.solve.limits:normalizable"},
)
def breadcrumbs(
    deltas: Deltas,
    *,
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    gamma: PerExpert = 0.01,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool = False,
) -> Tensor:
    """Add the experts' changes without outliers and small entries.

    weight     factor of each expert's change
    density    share of each expert's entries kept; at 1 outliers are kept too
    gamma      share of each expert's entries that are outliers, the largest
    normalize  divide by the sum of the weights
    lambda     factor of the merged change
    rescale    multiply what is left so that a tensor keeps its sum of magnitudes, in one more reading

    Of the n entries of each tensor's change, sorted by magnitude, the ⌊gamma · n⌋ largest are set to zero, the next
    ⌊density · n⌋ kept, the others set to zero; Δ = λ Σ w_t D_t of what is kept, as task arithmetic adds it. Where
    gamma > 1 - density, all that is not kept are outliers. With `rescale` what is kept of each tensor's change is
    multiplied by Σ|D_t| / Σ|kept D_t|, unless that divides by 0. So does mergekit, whose names these are; of equal
    magnitudes those of the lower index are the larger, where mergekit leaves them to its sort. Changes in float64
    are ranked as float32 holds them.

    Returns the merged delta, [*shape].
    """
    return added(deltas, crumbs_trim(deltas, density), deltas.per_expert(weight), normalize=normalize, factor=lambda_)
