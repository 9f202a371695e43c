"""DARE with TIES' election of signs. https://arxiv.org/abs/2311.03099"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from streammerge.delta import Deltas, PerExpert
from streammerge.methods import merge_method
from streammerge.solve.drops import Dare, drop_entries
from streammerge.solve.election import elected


@merge_method(
    paper="arXiv:2311.03099",
    needs_base=True,
    streams_by="element",
    cost="streammerge.solve.cost_trim:dare",
    look="streammerge.solve.drops:DareLook",
    ranges={"density": "[0, 1]"},
)
def dare_ties(
    deltas: Deltas,
    *,
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    rescale: bool = True,
    rescale_by: Literal["norm", "probability"] = "norm",
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop entries of the changes at random, rescale, add what agrees in sign.

    weight      factor of each expert's change, in the vote too
    density     probability that an entry of an expert's change is kept
    rescale     make up for what was dropped
    rescale_by  norm: a tensor keeps its sum of magnitudes, in one more reading; probability: divide by density
    normalize   divide each entry's sum by the weights of the experts that agree on it
    lambda      factor of the merged change

    The changes are dropped as by `dare_linear`; then the sign of Σ w_t D_t is elected, + where it is 0, and what
    agrees is added, as by `ties`. As in mergekit nothing is trimmed besides, and what agrees is added up, not averaged,
    unless `normalize` is on.

    Returns the merged delta, [*shape]. Raises MergeError for a density outside 0 to 1.
    """
    thin = drop_entries(deltas, Dare(deltas, density), rescale=rescale, rescale_by=rescale_by)
    return elected(deltas, thin, deltas.per_expert(weight), zero=1.0, normalize=normalize, factor=lambda_)
