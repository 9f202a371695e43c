"""NearSwap: go over to the other model where it is near. https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"""

from __future__ import annotations

from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method


@merge_method(paper="arXiv:2403.13257", needs_base=True, streams_by="element", experts=(1, 1))
def nearswap(deltas: Deltas, *, t: float = 0.0001) -> Tensor:
    """Move each of the base's weights towards one model's, but by no more than t.

    t  the largest change of a weight; 0 or less leaves the base

    W = W_0 + s D with s = min(t / |D|, 1) and D the change to the one model beside the base, which is D cut to
    [-t, t]. The paper is mergekit's. Returns the merged delta, [*shape].
    """
    (delta,) = deltas
    largest = max(t, 0.0)
    return delta.dense().clamp_(-largest, largest)
