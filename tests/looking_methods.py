"""Methods that look at whole tensors, or at the whole model, before they merge; and one that works on rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method
from streammerge.solve.cost import Cost

NAMES = ("looks_twice", "looks_at_model", "looks_at_matrices", "by_rows", "adds_beside")


def three_passes(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    return Cost(workspace_bytes=0, flops=0, passes=1, looks=2)


def model_passes(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    return Cost(workspace_bytes=0, flops=0, passes=1, looks=2, look_scope="model")


def matrix_passes(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    return Cost(workspace_bytes=3 * shape[0] * shape[1] * itemsize, flops=0, passes=1, looks=2, look_scope="model")


class Counts:
    """Pass 0 counts the entries that grew, pass 1 those that grew by less than the share pass 0 found."""

    def __init__(self, deltas: Deltas, *, scale: float, pool: str = "none") -> None:
        self.scale = scale
        self.events: list[tuple[int, str, int]] = []
        self.elements = self.grown = self.small = 0

    def look(self, number: int, deltas: Deltas) -> None:
        self.events.append((number, deltas.name, deltas.first_element))
        for delta in deltas:
            change = delta.dense()
            if number == 0:
                self.elements += change.numel()
                self.grown += int((change > 0).sum())
            else:
                self.small += int(((change > 0) & (change < self.scale * self.grown / self.elements)).sum())

    def finish(self, number: int) -> None:
        self.events.append((number, "", -1))


@merge_method(needs_base=True, streams_by="element", cost="tests.looking_methods:three_passes",
              look="tests.looking_methods:Counts")  # fmt: skip
def looks_twice(deltas: Deltas, *, scale: float = 0.002) -> Tensor:
    """Sum the changes, times what the look counted."""
    seen = deltas.seen
    deltas.note(elements=seen.elements, small=seen.small)
    return deltas.weighted_sum([seen.small / seen.elements] * deltas.experts)


@merge_method(needs_base=True, streams_by="element", cost="tests.looking_methods:model_passes",
              look="tests.looking_methods:Counts")  # fmt: skip
def looks_at_model(deltas: Deltas, *, scale: float = 0.002) -> Tensor:
    """Sum the changes, times what the look counted in all tensors."""
    seen = deltas.seen
    deltas.note(elements=seen.elements, small=seen.small)
    return deltas.weighted_sum([seen.small / seen.elements] * deltas.experts)


@merge_method(needs_base=True, streams_by="matrix", cost="tests.looking_methods:matrix_passes",
              look="tests.looking_methods:Counts")  # fmt: skip
def looks_at_matrices(deltas: Deltas, *, scale: float = 0.002, pool: Literal["none", "inputs"] = "none") -> Tensor:
    """Sum the changes, times what the look counted in all matrices."""
    seen = deltas.seen
    deltas.note(elements=seen.elements, small=seen.small)
    return deltas.weighted_sum([seen.small / seen.elements] * deltas.experts)


@merge_method(needs_base=True, streams_by="row")
def by_rows(deltas: Deltas) -> Tensor:
    """Keep the largest change of each row."""
    merged = deltas.zeros(*deltas.shape)
    for delta in deltas:
        change = delta.dense()
        merged.add_(torch.where(change == change.amax(dim=1, keepdim=True), change, 0.0))
    return merged


@merge_method(needs_base=True, streams_by="element", beside="fisher")
def adds_beside(deltas: Deltas) -> Tensor:
    """Add up what lies beside the experts."""
    merged = deltas.zeros(*deltas.shape)
    for index in range(deltas.experts):
        found = deltas.beside(index)
        if found is not None:
            merged.add_(found)
    return merged
