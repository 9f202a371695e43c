"""DELLA without the election: drop the smaller entries of each row more often, rescale, add. https://arxiv.org/abs/2406.11617"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from streammerge.delta import Deltas, PerExpert
from streammerge.methods import merge_method
from streammerge.solve.drops import Della, drop_entries
from streammerge.solve.election import added


@merge_method(
    paper="arXiv:2406.11617",
    needs_base=True,
    streams_by="row",
    cost="streammerge.solve.cost_trim:della",
    look="streammerge.solve.drops:DellaLook",
    ranges={"density": "[0, 1]", "epsilon": "[0, 1]"},
    checks={"weight": "streammerge.solve.limits:normalizable", "density": "streammerge.solve.limits:probabilities"},
)
def della_linear(
    deltas: Deltas,
    *,
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    epsilon: PerExpert = 0.15,
    rescale: bool = True,
    rescale_by: Literal["norm", "probability"] = "norm",
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop small changes more often than large, rescale the rest, add.

    weight      factor of each expert's change
    density     mean probability that an entry of an expert's change is kept
    epsilon     how far that of a row's smallest lies below the mean, and that of its largest above
    rescale     make up for what was dropped
    rescale_by  norm: a tensor keeps its sum of magnitudes, in one more reading; probability: divide by an entry's own
    normalize   divide by the sum of the weights
    lambda      factor of the merged change

    The changes are dropped as by `della`; Δ = λ Σ w_t D_t of what is kept, without a vote.

    Returns the merged delta, [rows, columns].
    """
    thin = drop_entries(deltas, Della(deltas, density, epsilon), rescale=rescale, rescale_by=rescale_by)
    return added(deltas, thin, deltas.per_expert(weight), normalize=normalize, factor=lambda_)
