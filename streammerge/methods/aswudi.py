"""ASWUDI: WUDI's loss along the covariances' main directions. https://arxiv.org/abs/2606.07289"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method
from streammerge.solve.normal_equations import solve_normal_equations


@merge_method(
    paper="arXiv:2606.07289",
    needs_base=True,
    streams_by="matrix",
    cost="streammerge.solve.cost_covariance:aswudi",
    thin="streammerge.solve.thin:aswudi",
    thin_cost="streammerge.solve.cost_thin:thin_cost",
    ranges={"top_k": "[0, 1]"},
)
def aswudi(
    deltas: Deltas,
    *,
    top_k: float = 0.0,
    anchor: Literal["mean", "base", "sum"] = "sum",
    lambda_: float = 1.0,
    pool: Literal["none", "inputs"] = "none",
) -> Tensor:
    """Minimise WUDI's loss along the covariances' main directions alone.

    top_k   share of the eigenvalues used, the largest; 0 for as many as their participation ratio
    anchor  what stays along the others: the experts' mean, nothing (base), or the sum of their
            changes
    lambda  factor of the merged change
    pool    inputs: matrices that read the same input, such as q, k and v, are merged as one, stacked
            by rows

    SWUDI without a time to tune: Δ = Θ + (N - ΘA) V diag(f/λ) Vᵀ as there, with f = 1 on the K largest
    eigenvalues, 0 on the others, K = ⌈(Σσ)²/Σσ²⌉ and σ = √λ. Eigenvalues within rounding of zero,
    max(8, √in) units in the last place of the largest, are not counted, where the paper's code raises
    them to 1e-8. The code's other count, Gavish and Donoho's, is not offered.

    Returns the merged delta, [out, in] in the stream's dtype. Raises MergeError for a NaN
    and an infinity.
    """
    # by the planner: what comes here is stacked already
    del pool
    merged = solve_normal_equations(deltas, solver="top_k", anchor=anchor, weight_exponent=1.0, top_k=top_k)
    return merged if lambda_ == 1.0 else merged.mul_(lambda_)
