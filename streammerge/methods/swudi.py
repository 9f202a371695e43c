"""SWUDI: gradient flow on WUDI's loss, in closed form by its spectrum. https://arxiv.org/abs/2606.07289"""

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
    cost="streammerge.solve.cost_covariance:swudi",
    thin="streammerge.solve.thin:swudi",
    thin_cost="streammerge.solve.cost_thin:thin_cost",
    ranges={"time": "(0, inf)", "top_k": "[0, 1]"},
)
def swudi(
    deltas: Deltas,
    *,
    time: float = 300.0,
    top_k: float = 0.65,
    anchor: Literal["mean", "base", "sum"] = "sum",
    lambda_: float = 1.0,
    pool: Literal["none", "inputs"] = "none",
) -> Tensor:
    """Follow WUDI's gradient for a set time, in closed form.

    time    how long, with covariances of trace one; the paper takes 300 to 1800
    top_k   share of the eigenvalues that move, the largest; 0 for their participation ratio
    anchor  where it starts: the experts' mean, nothing (base), or the sum of their changes
    lambda  factor of the merged change
    pool    inputs: matrices that read the same input, such as q, k and v, are merged as one, stacked
            by rows

    Δ = Θ + (N - ΘA) V diag(f/λ) Vᵀ, A = Σ C_t/‖D_t‖² = V diag(λ) Vᵀ, N = Σ D_t C_t/‖D_t‖², Θ = Σ D_t and
    f = 1 - exp(-λ·time) on the ⌈in·top_k⌉ largest λ, 0 on the others: gradient flow on
    Σ ‖(Δ - D_t) D_tᵀ‖²/‖D_t‖² where WUDI takes Adam's steps. The paper's settings: ViT-B/32 1300 and
    0.65, B/16 1800; Llama 300 and 0.85; Qwen2-VL 1300, 0.01 and lambda 0.2. Its code raises eigenvalues
    below 1e-8 to that; here they are left as they are, and nothing divides by them. Experts that did
    not change a matrix do not count in it, and where T·out ≤ in the spectrum is that of the smaller
    system.

    Returns the merged delta, [out, in] in the stream's dtype. Raises MergeError for a NaN
    and an infinity.
    """
    # by the planner: what comes here is stacked already
    del pool
    merged = solve_normal_equations(deltas, solver="flow", anchor=anchor, weight_exponent=1.0, top_k=top_k, time=time)
    return merged if lambda_ == 1.0 else merged.mul_(lambda_)
