"""Methods that ask for the experts in ways the plan did not foresee, and one that knows its axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method
from streammerge.solve.cost import Cost

NAMES = (
    "mean",
    "three_times",
    "backwards",
    "side_by_side",
    "asks_twice",
    "stops_early",
    "never_asks",
    "plans_two_takes_one",
    "leans_on_columns",
    "returns_a_view",
    "overdraws",
    "raises",
    "centres_rows",
)


def one_pass(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    return Cost(workspace_bytes=3 * shape[0] * shape[1] * itemsize, flops=shape[0] * shape[1], passes=1)


def two_passes(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    return Cost(workspace_bytes=3 * shape[0] * shape[1] * itemsize, flops=shape[0] * shape[1], passes=2)


@merge_method(needs_base=True, streams_by="matrix", cost="tests.odd_methods:one_pass")
def mean(deltas: Deltas) -> Tensor:
    """Average the changes, as planned."""
    merged = deltas.zeros(*deltas.shape)
    for delta in deltas:
        merged.add_(delta.dense())
    return merged.div_(deltas.experts)


@merge_method(needs_base=True, streams_by="matrix", cost="tests.odd_methods:one_pass")
def three_times(deltas: Deltas) -> Tensor:
    """Average over three passes where one was planned."""
    merged = deltas.zeros(*deltas.shape)
    for _ in range(3):
        for delta in deltas:
            merged.add_(delta.dense())
    return merged.div_(3 * deltas.experts)


@merge_method(needs_base=True, streams_by="matrix", cost="tests.odd_methods:one_pass")
def backwards(deltas: Deltas) -> Tensor:
    """Average from the last expert to the first."""
    merged = deltas.zeros(*deltas.shape)
    for delta in reversed(list(deltas)):
        merged.add_(delta.dense())
    return merged.div_(deltas.experts)


@merge_method(needs_base=True, streams_by="matrix", cost="tests.odd_methods:one_pass")
def side_by_side(deltas: Deltas) -> Tensor:
    """Average two passes that run at the same time."""
    merged = deltas.zeros(*deltas.shape)
    other = deltas.empty(*deltas.shape)
    for first, second in zip(deltas, deltas, strict=True):
        merged.add_(first.dense()).add_(second.dense(other))
    return merged.div_(2 * deltas.experts)


@merge_method(needs_base=True, streams_by="matrix", cost="tests.odd_methods:one_pass")
def asks_twice(deltas: Deltas) -> Tensor:
    """Average, asking each expert twice for its change."""
    merged = deltas.zeros(*deltas.shape)
    for delta in deltas:
        merged.add_(delta.dense())
        merged.add_(delta.dense())
    return merged.div_(2 * deltas.experts)


@merge_method(needs_base=True, streams_by="matrix", cost="tests.odd_methods:one_pass")
def stops_early(deltas: Deltas) -> Tensor:
    """Take the first expert's change and read no further."""
    return next(iter(deltas)).dense()


@merge_method(needs_base=True, streams_by="matrix", cost="tests.odd_methods:one_pass")
def never_asks(deltas: Deltas) -> Tensor:
    """Keep the base."""
    return deltas.zeros(*deltas.shape)


@merge_method(needs_base=True, streams_by="matrix", cost="tests.odd_methods:two_passes")
def plans_two_takes_one(deltas: Deltas) -> Tensor:
    """Average in one pass where two were planned."""
    return mean(deltas)


@merge_method(needs_base=True, streams_by="matrix", cost="tests.odd_methods:one_pass")
def leans_on_columns(deltas: Deltas) -> Tensor:
    """Average, each input's column scaled by its number: a transposed matrix gives another result."""
    return mean(deltas).mul_(torch.arange(deltas.shape[1], dtype=deltas.dtype))


@merge_method(needs_base=True, streams_by="matrix", cost="tests.odd_methods:one_pass")
def returns_a_view(deltas: Deltas) -> Tensor:
    """Average into a buffer whose rows lie apart."""
    wide = deltas.zeros(deltas.shape[0], 2 * deltas.shape[1])
    return wide[:, ::2].copy_(mean(deltas))


@merge_method(needs_base=True, streams_by="matrix", cost="tests.odd_methods:one_pass")
def overdraws(deltas: Deltas) -> Tensor:
    """Average, taking ten times the workspace that was planned."""
    for _ in range(30):
        deltas.empty(*deltas.shape).fill_(float("nan"))
    return mean(deltas)


@merge_method(needs_base=True, streams_by="matrix", cost="tests.odd_methods:one_pass")
def raises(deltas: Deltas) -> Tensor:
    """Give up at the second expert of a layer-1 matrix."""
    for delta in deltas:
        delta.dense()
        if delta.index == 1 and ".layers.1." in deltas.name:
            raise ZeroDivisionError("a method's own mistake")
    return deltas.zeros(*deltas.shape)


@merge_method(needs_base=True, streams_by="matrix", cost="tests.odd_methods:two_passes")
def centres_rows(deltas: Deltas, *, pool: str = "none") -> Tensor:
    """Add what all rows have in common: the answer of a matrix depends on all rows it is stacked with."""
    merged = deltas.zeros(*deltas.shape)
    for delta in deltas:
        change = delta.dense()
        merged.add_(change).add_(change.mean(dim=0))
    deltas.note(rows=deltas.shape[0])
    return merged
