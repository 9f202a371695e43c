"""TACT: ACTMat with covariances of the largest changes alone. https://arxiv.org/abs/2604.01329"""

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
    cost="streammerge.solve.cost_covariance:tact",
    ranges={
        "density": "(0, 1]",
        "ridge": "[0, inf)",
        "weight_exponent": "[0, 1]",
        "top_k": "[0, 1]",
        "time": "(0, inf)",
    },
    checks={"ridge": "streammerge.solve.limits:ridge"},
)
def tact(
    deltas: Deltas,
    *,
    density: float = 0.5,
    center: bool = False,
    ridge: float = 0.1,
    solver: Literal["ridge", "pinv", "exact", "top_k", "flow"] = "ridge",
    anchor: Literal["auto", "mean", "base", "sum"] = "auto",
    weight_exponent: float = 0.0,
    top_k: float = 0.0,
    time: float = 300.0,
    pool: Literal["none", "inputs"] = "none",
) -> Tensor:
    """Merge as actmat does, by covariances of the largest changes.

    density  share of each change's entries that its covariance is made of, by magnitude
    center   subtract each column's mean from them first: with density 1 the repository's `ace`
    ridge    strength of the pull towards the anchor, relative to the covariances' mean
             eigenvalue; only for solver ridge, and there not 0
    solver   ridge: regularised; pinv: what the paper's code computes; exact: no regularisation;
             top_k: the largest eigenvalues alone; flow: those by gradient flow, ended at `time`
    anchor   what stays where the solver holds back: the experts' mean, the base's weights (base)
             or the sum of the changes; auto: base for pinv, else mean
    weight_exponent  p: expert t's covariance counts 1/‖D_t‖^2p
    top_k    share of the eigenvalues that solvers top_k and flow use; 0 for their participation
             ratio
    time     how long solver flow follows the gradient, in units of one over the trace's share of
             one expert
    pool    inputs: matrices that read the same input, such as q, k and v, are merged as one, stacked
            by rows

    Δ = Σ D_t C_t (Σ C_t)⁺ with C_t = F_tᵀF_t, F_t the round(density·out·in) largest entries of D_t, at
    least one; D_t itself stays whole. `merge_tact` of the paper's repository with `solver: pinv`; ours
    keeps the lowest flat indices of equal magnitudes, and by default a ridge towards the mean. What D_t
    changes outside the inputs that the F_t span is lost with pinv and anchor base, so one expert does
    not come back; with the mean for an anchor it does. Density 1 without `center` is actmat.

    Returns the merged delta, [out, in] in the stream's dtype. Raises MergeError for a NaN
    and an infinity.
    """
    # by the planner: what comes here is stacked already
    del pool
    return solve_normal_equations(
        deltas,
        solver=solver,
        ridge=ridge,
        anchor=anchor,
        weight_exponent=weight_exponent,
        top_k=top_k,
        time=time,
        density=density,
        center=center,
    )
