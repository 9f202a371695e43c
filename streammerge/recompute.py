"""Merge a sample of a folder's tensors again in float64, and compare it with what is stored.

What a tensor that is merged again may differ by, element by element and then in all:

- the rounding of the output's dtype: half a unit in the last place, a whole one where `rounding: stochastic` drew it;
- the arithmetic: 2⁻²³ of the element, where the merge's was float32, and for the whole tensor 1e-4 of the merged
  change's norm, or three times the certificate that the solver gave, 1e-3 more where an accelerator packed the changes
  into eleven bits;
- a threshold, a vote or an eigenvalue's cut that float32 decides otherwise than float64: a tensor that float64 does not
  explain is merged once more in the merge's own precision, and a note says so where that explains it.

Random methods draw by the recipe's seed, the tensor's name and the element's place, so the draws are the same.

The limit: the reference is the program itself. The plan, the reading, the rules that choose a method and the methods'
formulas are those of a merge, so what is wrong in them is wrong here too; only the tests hold them against formulas
written a second time. What differs: float64 throughout, where no solve begins in float32 and nothing is packed; the
engine of host memory, wherever the merge ran; and, where the budget allows, blocks of whole tensors, so that a seam
between the merge's blocks shows.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from streammerge.budget import available_memory_bytes
from streammerge.checkpoint import ByteFile, Checkpoint, Storage, TensorEntry
from streammerge.derived import DerivedEntry
from streammerge.errors import quoted
from streammerge.memory import fit_memory
from streammerge.plan import Plan, make_plan
from streammerge.recipe import Recipe
from streammerge.step import Step
from streammerge.stream import Stream
from streammerge.torch_dtypes import TORCH_DTYPES

_ARITHMETIC = 1e-4
_CERTIFICATES = 3.0
_PACKED = 1e-3


@dataclass(slots=True)
class Findings:
    """What a verification found: what is wrong, what is told and not judged, what could not be checked and why."""

    problems: list[str]
    notes: list[str]
    unchecked: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputed:
    """One tensor merged again in float64.

    difference  norm of what rounding does not explain, over the norm of the merged change
    allowed     how much of that the arithmetic may explain
    """

    name: str
    method: str
    kind: str
    difference: float
    allowed: float


def recompute(
    recipe: Recipe,
    report: Mapping[str, Any],
    model: Checkpoint,
    storage: Storage,
    count: int,
    seed: int,
    memory_bytes: int | None,
    findings: Findings,
) -> tuple[Recomputed, ...]:
    """Merge `count` of a report's tensors again and add to `findings` what they show.

    recipe        the report's, with its inputs
    model         the folder that the report lies in
    seed          which tensors
    memory_bytes  the budget; half of what is available when None

    Raises MergeError where the inputs cannot be merged, PlanError where the budget is too small.
    """
    told = {tensor["name"]: tensor for tensor in report["tensors"]}
    plan = _plan_of(recipe, "float64", storage)
    own = {step.name: step for step in _plan_of(recipe, None, storage).steps}
    there = []
    for step in plan.steps:
        entry, method = model.tensors.get(step.name), told.get(step.name, {}).get("method")
        if own[step.name].scheme is not None:
            # the codes of what merging again gives would say little of how well it was merged
            findings.unchecked.append(f"{quoted(step.name)} is stored in 8 bits: it was not merged again")
        elif entry is None or entry.shape != step.shape or entry.dtype != own[step.name].dtype:
            wanted = f"{own[step.name].dtype} {list(step.shape)}"
            seen = f"{entry.dtype} {list(entry.shape)}" if entry else "not there"
            findings.problems.append(f"{quoted(step.name)} is {seen}, and the recipe gives {wanted}")
        elif method != step.method:
            findings.problems.append(
                f"{quoted(step.name)} was merged by {quoted(method)}, and the recipe gives {quoted(step.method)}"
            )
        else:
            there.append(step)
    sample = sampled(there, count, seed)
    budget = available_memory_bytes() // 2 if memory_bytes is None else memory_bytes
    compared = _Comparison(model, storage, report, own)
    first = {each.name: each for each in compared.run(plan, sample, budget)}
    again = [step for step in sample if first[step.name].difference > first[step.name].allowed]
    if again:
        narrow = _plan_of(recipe, "float32", storage)
        names = {step.name for step in again}
        steps = [step for step in narrow.steps if step.name in names]
        for each in compared.run(narrow, steps, budget):
            differs = first[each.name]
            line = f"{quoted(each.name)} ({each.method}) differs from what float64 gives by {differs.difference:.1e} of"
            if each.difference <= each.allowed:
                findings.notes.append(f"{line} its change, and is what float32 gives: a threshold or cut lies between")
            else:
                findings.problems.append(
                    f"{line} its change, {differs.allowed:.1e} allowed: it is not what the recipe and inputs give"
                )
    return tuple(first[step.name] for step in sample)


def _plan_of(recipe: Recipe, dtype: str | None, storage: Storage) -> Plan:
    changes: dict[str, Any] = {} if dtype is None else {"out_dtype": dtype, "rounding": "nearest"}
    # the budget is for what is merged again, which is not known yet
    return make_plan(replace(recipe, past=None, **changes), storage, memory_bytes=1 << 60)


def sampled(steps: Sequence[Step], count: int, seed: int) -> list[Step]:
    """`count` steps in the order of the plan, drawn by `seed`: one of each method and class as far as they reach."""

    def labels(step: Step) -> set[tuple[str, str]]:
        return {("method", step.method), ("class", step.role.kind.value)}

    left = sorted(steps, key=lambda step: hashlib.sha256(f"{seed}\0{step.name}".encode()).digest())
    drawn: list[Step] = []
    missing = Counter(label for step in steps for label in labels(step))
    while missing and len(drawn) < count:
        # what is rare first: it often brings along what is common
        best = max(left, key=lambda step: sum(1 / missing[label] for label in labels(step) & missing.keys()))
        left.remove(best)
        drawn.append(best)
        for label in labels(best):
            missing.pop(label, None)
    names = {step.name for step in (*drawn, *left[: max(count - len(drawn), 0)])}
    return [step for step in steps if step.name in names]


def _restricted(plan: Plan, sample: Sequence[Step], budget_bytes: int) -> Plan:
    """The plan for a sample alone: with the rest of its pools, and what its methods look at."""
    names, pools = {step.name for step in sample}, {step.pool for step in sample if step.pool}
    looking = {step.method for step in sample if step.looks_at_model}
    steps = tuple(
        step
        for step in plan.steps
        if step.name in names or step.pool in pools or (step.looks_at_model and step.method in looking)
    )
    return replace(plan, steps=steps, memory=fit_memory(steps, budget_bytes, whole=True))


class _Comparison:
    """What a plan gives beside what is stored, tensor by tensor, block by block."""

    def __init__(self, model: Checkpoint, storage: Storage, report: Mapping[str, Any], own: Mapping[str, Step]) -> None:
        self._model, self._storage, self._own = model, storage, own
        self._told = {tensor["name"]: tensor for tensor in report["tensors"]}
        self._packed = not str(report.get("device", "cpu")).startswith("cpu")
        self._units = 1.0 if report.get("recipe", {}).get("rounding") == "stochastic" else 0.5

    def run(self, plan: Plan, sample: Sequence[Step], budget_bytes: int) -> Iterator[Recomputed]:
        """Merge a sample of a plan's steps again, by itself."""
        if not sample:
            return
        steps = {step.name: step for step in sample}
        plan = _restricted(plan, sample, budget_bytes)
        files = _Files(self._storage)
        try:
            with Stream(plan, self._storage, skip={step.name for step in plan.steps} - steps.keys()) as stream:
                excess, change = 0.0, 0.0
                for block in stream:
                    step = steps[block.name]
                    squares = self._block(plan, step, block.offset, block.data, files)
                    excess, change = excess + squares[0], change + squares[1]
                    block.release()
                    if block.outcome is not None:
                        yield self._settled(step, excess, change)
                        excess, change = 0.0, 0.0
        finally:
            files.close()

    def _settled(self, step: Step, excess: float, change: float) -> Recomputed:
        difference = 0.0 if excess == 0.0 else math.sqrt(excess / change) if change > 0.0 else math.inf
        facts = self._told[step.name].get("facts") or {}
        certificate = facts.get("certificate", 0.0)
        certificate = float(certificate) if isinstance(certificate, (int, float)) else 0.0
        return Recomputed(
            name=step.name,
            method=step.method,
            kind=step.role.kind.value,
            # NaN where both overflowed
            difference=math.inf if math.isnan(difference) else difference,
            allowed=max(_ARITHMETIC, _CERTIFICATES * certificate) + (_PACKED if self._packed else 0.0),
        )

    def _block(self, plan: Plan, step: Step, offset: int, data: memoryview, files: _Files) -> tuple[float, float]:
        """Squares of what rounding does not explain, and of the merged change, of one run."""
        if len(data) == 0:
            return 0.0, 0.0
        expected = torch.frombuffer(data, dtype=TORCH_DTYPES[step.dtype])
        first = offset // expected.element_size()
        entry, origin = self._model.tensors[step.name], step.base or step.experts[0]
        stored = files.read(self._model.location, entry, first, expected.numel())
        if not expected.is_floating_point():
            return float(torch.count_nonzero(stored != expected)), 0.0
        before = files.read(plan.models[step.models[0]].location, origin, first, expected.numel())
        expected, kind = expected.double(), TORCH_DTYPES[entry.dtype]
        wide = self._own[step.name].compute_bytes == 8
        excess = unexplained(stored.double(), expected, kind, units=self._units, wide=wide)
        change = expected - before.double()
        change = change[torch.isfinite(change)]
        return float(excess.square().sum()), float(change.square().sum())


def unexplained(stored: Tensor, expected: Tensor, dtype: torch.dtype, *, units: float, wide: bool) -> Tensor:
    """How far each element is from `expected`, less what rounding may do: 0 where that is all. Infinite for a NaN.

    stored, expected  [n] float64; `stored` holds values of `dtype`
    units             how far rounding goes, in units of the last place
    wide              the arithmetic before it was float64's
    """
    limits = torch.finfo(dtype)
    larger = torch.maximum(stored.abs(), expected.abs())
    _, exponent = torch.frexp(larger)
    smallest = math.frexp(limits.tiny)[1]
    unit = torch.ldexp(torch.full_like(larger, limits.eps), exponent.clamp(min=smallest) - 1)
    slack = units * unit + larger * (2.0**-52 if wide else 2.0**-23)
    excess = ((stored - expected).abs() - slack).clamp(min=0.0)
    both_nan = stored.isnan() & expected.isnan()
    # what the dtype cannot hold became infinite, with its sign
    beyond = stored.isinf() & (expected.abs() >= limits.max) & (stored.sign() == expected.sign())
    excess[both_nan | beyond] = 0.0
    return torch.nan_to_num(excess, nan=math.inf, posinf=math.inf)


class _Files:
    """Files that runs are read from, open until the end."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._open: dict[tuple[str, str], ByteFile] = {}

    def read(self, location: str, entry: TensorEntry, first: int, elements: int) -> Tensor:
        """`elements` elements of a tensor from number `first` on, in memory of their own."""
        if isinstance(entry, DerivedEntry):
            values = torch.empty(elements, dtype=TORCH_DTYPES[entry.dtype])
            entry.derivation.fill(entry, values, first, partial(self.read, location))
            return values
        location = entry.location or location
        key = location, entry.file
        if key not in self._open:
            self._open[key] = self._storage.open(location, entry.file)
        dtype = TORCH_DTYPES[entry.dtype]
        nbytes, offset = elements * dtype.itemsize, entry.offset + first * dtype.itemsize
        data = self._open[key].fetch(offset, nbytes, memoryview(bytearray(nbytes)))
        values = torch.frombuffer(bytearray(data), dtype=dtype)
        self._open[key].release(offset, nbytes)
        return values

    def close(self) -> None:
        for file in self._open.values():
            file.close()
