"""Check a merged folder: its bytes against its report, its inputs, and some tensors against a merge in float64."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from streammerge.checkpoint import JSON_LIMIT_BYTES, ByteFile, Checkpoint, Storage, TensorEntry, load_checkpoint
from streammerge.compare import differences
from streammerge.errors import CheckpointError, MergeError, OutputError, quoted
from streammerge.folder import REPORT_NAME
from streammerge.journal import JOURNAL
from streammerge.models import open_model
from streammerge.owners import roles_from_model
from streammerge.plan import changed_files
from streammerge.recipe import Recipe
from streammerge.recompute import Findings, Recomputed
from streammerge.recompute import recompute as merge_again
from streammerge.report import parse_report
from streammerge.rules import TensorClass, roles
from streammerge.step import COPY
from streammerge.torch_dtypes import TORCH_DTYPES

_BLOCK_BYTES = 8 << 20


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
    found = Findings([], [], [])
    reference = None if base is None else open_model(storage, base)
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
                recomputed = merge_again(recipe, report, model, storage, recompute, seed, memory_bytes, found)
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


def _check_against(report: Mapping[str, Any], model: Checkpoint, storage: Storage, found: Findings) -> None:
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


def _check_foreign(model: Checkpoint, storage: Storage, base: Checkpoint | None, found: Findings) -> None:
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


def _check_inputs(recipe: Recipe, storage: Storage, found: Findings) -> bool:
    """Whether every model that the report names has the files it had then, by size and header."""
    if recipe.past is None or recipe.past.inputs is None:
        found.unchecked.append("the report has no fingerprints of its inputs: it was written before there were any")
        return True
    before = len(found.problems)
    for location, files in zip(recipe.locations, recipe.past.inputs, strict=True):
        try:
            changed, touched = changed_files(files, open_model(storage, location, recipe.base))
        except CheckpointError as error:
            changed, touched = (f"an input is no sound model any more: {error.message}",), ()
        # what is listed twice, such as one folder of data for all experts, is told once
        found.problems += [line for line in changed if line not in found.problems]
        found.notes += [line for line in touched if line not in found.notes]
    return len(found.problems) == before
