"""Arcee Fusion: take over the changes that stand out. https://arxiv.org/abs/2403.13257"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method
from streammerge.solve.outliers import narrow_scores, scores


@merge_method(
    paper="arXiv:2403.13257",
    needs_base=True,
    streams_by="row",
    experts=(1, 1),
    cost="streammerge.solve.cost_geometry:quartiles",
    look="streammerge.solve.outliers:QuartileLook",
)
def arcee_fusion(deltas: Deltas, *, compat: Literal["none", "mergekit"] = "none") -> Tensor:
    """Take over those of one model's changes whose importance stands out.

    compat  mergekit: importances computed in float32, of small changes rounding noise

    The importance of an entry is |D| times KL(softmax(W_1) ‖ softmax(W_0)) of its row, the last dimension; what
    reaches the median + 1.5 (Q_3 - Q_1) of the tensor's importances is taken over: Δ = D there, else 0. Quantiles
    are order statistics, of index ⌊q (n - 1)⌋. The method, its 1e-8 added to each probability and the paper are
    mergekit's, which computes in float32, where the divergence of small changes is rounding, often negative:
    for changes of 1e-4 it took over twice as many entries as the definition does. Ours is computed in float64,
    not below 0, and the importances kept in float32. With `compat: mergekit` torch's float32 decides, so that another
    device, or another release of torch, may take over other entries.

    Returns the merged delta, [*shape].
    """
    important = (narrow_scores if compat == "mergekit" else scores)(deltas).double() >= deltas.seen.threshold
    (delta,) = deltas
    return torch.where(important.view(deltas.shape), delta.dense(), 0.0)
