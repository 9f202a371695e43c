"""DARE: drop entries of the changes at random, rescale the rest, add. https://arxiv.org/abs/2311.03099"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from streammerge.delta import Deltas, PerExpert
from streammerge.methods import merge_method
from streammerge.solve.drops import Dare, drop_entries
from streammerge.solve.election import added


@merge_method(
    paper="arXiv:2311.03099",
    needs_base=True,
    streams_by="element",
    cost="streammerge.solve.cost_trim:dare",
    look="streammerge.solve.drops:DareLook",
    ranges={"density": "[0, 1]"},
    checks={"weight": "streammerge.solve.limits:normalizable"},
)
def dare_linear(
    deltas: Deltas,
    *,
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    rescale: bool = True,
    rescale_by: Literal["norm", "probability"] = "norm",
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop entries of the experts' changes at random, rescale the rest, add.

    weight      factor of each expert's change
    density     probability that an entry of an expert's change is kept
    rescale     make up for what was dropped
    rescale_by  norm: a tensor keeps its sum of magnitudes, in one more reading; probability: divide by density
    normalize   divide by the sum of the weights
    lambda      factor of the merged change

    Δ = λ Σ w_t m_t ∘ D_t · s_t, m_t drawn independently with P(m = 1) = density. The paper divides by density, s = 1/d,
    whose mean is task arithmetic (its p is 1 - density): `rescale_by: probability`. mergekit, as
    the default here, takes s_t = ‖D_t‖₁ / ‖m_t ∘ D_t‖₁ of each tensor; where all that is not 0 was dropped, 1. The
    draws depend on the recipe's seed, the tensor's name, the expert's place in the recipe and the entry's index, on
    nothing else; they are not mergekit's.

    Returns the merged delta, [*shape].
    """
    thin = drop_entries(deltas, Dare(deltas, density), rescale=rescale, rescale_by=rescale_by)
    return added(deltas, thin, deltas.per_expert(weight), normalize=normalize, factor=lambda_)
