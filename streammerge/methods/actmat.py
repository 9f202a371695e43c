"""ACTMat: weigh the experts' changes by input covariances read off the changes. https://arxiv.org/abs/2604.01329"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method
from streammerge.solve.normal_equations import solve_normal_equations


@merge_method(
    paper="arXiv:2604.01329",
    needs_base=True,
    streams_by="matrix",
    cost="streammerge.solve.cost:normal_equations",
    thin="streammerge.solve.thin:normal_equations",
    thin_cost="streammerge.solve.cost_thin:thin_cost",
    for_adapters="streammerge.solve.held:held",
    ranges={"ridge": "[0, inf)", "weight_exponent": "[0, 1]", "top_k": "[0, 1]", "time": "(0, inf)"},
    checks={"ridge": "streammerge.solve.limits:ridge"},
)
def actmat(
    deltas: Deltas,
    *,
    ridge: float = 0.1,
    solver: Literal["ridge", "pinv", "exact", "top_k", "flow"] = "ridge",
    anchor: Literal["auto", "mean", "base", "sum"] = "auto",
    weight_exponent: float = 0.0,
    top_k: float = 0.0,
    time: float = 300.0,
    pool: Literal["none", "inputs"] = "none",
    adapters: Literal["hold", "trust"] = "hold",
) -> Tensor:
    """Merge each matrix so that it acts as every expert does on that expert's inputs.

    ridge   strength of the pull towards the anchor, relative to the covariances' mean
            eigenvalue; only for solver ridge, and there not 0
    solver  ridge: regularised; pinv: what the paper's code computes; exact: no regularisation;
            top_k: the largest eigenvalues alone; flow: those by gradient flow, ended at `time`
    anchor  what stays where the solver holds back: the experts' mean, the base's weights (base)
            or the sum of the changes; auto: base for pinv, else mean
    weight_exponent  p: expert t's covariance counts 1/‖D_t‖^2p
    top_k   share of the eigenvalues that solvers top_k and flow use; 0 for their participation
            ratio
    time    how long solver flow follows the gradient, in units of one over the trace's share of
            one expert
    pool    inputs: matrices that read the same input, such as q, k and v, are merged as one, stacked
            by rows
    adapters  where all experts are adapters and the solver is ridge, hold: a ridge (in/rank)² times
            as strong; trust: the same as for other changes

    Equation (3), W = Σ W_t C_t (Σ C_t)⁺ with C_t = D_tᵀD_t, D_t = W_t - W_0, in six ways changed:
    it is applied to the changes, Δ = Σ D_t C_t (Σ C_t)⁺, and W_0 + Δ written, as the paper's code does:
    directions that no expert changed keep the base's weights, where the least-norm W would zero them;
    ridge, the default, adds λ = ridge·tr(A)/in to A = Σ C_t and λ·mean(D_t) to Σ D_t C_t, where the
    code cuts A's eigenvalues at in·2⁻²³ of the largest: one Cholesky factor, no threshold, and one
    expert, or several equal ones, come back exactly;
    experts that did not change a matrix do not count in its mean;
    deltas are scaled by a power of two while they are squared;
    where T·out ≤ in the same solution comes from the smaller system S Sᵀ, S = [D_1; …; D_T];
    of adapters ridge is (in/rank)² times as strong, for the largest rank: their covariances show `rank`
    of `in` directions, where A was drawn; each expert is met there, which alone is the changes' sum.
    The other settings span the family: weight_exponent 1 is the repository's later `mons` and WUDI's
    loss, solvers top_k and flow are SWUDI's; see `solve_normal_equations` for the formula.

    Returns the merged delta, [out, in] in the stream's dtype. Raises MergeError for a NaN
    and an infinity.
    """
    # by the planner: what comes here is stacked already, and held back
    del pool, adapters
    return solve_normal_equations(
        deltas, solver=solver, ridge=ridge, anchor=anchor, weight_exponent=weight_exponent, top_k=top_k, time=time
    )
