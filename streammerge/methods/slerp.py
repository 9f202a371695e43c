"""Spherical interpolation from the base to one model. https://en.wikipedia.org/wiki/Slerp"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method
from streammerge.solve.geometry import NEARLY_PARALLEL, arc, combined, wedge


@merge_method(
    paper="arXiv:2403.13257",
    needs_base=True,
    streams_by="element",
    experts=(1, 1),
    cost="streammerge.solve.cost_geometry:weight_gram",
    look="streammerge.solve.geometry:WeightGram",
)
def slerp(deltas: Deltas, *, t: float = 0.5, compat: Literal["none", "mergekit"] = "none") -> Tensor:
    """Turn the base's weights towards one model's along the arc between them.

    t       how far to go: 0 is the base, 1 the model; beyond, the arc goes on
    compat  mergekit: a tensor that is all zero in one model counts as orthogonal to the other's

    W = (sin((1 - t)θ) W_0 + sin(tθ) W_1) / sin θ with θ the angle between the flattened tensors W_0, of the base,
    and W_1, of the one model beside it; the paper is mergekit's. As there the line is straight where
    |cos θ| > 0.9995, which fine-tuned weights nearly always reach. Computed as a change from W_0, the angle from the
    float64 inner products of W_0 and W_1 - W_0. Where one tensor is all zero there is no angle and ours goes straight.

    Returns the merged delta, [*shape].
    """
    base, cross, moved = deltas.seen.gram[0, 0], deltas.seen.gram[0, 1], deltas.seen.gram[1, 1]
    surplus, share = arc(
        (base, base + 2 * cross + moved),
        base + cross,
        wedge(base, moved, cross),
        t,
        nearly_parallel=NEARLY_PARALLEL,
        zeros_are_orthogonal=compat == "mergekit",
    )
    return combined(deltas, surplus.item(), [share.item()])
