"""ACE-Merging: centred covariances, adaptive ridge, a collective prior. https://arxiv.org/abs/2603.02945"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method
from streammerge.solve.ace import solve_ace


@merge_method(
    paper="arXiv:2603.02945",
    needs_base=True,
    streams_by="matrix",
    cost="streammerge.solve.cost_covariance:ace",
    ranges={"epsilon": "(0, inf)", "k_frac": "[0, 1]"},
    checks={"k_frac": "streammerge.solve.limits:refinable"},
)
def ace(
    deltas: Deltas,
    *,
    epsilon: float = 1e-5,
    threshold: float = 0.3,
    k_frac: float = 0.3,
    compat: Literal["none", "paper"] = "none",
    pool: Literal["none", "inputs"] = "none",
) -> Tensor:
    """Merge by centred covariances and a ridge that adapts to the norms.

    epsilon    ridge of each expert's covariance, where the mean ‖D_t‖² is 1. The paper,
               without that unit: 4e-2 for GPT-2, 2e-4 for RoBERTa, 1e-5 otherwise
    threshold  spread of the experts' norms above which covariances are normalised and the result
               refined
    k_frac     share of the singular directions that are refined
    compat     paper: epsilon and the spread in the weights' own units, and unchanged experts count
    pool    inputs: matrices that read the same input, such as q, k and v, are merged as one, stacked
            by rows

    With D̃_t = D_t less its columns' means, Σ_t = D̃_tᵀD̃_t, q_t = tr Σ_t: where the norms are alike Σ̃_t = Σ_t,
    ε_t = ε, else Σ̃_t = Σ_t/q_t, ε_t = ε/q_t. Then Δ = (Σ D̃_t(Σ̃_t + ε_t))(Σ(Σ̃_t + ε_t) + 1c)⁻¹, c the row of
    column means of ΣΣ̃_t; and, where they are not alike, plus σ̄ U_k V_kᵀ of the top k = ⌊k_frac·min(out, in)⌋
    singular directions of Δ + Σ D_t(Σ̃_t - Σ̄), Σ̄ the mean of Σ̃_t + ε_t, σ̄ that of the k values.

    The matrix of the paper's inverse is not symmetric; ours is a Cholesky factor and a rank-one correction,
    and where T·out ≤ in that of the smaller system S Sᵀ. All of it is float64. By default the changes are
    measured in units of their root mean square norm over the experts, so that Δ scales with them; the
    spread is the squared variation coefficient of ‖D_t‖², where the paper's is that of log ‖D_t‖², which
    depends on the unit; ε_t is at most 1/in, Σ̃_t's own mean eigenvalue; at least one direction is refined; and
    experts that did not change the matrix, or only all its rows alike, are left out. In the paper an
    unchanged expert alone gives ε_t = 10¹²·ε, and a result a million times too large. A matrix of which
    centring leaves nothing, as of one row, is averaged. One expert does not come back exactly.

    Returns the merged delta, [out, in] in the stream's dtype. Raises MergeError for a NaN and an infinity.
    """
    # by the planner: what comes here is stacked already
    del pool
    return solve_ace(deltas, epsilon=epsilon, threshold=threshold, k_frac=k_frac, compat=compat)
