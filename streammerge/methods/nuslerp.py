"""Spherical interpolation between two models, or their changes from a base. https://arxiv.org/abs/2403.13257"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from streammerge.delta import Deltas, PerExpert
from streammerge.methods import merge_method
from streammerge.solve.pair_arc import along_arc


@merge_method(
    paper="arXiv:2403.13257",
    needs_base=False,
    takes_base=True,
    streams_by="row",
    experts=(2, 2),
    cost="streammerge.solve.cost_geometry:nuslerp",
    look="streammerge.solve.pair_arc:PairLook",
)
def nuslerp(
    deltas: Deltas,
    *,
    weight: PerExpert = 1.0,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    compat: Literal["none", "mergekit"] = "none",
) -> Tensor:
    """Turn one model's weights, or its changes from the base, towards another's.

    weight            share of each of the two models; only their ratio matters
    nuslerp_flatten   one angle for each tensor, else one for each row
    nuslerp_row_wise  with nuslerp_flatten off, one angle for each column instead, along the first dimension
    compat            mergekit: a vector that is all zero counts as orthogonal to the other

    t = w_2 / (w_1 + w_2), or ½ where the weights cancel, and v = (sin((1 - t)θ) v_1 + sin(tθ) v_2) / sin θ with θ the
    angle between v_1 and v_2: the changes of the two experts where there is a base model, which is none of the two,
    else their weights. As in mergekit, whose method this is and whose name for columns is `row_wise`. Angles come
    from float64 inner products. Where one vector is all zero there is no angle and ours goes straight.

    Returns the merged delta, [*shape].
    """
    first, second = deltas.per_expert(weight)
    t = second / (first + second) if math.fabs(first + second) > 1e-6 else 0.5
    grain = "tensor" if nuslerp_flatten else "columns" if nuslerp_row_wise else "rows"
    return along_arc(deltas, t, grain, zeros_are_orthogonal=compat == "mergekit")
