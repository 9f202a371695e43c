"""What a merge hands over: runs of output bytes, and what happened to each tensor."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from streammerge.errors import MergeError, StreamMergeError, quoted
from streammerge.step import COPY, Step

logger = logging.getLogger(__name__)


Facts = dict[str, float | int | str | bool]
"""What a method noted of a tensor for the report."""


@dataclass(slots=True)
class Outcome:
    """What happened to one tensor.

    facts          of a stack: the largest of each number, all texts that occurred, whether anything was true
    norm_ratio     norm of the merged delta over the experts' mean delta norm
    rounding_loss  norm of the output's rounding error over the norm of the merged delta
    changed        share of the elements whose output differs from the base's
    growth         norm of the merged delta over that of the expert that changed most
    non_finite     elements of the output that `non_finite: pass` let be NaN or infinite; a copy's own do not count
    non_finite_inputs  such elements of the inputs, of which a method may leave some out
    kind           the class of tensor that it is, a `TensorClass`'s value
    shape          as stored
    base_norm      norm of the base; None where nothing measured it: a copy, a merge without base, a device
    expert_norms   norm of each expert's delta, None where it overflowed; empty where there is no base
    """

    name: str
    method: str
    facts: Facts = field(default_factory=dict)
    norm_ratio: float | None = None
    rounding_loss: float | None = None
    changed: float | None = None
    growth: float | None = None
    non_finite: int = 0
    non_finite_inputs: int = 0
    seconds: float = 0.0
    kind: str = ""
    shape: list[int] = field(default_factory=list)
    base_norm: float | None = None
    expert_norms: list[float | None] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Its fields, not copied: `dataclasses.asdict` takes many times longer, and there is one for each tensor."""
        return {name: getattr(self, name) for name in _FIELDS}


_FIELDS = tuple(each.name for each in fields(Outcome))


@dataclass(slots=True)
class Block:
    """A run of output bytes. `release` gives its memory back; `outcome` comes with a tensor's last run."""

    name: str
    offset: int
    data: memoryview
    release: Callable[[], None]
    outcome: Outcome | None = None


def add_facts(facts: Facts, more: Mapping[str, float | int | str | bool]) -> None:
    """Add what was noted of one more matrix of a tensor; the order in which they come does not matter."""
    for name, value in more.items():
        known = facts.get(name, value)
        if isinstance(known, str) or isinstance(value, str):
            facts[name] = "; ".join(sorted({*str(known).split("; "), *str(value).split("; ")}))
        else:
            facts[name] = max(known, value)


# in place of an expert's number: the base or, without one, the first expert as it is
ORIGIN = -1


class Norms:
    """Squared norms of each expert's delta and of their origin, summed block by block; infinite where they overflow.

    measured    elements of each expert, and of the origin, that were measured: in one pass, not in each

    `non_finite` counts the inputs' elements of which `non_finite: pass` made none an error.
    """

    def __init__(self, experts: int) -> None:
        self.squared = [0.0] * experts
        self.measured = [0] * (experts + 1)
        self.origin_squared = 0.0
        self.non_finite = 0

    def begin(self, index: int, first_element: int, elements: int) -> bool:
        """Whether an expert, or ORIGIN, was measured whole; a pass that begins measures what was not from the start."""
        whole = self.measured[index] >= elements
        if first_element == 0 and not whole:
            self.measured[index] = 0
            if index == ORIGIN:
                self.origin_squared = 0.0
            else:
                self.squared[index] = 0.0
        return whole

    def of_piece(self, first_element: int, elements: int) -> Norms:
        """Sums for a piece that another thread works on, which measure what these did not; to be added in order."""
        piece = Norms(len(self.squared))
        for index in (*range(len(self.squared)), ORIGIN):
            if self.begin(index, first_element, elements):
                piece.measured[index] = elements
        return piece

    def add(self, piece: Norms, elements: int) -> None:
        """Add a piece's sums."""
        self.origin_squared += piece.origin_squared
        self.non_finite += piece.non_finite
        for index in range(len(self.squared)):
            self.squared[index] += piece.squared[index]
        for index, known in enumerate(self.measured):
            if known < elements:
                self.measured[index] = known + piece.measured[index]

    @property
    def mean(self) -> float:
        """The experts' mean norm."""
        return sum(math.sqrt(s) for s in self.squared) / len(self.squared)


class Tally:
    """Sums over a tensor's blocks that its outcome is made of."""

    def __init__(self, step: Step) -> None:
        self.outcome = Outcome(step.name, step.method, kind=step.role.kind.value, shape=list(step.shape))
        self.norms = Norms(len(step.experts))
        self._step = step
        self._merged_squared = 0.0
        self._lost_squared = 0.0
        self._changed = 0

    def count(self, changed: float, merged_squares: float, lost_squares: float) -> None:
        """Add a block that was rounded: see `streammerge_kernels.apply.Applied`."""
        self._changed += int(changed)
        self._merged_squared += merged_squares
        self._lost_squared += lost_squares

    def settled(self) -> Outcome:
        """The outcome, with what the sums say where there is a base to compare with."""
        self.outcome.non_finite_inputs = self.norms.non_finite
        if self._step.base is not None and self._step.method != COPY:
            norm = math.sqrt(self._merged_squared)
            self.outcome.norm_ratio = _ratio(norm, self.norms.mean)
            self.outcome.growth = _ratio(norm, math.sqrt(max(self.norms.squared)))
            self.outcome.rounding_loss = _ratio(math.sqrt(self._lost_squared), norm) if norm else 0.0
            self.outcome.changed = self._changed / self._step.elements
            self.outcome.base_norm = _finite(math.sqrt(self.norms.origin_squared)) or None
            self.outcome.expert_norms = [_finite(math.sqrt(squared)) for squared in self.norms.squared]
        return self.outcome


class naming:
    """A context that adds the step to an error that does not tell of it, a bug's: it keeps its traceback."""

    __slots__ = ("_step",)

    def __init__(self, step: Step) -> None:
        self._step = step

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, (StreamMergeError, torch.OutOfMemoryError)):
            note = f"while merging {quoted(self._step.name)} by {quoted(self._step.method)}"
            # add_note: from Python 3.11
            getattr(error, "add_note", logger.error)(note)


def refuse_overflow(step: Step, bad: int) -> None:
    """Raise MergeError where `bad` elements of the output are not finite though the inputs were.

    Where the recipe lets them pass nothing is raised.
    """
    if bad and not step.passes_non_finite:
        by = "" if step.method == COPY else f" merged by {quoted(step.method)}"
        raise MergeError(
            f"{quoted(step.name)}{by} leaves the range of {step.dtype} in {bad} elements",
            hint="Choose a wider `out_dtype`, such as float32, or another method.",
        )


def refuse_non_finite(values: Tensor, step: Step, model: str, first_element: int) -> int:
    """Raise MergeError naming the first NaN or infinity; large finite values pass.

    Where the recipe lets them pass, and the method merges each element by itself, returns how many there are.

    values         a run of the tensor as stored, in its order
    first_element  where in the flattened tensor the run begins
    """
    values = values.flatten()
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad) == 0 or step.method == COPY:
        return 0
    if step.passes_non_finite and step.element_by_element:
        return len(bad)
    flat = int(bad[0]) + first_element
    index = []
    for size in reversed(step.shape):
        index.append(flat % size)
        flat //= size
    if step.matrix is not None:
        index.append(step.matrix)
    kind = "NaN" if torch.isnan(values[int(bad[0])]) else "an infinity"
    raise MergeError(
        f"{quoted(step.name)} in {quoted(model)} holds {kind} at {index[::-1]}",
        hint=f"{quoted(step.method)} needs the whole tensor, and `non_finite: pass` is for methods that merge each "
        "element by itself: choose one, such as `linear`, by a rule that matches this name."
        if step.passes_non_finite
        else "The checkpoint is damaged or its training diverged. Fetch it again, or leave it out.",
    )


def _finite(norm: float) -> float | None:
    return norm if math.isfinite(norm) else None


def _ratio(part: float, whole: float) -> float | None:
    # of norms that overflowed there is none, and JSON has no word for it
    return part / whole if whole and math.isfinite(part) and math.isfinite(whole) else None
