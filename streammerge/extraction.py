"""A full expert as an adapter of its base: each linear layer's change cut to a rank, what else changed kept whole."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from streammerge.adapter_folder import Target, adapter_config, adapter_layout
from streammerge.adapters import CONFIG_NAME, PREFIX
from streammerge.budget import available_memory_bytes, format_bytes
from streammerge.checkpoint import DTYPE_BYTES, Checkpoint, Storage, TensorEntry, changed_files
from streammerge.compare import differences
from streammerge.derived import scratch_bytes
from streammerge.errors import CheckpointError, MergeError, PlanError, escaped, quoted
from streammerge.memory import MATRIX_RESERVE_BYTES, RESERVE_BYTES
from streammerge.models import open_model
from streammerge.outcome import Block, Outcome
from streammerge.owners import roles_from_model
from streammerge.plan import refuse_quantised, weight_files
from streammerge.readahead import ReadAhead, bytes_of, cut
from streammerge.rules import Role, TensorClass, roles
from streammerge.solve.nearest import nearest, nearest_bytes
from streammerge.torch_dtypes import TORCH_DTYPES
from streammerge.write import Writer

REPORT_NAME = "extraction.json"
_SLOT_BYTES, _SLOTS = 4 << 20, 6
_METHOD = "extract"


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """What an extraction did.

    errors  of each module, how much of its change the rank left out: Frobenius norms, relative
    whole   the tensors that changed and are no linear layer's matrix: kept as they are
    """

    out: str
    rank: int
    errors: dict[str, float]
    whole: tuple[str, ...]
    written_bytes: int
    seconds: float

    @property
    def worst(self) -> tuple[str, float]:
        """The module that lost most, and how much."""
        return max(self.errors.items(), key=lambda pair: pair[1])

    def totals(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "worst": dict([self.worst])}

    def summary(self) -> str:
        """For people."""
        name, error = self.worst
        whole = f", {len(self.whole)} other tensors whole" if self.whole else ""
        mean = math.fsum(self.errors.values()) / len(self.errors)
        return (
            f"extracted {len(self.errors)} matrices at rank {self.rank}{whole} into {escaped(self.out)}: "
            f"{format_bytes(self.written_bytes)} in {self.seconds:.1f} s\n"
            f"lost of the changes' norm: {mean:.1%} on average, at most {error:.1%}, by {quoted(name)}"
        )


def extract(
    expert: str,
    base: str,
    out: str,
    storage: Storage,
    *,
    rank: int,
    memory_bytes: int | None = None,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Extraction:
    """Write the adapter. See `api.extract`."""
    started = time.perf_counter()
    models = open_model(storage, base), open_model(storage, expert, base)
    refuse_quantised(models, (base, expert))
    _refuse_differences(models)
    kinds = roles({n: (e.shape, e.dtype) for n, e in models[0].tensors.items()}, models[0].config, roles_from_model)
    ordered = sorted(models[0].tensors.values(), key=lambda entry: (entry.file, entry.offset))
    linear = {entry.name for entry in ordered if _is_linear(entry, kinds[entry.name])}
    _refuse_budget(models, linear, rank, available_memory_bytes() // 2 if memory_bytes is None else memory_bytes)
    changed = [entry.name for entry in ordered if entry.elements and _is_changed(storage, models, entry.name)]
    matrices = [name for name in changed if name in linear]
    whole = [name for name in changed if name not in linear]
    if not matrices:
        raise PlanError(
            f"no linear layer of {quoted(expert)} differs from that of {quoted(base)}",
            hint="An adapter changes linear layers. Is this the expert?",
        )
    keys = _whole_keys(whole, {name.removesuffix(".weight") for name in matrices})
    targets = {name: _target(models[0].tensors[name], kinds[name], rank) for name in matrices}
    stored = [(keys[name], models[1].tensors[name].dtype, models[1].tensors[name].shape) for name in whole]
    layout = adapter_layout(list(targets.values()), "F32", stored)
    biases = any(".base_layer." in key for key in keys.values())
    saved = sorted({name.rpartition(".")[0] for name in whole if ".base_layer." not in keys[name]})
    config = adapter_config(
        list(targets.values()),
        base,
        bias="all" if biases else "none",
        modules_to_save=saved or None,
        fan_in_fan_out=any(kinds[name].transposed for name in matrices),
    )
    files = {model.location: weight_files(model) for model in models}
    with Writer(out, layout, {"extract": files, "config": config.decode()}, resume=resume) as writer:
        total = sum(models[1].tensors[name].nbytes for name in (*matrices, *whole))
        done = 0
        for name in (*matrices, *whole):
            blocks = (
                _matrix_blocks(storage, models, name, kinds[name], targets[name], writer)
                if name in targets
                else _whole_blocks(storage, models, name, keys[name], writer)
            )
            for block in blocks:
                writer.write(block)
            done += models[1].tensors[name].nbytes
            if progress:
                progress(done, total)
        writer.flush()
        _refuse_changed(storage, models, writer)
        found = Extraction(
            out=out,
            rank=rank,
            errors={t.module: float(writer.outcomes[t.keys[0]].facts["error"]) for t in targets.values()},
            whole=tuple(whole),
            written_bytes=layout.total_bytes,
            seconds=time.perf_counter() - started,
        )
        told = {**found.totals(), "expert": expert, "base": base, "inputs": files}
        writer.publish({CONFIG_NAME: config, REPORT_NAME: (json.dumps(told, indent=1) + "\n").encode()})
    return found


def _is_linear(entry: TensorEntry, role: Role) -> bool:
    is_matrix = role.kind in (TensorClass.MATRIX, TensorClass.ROUTER) and len(entry.shape) == 2
    return is_matrix and entry.is_float and entry.elements > 0 and entry.name.endswith(".weight")


def _target(entry: TensorEntry, role: Role, rank: int) -> Target:
    out, into = reversed(entry.shape) if role.transposed else entry.shape
    return Target(module=entry.name.removesuffix(".weight"), out=out, into=into, rank=min(rank, out, into))


def _whole_keys(names: Sequence[str], adapted: set[str]) -> dict[str, str]:
    """What the tensors kept whole are called in the file. Raises PlanError for those that no adapter can hold."""
    keys, refused = {}, []
    for name in names:
        module, _, own = name.rpartition(".")
        if not module or own not in ("weight", "bias"):
            refused.append(name)
        # PEFT keeps the layer that it adapts inside its own
        keys[name] = f"{PREFIX}{module}.base_layer.{own}" if module in adapted else f"{PREFIX}{name}"
    if refused:
        raise PlanError(
            f"{len(refused)} tensor(s) such as {quoted(refused[0])} changed and are no module's weight or bias: "
            "an adapter cannot hold them",
            hint="Merge the expert as it is.",
        )
    return keys


def _refuse_differences(models: Sequence[Checkpoint]) -> None:
    base, expert = models
    if found := differences(base, expert, base.location, expert.location):
        more = f"\n  and {len(found) - 20} more" if len(found) > 20 else ""
        raise PlanError(
            "the models do not fit together:\n  " + "\n  ".join(found[:20]) + more,
            hint="Name the model that the expert was trained from.",
        )


def _refuse_budget(models: Sequence[Checkpoint], matrices: Collection[str], rank: int, budget: int) -> None:
    def needed(name: str) -> int:
        rows, columns = models[0].tensors[name].shape
        size = 8 if _is_wide(models, name) else 4
        deriving = max(scratch_bytes(model.tensors[name], _SLOT_BYTES // size) for model in models)
        return rows * columns * size + nearest_bytes(rows, columns, rank, size) + deriving

    if not matrices:
        return
    largest = max(matrices, key=needed)
    total = needed(largest) + RESERVE_BYTES + MATRIX_RESERVE_BYTES + _SLOTS * _SLOT_BYTES
    if total > budget:
        raise PlanError(
            f"{quoted(largest)} needs a budget of {format_bytes(total)}, more than {format_bytes(budget)}",
            hint=f"Pass `--memory {-(-total // (1 << 20))}MiB` or more.",
        )


def _refuse_changed(storage: Storage, models: Sequence[Checkpoint], writer: Writer) -> None:
    if changes := [line for model in models for line in changed_files(storage, model)]:
        writer.distrust()
        raise CheckpointError(
            "inputs changed during the extraction:\n  " + "\n  ".join(changes[:20]),
            hint=f"Nothing was published. Delete {quoted(writer.partial)} and begin anew.",
        )


def _is_wide(models: Sequence[Checkpoint], name: str) -> bool:
    return any(model.tensors[name].dtype == "F64" for model in models)


def _pairs(storage: Storage, models: Sequence[Checkpoint], name: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """A tensor's runs, where each begins: the base's and the expert's."""
    entries = [model.tensors[name] for model in models]
    widest = max(DTYPE_BYTES[entry.dtype] for entry in entries)
    runs = [cut(number, entry, _SLOT_BYTES // widest, last=True) for number, entry in enumerate(entries)]
    requests = (request for pair in zip(*runs, strict=True) for request in pair)
    with closing(ReadAhead(storage, models, requests, slots=_SLOTS, slot_bytes=_SLOT_BYTES)) as ahead:
        for first in range(0, entries[0].elements, _SLOT_BYTES // widest):
            slots = ahead.take(), ahead.take()
            base, expert = (
                slot.data.view(TORCH_DTYPES[entry.dtype]) for slot, entry in zip(slots, entries, strict=True)
            )
            yield first, base, expert
            for slot in slots:
                ahead.give_back(slot)


def _is_changed(storage: Storage, models: Sequence[Checkpoint], name: str) -> bool:
    # in full, so that nobody has to close what is left of the reading
    found = [not torch.equal(base.to(expert.dtype), expert) for _, base, expert in _pairs(storage, models, name)]
    return any(found)


def _whole_blocks(
    storage: Storage, models: Sequence[Checkpoint], name: str, key: str, writer: Writer
) -> Iterator[Block]:
    if key in writer.checksums:
        return
    entry = models[1].tensors[name]
    # as many copies wait to be written as there are slots to read into
    free = threading.Semaphore(_SLOTS)
    for first, _, expert in _pairs(storage, models, name):
        last = first + len(expert) == entry.elements
        free.acquire()
        data = bytes_of(expert.clone().view(torch.uint8))
        outcome = Outcome(key, _METHOD) if last else None
        yield Block(key, first * DTYPE_BYTES[entry.dtype], data, free.release, outcome)


def _matrix_blocks(
    storage: Storage, models: Sequence[Checkpoint], name: str, role: Role, target: Target, writer: Writer
) -> Iterator[Block]:
    if set(target.keys) <= writer.checksums.keys():
        return
    shape = models[0].tensors[name].shape
    change = torch.empty(math.prod(shape), dtype=torch.float64 if _is_wide(models, name) else torch.float32)
    for first, base, expert in _pairs(storage, models, name):
        change[first : first + len(base)].copy_(expert).sub_(base)
    if not bool(torch.isfinite(change).all()):
        raise MergeError(
            f"{quoted(name)} holds a NaN or an infinity, in the expert or in the base",
            hint="The checkpoint is damaged or its training diverged. Fetch it again.",
        )
    matrix = change.view(shape)
    found, error = nearest(matrix.mT if role.transposed else matrix, target.rank)
    yield from target.blocks(found, "F32", _METHOD, {"error": error, "rank": target.rank}, skip=set(writer.checksums))
