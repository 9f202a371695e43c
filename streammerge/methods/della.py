"""DELLA: drop the smaller entries of each row more often, rescale, elect signs. https://arxiv.org/abs/2406.11617"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from streammerge.delta import Deltas, PerExpert
from streammerge.methods import merge_method
from streammerge.solve.drops import Della, drop_entries
from streammerge.solve.election import elected


@merge_method(
    paper="arXiv:2406.11617",
    needs_base=True,
    streams_by="row",
    cost="streammerge.solve.cost_trim:della",
    look="streammerge.solve.drops:DellaLook",
    ranges={"density": "[0, 1]", "epsilon": "[0, 1]"},
    checks={"density": "streammerge.solve.limits:probabilities"},
)
def della(
    deltas: Deltas,
    *,
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    epsilon: PerExpert = 0.15,
    rescale: bool = True,
    rescale_by: Literal["norm", "probability"] = "norm",
    normalize: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop small changes more often than large, average what agrees in sign.

    weight      factor of each expert's change, in the vote too
    density     mean probability that an entry of an expert's change is kept
    epsilon     how far that of a row's smallest lies below the mean, and that of its largest above
    rescale     make up for what was dropped
    rescale_by  norm: a tensor keeps its sum of magnitudes, in one more reading; probability: divide by an entry's own
    normalize   divide each entry's sum by the weights of the experts that agree on it
    lambda      factor of the merged change

    Within each row of a tensor (its last dimension) the entries are ranked by |D_t|, r = 0 for the smallest of n, and
    kept with probability density - ε + 2ε r / (n - 1), or density where n is 1; then the sign of Σ w_t D_t is elected,
    + where it is 0, and what agrees is averaged, as by `ties`. The paper divides what is kept by its probability:
    `rescale_by: probability`. mergekit, as the default here, multiplies by ‖D_t‖₁ / ‖kept‖₁ of each tensor. Ranks are
    integers, where mergekit's lose digits in bfloat16 from 256 columns on; of equal magnitudes the first is the
    larger. A density of 1 drops nothing. The draws are those described at `dare_linear`, not mergekit's.

    Returns the merged delta, [rows, columns].
    """
    thin = drop_entries(deltas, Della(deltas, density, epsilon), rescale=rescale, rescale_by=rescale_by)
    return elected(deltas, thin, deltas.per_expert(weight), zero=1.0, normalize=normalize, factor=lambda_)
