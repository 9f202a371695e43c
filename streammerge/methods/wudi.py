"""WUDI: the change that least disturbs any expert's own. https://arxiv.org/abs/2503.08099"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method
from streammerge.solve.descent import descend
from streammerge.solve.normal_equations import solve_normal_equations


@merge_method(
    paper="arXiv:2503.08099",
    needs_base=True,
    streams_by="matrix",
    cost="streammerge.solve.cost_covariance:wudi",
    thin="streammerge.solve.thin:wudi",
    thin_cost="streammerge.solve.cost_thin:thin_cost",
    ranges={"ridge": "[0, inf)", "iterations": "[0, inf)", "learning_rate": "(0, inf)"},
    checks={"ridge": "streammerge.solve.limits:ridge"},
)
def wudi(
    deltas: Deltas,
    *,
    solver: Literal["ridge", "exact", "pinv"] = "ridge",
    ridge: float = 0.1,
    iterations: int = 0,
    learning_rate: float = 1e-5,
    lambda_: float = 1.0,
    pool: Literal["none", "inputs"] = "none",
) -> Tensor:
    """Find the change that interferes least with what each expert changed.

    solver      ridge: pulled towards the sum of the changes; exact: the minimum; pinv: without
                eigenvalues up to in·2⁻²³ of the largest; only where iterations is 0
    ridge       strength of that pull, relative to the covariances' mean eigenvalue
    iterations  0 for the closed form; more for that many of Adam's steps from the sum, the paper
                takes 300
    learning_rate  of these steps: the most that an entry moves in one
    lambda      factor of the merged change
    pool    inputs: matrices that read the same input, such as q, k and v, are merged as one, stacked
            by rows

    The minimum itself is no default: where Σ D_tᵀD_t is nearly singular, as it is for adapters and
    matrices of more columns than the experts have rows, it overshoots, up to hundreds of times the
    experts' changes. The paper's descent stops long before.
    Σ ‖(Δ - D_t) D_tᵀ‖² / ‖D_t‖² is least at Δ = N A⁺, A = Σ C_t/‖D_t‖², N = Σ D_t C_t/‖D_t‖²: where the
    paper's descent from Σ D_t would end, and what its code takes some hundred steps towards. These
    steps are Adam's (0.9, 0.999, 1e-8, no decay) with the gradient 2(ΔA - N), which costs one product
    of [out, in] by [in, in] whatever the number of experts. They are no longer scale-free: an entry
    moves by about learning_rate·iterations at most, 3e-3 in the paper's setting.
    Experts that did not change a matrix are left out, where the code divides by zero.

    Returns the merged delta, [out, in] in the stream's dtype. Raises MergeError for a NaN
    and an infinity.
    """
    # by the planner: what comes here is stacked already
    del pool
    if iterations:
        merged = descend(deltas, iterations=iterations, learning_rate=learning_rate)
    else:
        anchor: Literal["sum", "auto"] = "sum" if solver == "ridge" else "auto"
        merged = solve_normal_equations(deltas, solver=solver, ridge=ridge, anchor=anchor, weight_exponent=1.0)
    return merged if lambda_ == 1.0 else merged.mul_(lambda_)
