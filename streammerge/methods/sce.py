"""SCE: select by variance, calculate weights by energy, erase minority signs. https://arxiv.org/abs/2408.07990"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method
from streammerge.solve.selection import erased


@merge_method(
    paper="arXiv:2408.07990",
    needs_base=True,
    streams_by="element",
    cost="streammerge.solve.cost_geometry:sce",
    look="streammerge.solve.selection:SceLook",
    ranges={"select_topk": "[0, 1]"},
)
def sce(deltas: Deltas, *, select_topk: float = 1.0, compat: Literal["none", "mergekit"] = "none") -> Tensor:
    """Average the changes that agree in sign, weighted by each expert's energy.

    select_topk  share of the entries kept, those on which the experts differ most; of the entries on which they do
    compat       mergekit: equal weights where the changes' mean squares sum to less than 1e-6, and a floor of 1e-6
                 for the sum of weights that an entry is divided by

    Select: keep the ⌊select_topk · n⌋ entries of largest variance over the experts, n of which have any; of equal ones
    those of the lowest index; at 1 all are kept. Calculate: w_t = ‖D_t‖² / Σ ‖D_t‖² over the kept entries of each
    tensor. Erase: γ = sign(Σ D_t), + where it is 0; Δ = Σ w_t D_t / Σ w_t over the experts with D_t of sign γ.
    The paper's section 3.3, as mergekit reads it, but with no absolute floors: mergekit's equal weights are taken
    for all changes of less than about 5e-4, which is most fine-tuning. Variances are ranked as float32 holds them.

    Returns the merged delta, [*shape].
    """
    return erased(deltas, as_mergekit=compat == "mergekit")
