"""Check a merged folder: its bytes against its report, its inputs, and some tensors against a merge in float64.

What a tensor that is merged again may differ by, element by element and then in all:

- the rounding of the output's dtype: half a unit in the last place, a whole one where `rounding: stochastic` drew it;
- the arithmetic: 2⁻²³ of the element, where the merge's was float32, and for the whole tensor 1e-4 of the merged
  change's norm, or three times the certificate that the solver gave, 1e-3 more where an accelerator packed the changes
  into eleven bits;
- a threshold, a vote or an eigenvalue's cut that float32 decides otherwise than float64: a tensor that float64 does not
  explain is merged once more in the merge's own precision, and a note says so where that explains it.

Random methods draw by the recipe's seed, the tensor's name and the element's place, so the draws are the same.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from streammerge.budget import available_memory_bytes
from streammerge.checkpoint import JSON_LIMIT_BYTES, ByteFile, Checkpoint, Storage, TensorEntry, load_checkpoint
from streammerge.compare import differences
from streammerge.errors import CheckpointError, MergeError, OutputError, quoted
from streammerge.folder import REPORT_NAME
from streammerge.journal import JOURNAL
from streammerge.memory import fit_memory
from streammerge.owners import roles_from_model
from streammerge.plan import Plan, changed_files, make_plan
from streammerge.recipe import Recipe
from streammerge.report import parse_report
from streammerge.rules import TensorClass, roles
from streammerge.step import COPY, Step
from streammerge.stream import Stream
from streammerge.torch_dtypes import TORCH_DTYPES

_BLOCK_BYTES = 8 << 20
_ARITHMETIC = 1e-4
_CERTIFICATES = 3.0
_PACKED = 1e-3


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What verifying found; `problems` is empty for a folder that is as it was written.

    notes      what is told and not judged
    unchecked  what could not be checked, and why
    """

    tensors: int
    read_bytes: int
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    recomputed: tuple[Recomputed, ...] = ()


@dataclass(slots=True)
class _Findings:
    problems: list[str]
    notes: list[str]
    unchecked: list[str]


def verify(
    location: str,
    storage: Storage,
    *,
    base: str | None = None,
    inputs: bool = False,
    recompute: int = 0,
    seed: int = 0,
    memory_bytes: int | None = None,
) -> Verification:
    """Read a folder whole, in bounded memory. See `api.verify`, which says what the options are."""
    model = load_checkpoint(storage, location)
    report = _report(model, storage)
    if report is None and (inputs or recompute):
        raise OutputError(
            f"{quoted(f'{location}/{REPORT_NAME}')} does not exist, and only it names the inputs",
            hint="Only folders that streammerge wrote can be compared with their inputs.",
        )
    found = _Findings([], [], [])
    reference = None if base is None else load_checkpoint(storage, base)
    if reference is not None:
        found.problems += differences(reference, model, reference.location, location)
    if JOURNAL in model.files:
        found.notes.append(
            f"{quoted(JOURNAL)} is in the folder, which says where the inputs lay: a merge was stopped just after "
            "it was complete, and `merge --resume` removes it"
        )
    if report is None:
        _check_foreign(model, storage, reference, found)
    else:
        _check_against(report, model, storage, found)
    recomputed: tuple[Recomputed, ...] = ()
    if report is not None and (inputs or recompute):
        recipe = Recipe.from_report(report, f"{location}/{REPORT_NAME}", location)
        same = _check_inputs(recipe, storage, found)
        if recompute and not same:
            found.unchecked.append("no tensor was merged again: the inputs are not those of the report")
        elif recompute:
            try:
                recomputed = _recompute(recipe, report, model, storage, recompute, seed, memory_bytes, found)
            except MergeError as error:
                found.problems.append(f"the inputs cannot be merged any more: {error.message}")
    return Verification(
        tensors=len(model.tensors),
        read_bytes=model.tensor_bytes,
        problems=tuple(sorted(found.problems)),
        notes=tuple(found.notes),
        unchecked=tuple(found.unchecked),
        recomputed=recomputed,
    )


def _report(model: Checkpoint, storage: Storage) -> dict[str, Any] | None:
    if REPORT_NAME not in model.files:
        return None
    nbytes = model.files[REPORT_NAME].size
    if nbytes > JSON_LIMIT_BYTES:
        raise OutputError(
            f"{quoted(f'{model.location}/{REPORT_NAME}')} has {nbytes} bytes, over the limit of {JSON_LIMIT_BYTES}",
            hint="Only folders that streammerge wrote can be verified.",
        )
    text = storage.read(model.location, REPORT_NAME, 0, nbytes)
    return parse_report(text.decode("utf-8", "replace"), quoted(f"{model.location}/{REPORT_NAME}"))


# bytes and values


def _check_against(report: Mapping[str, Any], model: Checkpoint, storage: Storage, found: _Findings) -> None:
    """Each tensor's checksum, and no non-finite value that the report does not tell of."""
    expected = {tensor["name"]: tensor for tensor in report["tensors"]}
    label, names = "in the report but not in the files", model.tensors.keys()
    found.problems += [f"{quoted(n)} is {label}" for n in expected.keys() - names]
    found.problems += [f"{quoted(n)} is in the files but not in the report" for n in names - expected.keys()]
    for entry, digest, non_finite in _read_all(model, storage):
        told = expected.get(entry.name, {})
        if told and digest != told["sha256"]:
            found.problems.append(f"{quoted(entry.name)} has other bytes than the report's checksum says")
        # a copy keeps the infinities that its model had, such as a stored mask's
        if told.get("method") != COPY and non_finite != told.get("non_finite", 0):
            passed = f", {told['non_finite']} when it was merged" if told.get("non_finite") else ""
            found.problems.append(f"{quoted(entry.name)} holds {non_finite} non-finite values{passed}")


def _check_foreign(model: Checkpoint, storage: Storage, base: Checkpoint | None, found: _Findings) -> None:
    """What a folder without a report shows by itself and beside a base."""
    damaged = [(entry, non_finite) for entry, _, non_finite in _read_all(model, storage) if non_finite]
    shapes = {n: (e.shape, e.dtype) for n, e in model.tensors.items()}
    kinds = roles(shapes, model.config, roles_from_model) if damaged else {}
    for entry, non_finite in damaged:
        line = f"{quoted(entry.name)} holds {non_finite} non-finite values"
        in_base = base.tensors.get(entry.name) if base is not None else None
        if kinds[entry.name].kind is TensorClass.BUFFER:
            found.notes.append(f"{line}; it is a buffer, which may")
        elif base is not None and in_base and _non_finite(base, in_base, storage) == non_finite:
            found.notes.append(f"{line}, as it does in {quoted(base.location)}")
        else:
            found.problems.append(line)
    found.unchecked.append(
        f"there is no {quoted(REPORT_NAME)}: bytes cannot be compared with checksums, nor values with a recipe"
    )
    if base is None:
        found.unchecked.append("without `--base DIR` names and shapes are compared with nothing")
    untested = [e for e in model.tensors.values() if not e.is_float and e.dtype[0] in "FC"]
    if untested:
        found.unchecked.append(
            f"{len(untested)} tensors such as {quoted(untested[0].name)} are {untested[0].dtype}: "
            "they were not looked through for non-finite values"
        )


def _read_all(model: Checkpoint, storage: Storage) -> Iterator[tuple[TensorEntry, str, int]]:
    """Each tensor, the SHA-256 of its bytes and how many of its values are not finite, in the files' order."""
    for name, entries in itertools.groupby(model.tensors.values(), key=lambda entry: entry.file):
        file = storage.open(model.location, name)
        try:
            for entry in entries:
                yield entry, *_look_through(file, entry)
        finally:
            file.close()


def _look_through(file: ByteFile, entry: TensorEntry) -> tuple[str, int]:
    digest, non_finite = hashlib.sha256(), 0
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, entry.nbytes)))
    for done in range(0, entry.nbytes, _BLOCK_BYTES):
        count = min(_BLOCK_BYTES, entry.nbytes - done)
        data = file.fetch(entry.offset + done, count, buffer)
        digest.update(data)
        if entry.is_float:
            values = torch.frombuffer(data, dtype=TORCH_DTYPES[entry.dtype])
            non_finite += int(values.numel() - torch.isfinite(values).sum())
        file.release(entry.offset + done, count)
    return digest.hexdigest(), non_finite


def _non_finite(model: Checkpoint, entry: TensorEntry, storage: Storage) -> int:
    file = storage.open(model.location, entry.file)
    try:
        return _look_through(file, entry)[1]
    finally:
        file.close()


# inputs


def _check_inputs(recipe: Recipe, storage: Storage, found: _Findings) -> bool:
    """Whether every model that the report names has the files it had then, by size and header."""
    if recipe.past is None or recipe.past.inputs is None:
        found.unchecked.append("the report has no fingerprints of its inputs: it was written before there were any")
        return True
    before = len(found.problems)
    for location, files in zip(recipe.locations, recipe.past.inputs, strict=True):
        try:
            changed, touched = changed_files(files, load_checkpoint(storage, location))
        except CheckpointError as error:
            changed, touched = (f"an input is no sound model any more: {error.message}",), ()
        # what is listed twice, such as one folder of data for all experts, is told once
        found.problems += [line for line in changed if line not in found.problems]
        found.notes += [line for line in touched if line not in found.notes]
    return len(found.problems) == before


# merging again


def _recompute(
    recipe: Recipe,
    report: Mapping[str, Any],
    model: Checkpoint,
    storage: Storage,
    count: int,
    seed: int,
    memory_bytes: int | None,
    found: _Findings,
) -> tuple[Recomputed, ...]:
    told = {tensor["name"]: tensor for tensor in report["tensors"]}
    plan = _plan_of(recipe, "float64", storage)
    own = {step.name: step for step in _plan_of(recipe, None, storage).steps}
    there = []
    for step in plan.steps:
        entry, method = model.tensors.get(step.name), told.get(step.name, {}).get("method")
        if entry is None or entry.shape != step.shape or entry.dtype != own[step.name].dtype:
            wanted = f"{own[step.name].dtype} {list(step.shape)}"
            seen = f"{entry.dtype} {list(entry.shape)}" if entry else "not there"
            found.problems.append(f"{quoted(step.name)} is {seen}, and the recipe gives {wanted}")
        elif method != step.method:
            found.problems.append(
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
                found.notes.append(f"{line} its change, and is what float32 gives: a threshold or cut lies between")
            else:
                found.problems.append(
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
    return replace(plan, steps=steps, memory=fit_memory(steps, budget_bytes))


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
