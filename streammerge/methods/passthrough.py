"""One model's weights as they are. https://arxiv.org/abs/2403.13257"""

from __future__ import annotations

from torch import Tensor

from streammerge.delta import Deltas, PerExpert
from streammerge.methods import merge_method
from streammerge.solve.geometry import combined


@merge_method(paper="arXiv:2403.13257", needs_base=False, streams_by="element", experts=(1, 1))
def passthrough(deltas: Deltas, *, scale: PerExpert = 1.0) -> Tensor:
    """Take one model's weights, scaled.

    scale  factor of the weights

    W = scale · W_1, whether or not there is a base model; the paper is mergekit's. Returns the merged delta, [*shape].
    """
    (factor,) = deltas.per_expert(scale)
    return combined(deltas, factor - 1.0, [factor])
