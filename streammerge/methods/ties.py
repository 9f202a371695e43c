"""TIES-Merging: trim, elect signs, average what agrees. https://arxiv.org/abs/2306.01708"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from streammerge.delta import Deltas, PerExpert
from streammerge.methods import merge_method
from streammerge.solve.election import elected
from streammerge.solve.trim import ties_trim


@merge_method(
    paper="arXiv:2306.01708",
    needs_base=True,
    streams_by="element",
    cost="streammerge.solve.cost_trim:ties",
    look="streammerge.solve.trim:TiesLook",
    ranges={"density": "[0, 1]"},
    one_for_all=("density", "rescale", "keep", "cancelled"),
)
def ties(
    deltas: Deltas,
    *,
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    normalize: bool = True,
    lambda_: float = 1.0,
    trim: Literal["tensor", "model"] = "tensor",
    keep: Literal["count", "threshold"] = "count",
    cancelled: Literal["plus", "none", "majority"] = "plus",
    rescale: bool = False,
) -> Tensor:
    """Average the large, sign-agreeing parts of the experts' changes.

    weight     factor of each expert's change, in the vote too
    density    share of each expert's entries kept, the largest
    normalize  divide each entry's sum by the weights of the experts that agree on it
    lambda     factor of the merged change
    trim       density is a share of each tensor's entries, or of the whole model's
    keep       count: ⌊density · n⌋ entries, of equal ones the first; threshold: one more, and its equals
    cancelled  the sign elected where the votes cancel: plus, none (the base stays), or that of most votes
    rescale    multiply what is left so that a tensor keeps its sum of magnitudes, in one more reading

    Trim each D_t = W_t - W_0 to its largest entries; elect γ = sign(Σ w_t D_t); where sign(w_t D_t) = γ,
    Δ = λ Σ w_t D_t / Σ w_t, over those experts only (in the paper all w_t are 1). The paper trims
    the whole model, and its code keeps all that reach a threshold and gives cancelled votes the sign of most others:
    `trim: model, keep: threshold, cancelled: majority`, with density 0.2. The defaults are mergekit's, with one
    difference: of equal magnitudes the first is kept, where mergekit leaves them to its sort. One entry at least is
    kept unless density is 0. Changes in float64 are ranked as float32 holds them. The majority is that of the tensor
    or the model, as `trim` says; where it is even, cancelled votes elect none. In a model the tensors come in the
    order of the base's files: which of equals is kept by count depends on it.

    With `rescale`, before the vote, an expert's trimmed change of each tensor is multiplied by Σ|D_t| / Σ|trimmed D_t|,
    unless nothing is left of it; tensor by tensor where `trim` is model, too. So does mergekit, not the paper.

    Returns the merged delta, [*shape].
    """
    thin, majority = ties_trim(deltas, density, cancelled)
    zero = {"plus": 1.0, "none": 0.0, "majority": majority}[cancelled]
    return elected(deltas, thin, deltas.per_expert(weight), zero=zero, normalize=normalize, factor=lambda_)
