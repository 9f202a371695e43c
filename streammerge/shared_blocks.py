"""Blocks that merges of a batch have in common: one merges them, and the others take its bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from streammerge.outcome import Facts, Norms
from streammerge.plan import Plan
from streammerge.remembered import Remembered
from streammerge.step import COPY, Step


class MergedPiece(NamedTuple):
    """What the report is made of: a piece's norms, what `Applied` counts, and what the method noted."""

    norms: Norms
    sums: list[float]
    facts: Facts


class SharedBlocks:
    """One step's blocks, to be recalled before they are merged, and kept after.

    Nothing is recalled, or kept, of a step that only one of the merges takes so; `remembered` is None where there is
    only one.
    """

    def __init__(self, remembered: Remembered | None, plan: Plan, step: Step) -> None:
        self._step, self._identity = step, _identity(plan, step) if remembered else None
        self._remembered = remembered if remembered and self._identity in remembered.same_steps else None

    def recall(self, first: int, out: Tensor) -> Sequence[MergedPiece] | None:
        """What another merge found of the block that begins at element `first`, whose bytes are written to `out`."""
        if self._remembered is None:
            return None
        found = self._remembered.recall(self._step, self._key(first, out))
        if found is None:
            return None
        merged, pieces = found
        out.copy_(merged)
        kept: Sequence[MergedPiece] = pieces
        return kept

    def keep(self, first: int, out: Tensor, pieces: Sequence[MergedPiece]) -> None:
        """To be called after each block that was asked for in vain."""
        if self._remembered is not None:
            self._remembered.keep(self._step, self._key(first, out), out.nbytes, lambda copy: (copy(out), pieces))

    def _key(self, first: int, out: Tensor) -> Hashable:
        # merges whose slots differ cut a tensor otherwise
        return self._identity, first, out.numel()


def same_steps(plans: Sequence[Plan]) -> frozenset[Hashable]:
    """Which steps by element or row more than one of the plans takes, all the same."""
    counts = Counter(identity for plan in plans for identity in _identities(plan))
    return frozenset(identity for identity, count in counts.items() if count > 1)


def _identities(plan: Plan) -> Iterable[Hashable]:
    for step in plan.steps:
        # what a look found is the merge's own, and copying is no faster another way
        by_element = not step.by_matrix and step.method != COPY
        if by_element and step.looks == 0 and not step.looks_at_model and not any(step.beside):
            yield _identity(plan, step)


def _identity(plan: Plan, step: Step) -> Hashable:
    """What tells apart two plans' ways to merge one tensor of the same models."""
    recipe = plan.recipe
    return step.name, step.method, repr(sorted(step.arguments.items())), step.dtype, recipe.rounding, recipe.seed
