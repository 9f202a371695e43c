"""FroM: average the experts' changes by powers of their norms. https://arxiv.org/abs/2506.02478"""

from __future__ import annotations

import math

from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method


@merge_method(
    paper="arXiv:2506.02478",
    needs_base=True,
    streams_by="element",
    cost="streammerge.solve.cost_geometry:norms",
    look="streammerge.solve.geometry:Norms",
    ranges={"k": "[0, inf)"},
)
def from_(deltas: Deltas, *, k: float = 1.0) -> Tensor:
    """Average the experts' changes, each weighted by a power of its norm.

    k  the power: 0 is the average, and the more, the more do large changes count

    Δ = Σ ‖D_t‖ᵏ D_t / Σ ‖D_t‖ᵏ for each tensor, the minimiser of Σ ‖D_t‖ᵏ ‖Δ - D_t‖². The paper tunes k, and its
    default here is ours; its variant for LoRA factors is not this one. With k > 0 experts that did not change a
    tensor do not count. There is no such method in mergekit.

    Returns the merged delta, [*shape].
    """
    if k == 0.0:
        return deltas.weighted_sum([1 / deltas.experts] * deltas.experts)
    largest = max(deltas.seen.norms)
    if largest == 0.0:
        return deltas.zeros(*deltas.shape)
    powers = [(norm / largest) ** k for norm in deltas.seen.norms]
    return deltas.weighted_sum([power / math.fsum(powers) for power in powers])
