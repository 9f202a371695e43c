"""Methods that take a device's memory: the tests say how much there is."""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method

NAMES = ("wants_elements", "wants_matrix")


class Room:
    """Elements that fit, and how many tries had what they wanted; `tries` that fail first, whatever they want."""

    elements = 1 << 40
    failing_tries = 0
    experts_kept = True
    seen: list[int] = []  # noqa: RUF012 - reset by the tests that use it


def take(elements: int) -> None:
    Room.seen.append(elements)
    if Room.failing_tries:
        Room.failing_tries -= 1
        raise torch.OutOfMemoryError("device out of memory")
    if elements > Room.elements:
        raise torch.OutOfMemoryError("device out of memory")


@merge_method(needs_base=True, streams_by="element")
def wants_elements(deltas: Deltas) -> Tensor:
    """Sum the changes."""
    take(deltas.base().numel())
    return deltas.weighted_sum([1.0] * deltas.experts)


@merge_method(needs_base=True, streams_by="matrix", cost="tests.odd_methods:one_pass")
def wants_matrix(deltas: Deltas) -> Tensor:
    """Sum the changes; room for all experts at once only where the stream keeps them."""
    kept = not callable(getattr(deltas, "_moving", None))
    take(deltas.base().numel() * (1 + deltas.experts * kept))
    merged = deltas.zeros(*deltas.shape)
    for delta in deltas:
        merged.add_(delta.dense())
    return merged
