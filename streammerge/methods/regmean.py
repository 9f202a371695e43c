"""RegMean: least squares between each expert's outputs on its own inputs. https://arxiv.org/abs/2212.09849"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from streammerge.delta import Deltas, PerExpert
from streammerge.methods import merge_method
from streammerge.solve.covariances import Measured
from streammerge.solve.normal_equations import solve_by
from streammerge.solve.rule import Rule


@merge_method(
    paper="arXiv:2212.09849",
    needs_base=False,
    streams_by="matrix",
    cost="streammerge.solve.cost_covariance:regmean",
    beside="covariance",
    ranges={"weight": "[0, inf)", "reduce": "[0, 1]", "ridge": "[0, inf)"},
    checks={"weight": "streammerge.solve.limits:some_weight", "ridge": "streammerge.solve.limits:ridge"},
)
def regmean(
    deltas: Deltas,
    *,
    weight: PerExpert = 1.0,
    reduce: float = 0.9,
    solver: Literal["exact", "ridge", "pinv"] = "exact",
    ridge: float = 0.01,
    missing: Literal["error", "mean"] = "error",
) -> Tensor:
    """Merge each matrix by least squares on the inputs that each expert saw.

    weight   factor of each expert's covariance; only ratios matter
    reduce   factor of the covariances' entries off the diagonal
    solver   exact: no regularisation; ridge: pulled towards the experts' mean; pinv: without
             eigenvalues up to in·2⁻²³ of the largest
    ridge    strength of that pull, relative to the covariances' mean eigenvalue
    missing  error: every expert must have a covariance; mean: without one, average the tensor

    W = (Σ W_t C_t)(Σ C_t)⁻¹, C_t = Σ x xᵀ over expert t's inputs with its off-diagonal
    times `reduce` (the paper: 0.9, for T5 0.1): the recipe names a folder of [in, in] matrices beside
    each expert. Computed on the changes, where the same formula holds, so that small ones keep their
    digits; an input that no expert saw keeps the mean's weights, where the paper's inverse fails. An
    expert that changed nothing counts: its inputs want the base. Scales of the C_t matter, unlike
    that of all of them.

    Returns the merged delta, [out, in] in the stream's dtype. Raises MergeError for a covariance that
    is not finite.
    """
    weights = deltas.per_expert(weight)
    if missing == "mean" and any(deltas.beside(index) is None for index in range(deltas.experts)):
        deltas.note(solver="mean", form="none")
        total = math.fsum(weights)
        return deltas.weighted_sum([each / total for each in weights])
    measured = Measured(deltas, reduce=reduce, weights=weights)
    return solve_by(deltas, Rule(solver=solver, ridge=ridge), measured)
