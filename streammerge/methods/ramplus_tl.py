"""RAM+: as RAM, with what only one expert changed amplified. https://arxiv.org/abs/2601.13572"""

from __future__ import annotations

from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method
from streammerge.solve.sharing import merge_by_sharing


@merge_method(
    paper="arXiv:2601.13572",
    needs_base=True,
    streams_by="element",
    cost="streammerge.solve.cost_geometry:counts",
    look="streammerge.solve.sharing:SharingLook",
    ranges={"epsilon": "[0, inf)"},
)
def ramplus_tl(deltas: Deltas, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5) -> Tensor:
    """Average entries that several experts changed, amplify those that one did.

    r        how much to amplify, by the expert's shared entries over its own
    alpha    the most that this ratio counts
    epsilon  an entry counts as changed where it moved by more than this

    As `ram`, but for each tensor an expert's own entries are multiplied by 1 + r · min(shared / own, alpha), from how
    many entries it changed that others changed, too, and that no other did: what averaging takes from the shared
    ones. As in mergekit. Returns the merged delta, [*shape].
    """
    shared, own = deltas.seen.shared, deltas.seen.own
    ratios = [min(s / o, alpha) if o else 0.0 for s, o in zip(shared, own, strict=True)]
    return merge_by_sharing(deltas, epsilon, [1.0 + r * max(ratio, 0.0) for ratio in ratios])
