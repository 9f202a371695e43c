"""Run a plan under its budget: read ahead, merge one tensor at a time, hand over finished blocks."""

from __future__ import annotations

import logging
import math
import os
import queue
import time
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from streammerge import methods
from streammerge.checkpoint import Storage
from streammerge.errors import MergeError, StreamMergeError, quoted
from streammerge.memory import block_elements
from streammerge.plan import Plan
from streammerge.readahead import ReadAhead, Request, bytes_of
from streammerge.step import COPY, Step
from streammerge.streamed_deltas import (
    TORCH_DTYPES,
    ElementDeltas,
    MatrixDeltas,
    Norms,
    Sources,
    StepReader,
    compute_dtype,
)
from streammerge.workspace import Workspace
from streammerge_kernels.matmul import fast_matmul
from streammerge_kernels.round import round_to

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Outcome:
    """What happened to one tensor.

    norm_ratio     norm of the merged delta over the experts' mean delta norm
    rounding_loss  norm of the output's rounding error over the norm of the merged delta
    changed        share of the elements whose output differs from the base's
    """

    name: str
    method: str
    facts: dict[str, float | int | str | bool] = field(default_factory=dict)
    norm_ratio: float | None = None
    rounding_loss: float | None = None
    changed: float | None = None
    seconds: float = 0.0


@dataclass(slots=True)
class Block:
    """A run of output bytes. `release` gives its memory back; `outcome` comes with a tensor's last run."""

    name: str
    offset: int
    data: memoryview
    release: Callable[[], None]
    outcome: Outcome | None = None


class Stream:
    """Iterate to merge: blocks come in the plan's order, each tensor's in the order of its bytes.

    skip   tensors that need no merging because an earlier run finished them

    Use as a context manager: leaving it, however, stops the reading thread and closes every file.
    Raises MergeError naming tensor and expert, and whatever reading raised.
    """

    def __init__(self, plan: Plan, storage: Storage, *, skip: Container[str] = ()) -> None:
        self._plan = plan
        self._steps = [step for step in plan.steps if step.name not in skip]
        self.to_read_bytes = sum(Sources(step).read_bytes for step in self._steps)
        self._settings = ExitStack()
        self.output_waited_seconds = 0.0
        self.workspace = Workspace(plan.memory.workspace_bytes)
        self._output: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        slot_bytes = plan.memory.slot_bytes
        memory = torch.empty(plan.memory.output_slots * slot_bytes, dtype=torch.uint8)
        for i in range(plan.memory.output_slots):
            self._output.put(memory[i * slot_bytes : (i + 1) * slot_bytes])
        self.ahead = ReadAhead(
            storage,
            plan.models,
            self._requests(),
            slots=plan.memory.input_slots,
            slot_bytes=slot_bytes,
        )

    def __enter__(self) -> Stream:
        threads = torch.get_num_threads()
        self._settings.callback(torch.set_num_threads, threads)
        if any(step.by_matrix for step in self._steps):
            self._settings.enter_context(fast_matmul())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._settings.close()
        self.ahead.close()

    def __iter__(self) -> Iterator[Block]:
        for step in self._steps:
            try:
                yield from self._run(step)
            except StreamMergeError:
                raise
            except Exception as error:
                # a bug keeps its traceback; the tensor is what that does not tell (add_note: from Python 3.11)
                note = f"while merging {quoted(step.name)} by {quoted(step.method)}"
                getattr(error, "add_note", logger.error)(note)
                raise

    def _requests(self) -> Iterator[Request]:
        for step in self._steps:
            yield from Sources(step).requests(self._block_elements(step))

    def _block_elements(self, step: Step) -> int:
        return block_elements(step, self._plan.memory.slot_bytes)

    def _run(self, step: Step) -> Iterator[Block]:
        started = time.perf_counter()
        block = self._block_elements(step)
        reader = StepReader(self.ahead, Sources(step), block)
        outcome = Outcome(step.name, step.method)
        tally = _Tally(Norms(len(step.experts)))
        torch.set_num_threads(_threads_for(step))
        merge = self._copy if step.method == COPY else self._by_matrix if step.by_matrix else self._by_element
        waiting: Block | None = None
        for finished in merge(step, reader, block, outcome, tally):
            if waiting is not None:
                yield waiting
            waiting = finished
        reader.finish()
        self.workspace.reset()
        outcome.seconds = time.perf_counter() - started
        if step.base is not None:
            tally.settle(outcome, step.elements)
        last = waiting or Block(step.name, 0, memoryview(b""), lambda: None)
        last.outcome = outcome
        yield last

    def _copy(self, step: Step, reader: StepReader, block: int, outcome: Outcome, tally: _Tally) -> Iterator[Block]:
        for number, first in enumerate(range(0, step.elements, block)):
            run, give_back = reader.take(number)
            yield self._emit(step, first, run)
            give_back()

    def _by_element(
        self, step: Step, reader: StepReader, block: int, outcome: Outcome, tally: _Tally
    ) -> Iterator[Block]:
        function = methods.describe(step.method).load()
        models = len(step.models)
        for number, first in enumerate(range(0, step.elements, block)):
            runs, returns = zip(*(reader.take(number * models + k) for k in range(models)), strict=True)
            deltas = ElementDeltas(step, self._plan.names, runs[0], runs[1:], first, self.workspace, tally.norms)
            merged = function(deltas, **step.arguments)
            outcome.facts.update(deltas.facts)
            yield self._emit(step, first, deltas.base(), merged, tally)
            for give_back in returns:
                give_back()
            self.workspace.reset()

    def _by_matrix(
        self, step: Step, reader: StepReader, block: int, outcome: Outcome, tally: _Tally
    ) -> Iterator[Block]:
        function = methods.describe(step.method).load()
        blocks = -(-step.elements // block)
        deltas = MatrixDeltas(step, self._plan.names, reader, blocks, self.workspace, tally.norms)
        merged = function(deltas, **step.arguments)
        outcome.facts.update(deltas.facts)
        stored = merged.T if step.role.transposed else merged
        rows = block // step.shape[1]
        for first in range(0, step.shape[0], rows):
            part = slice(first, first + rows)
            base = deltas.stored_base[part].to(deltas.dtype)
            # contiguous already, unless the matrix is seen transposed
            yield self._emit(step, first * step.shape[1], base, stored[part].contiguous(), tally)

    def _emit(
        self,
        step: Step,
        first: int,
        base: Tensor,
        merged: Tensor | None = None,
        tally: _Tally | None = None,
    ) -> Block:
        """Round base + merged into an output slot; `merged` may be overwritten."""
        dtype = TORCH_DTYPES[step.dtype]
        slot = self._free_output()
        nbytes = base.numel() * dtype.itemsize
        out = slot[:nbytes].view(dtype).view(base.shape)
        if merged is None:
            out.copy_(base)
            if step.dtype != step.experts[0].dtype:
                self._refuse_overflow(step, out, base, out)
        else:
            assert merged.shape == base.shape, f"{step.method} returned {tuple(merged.shape)} for {base.shape}"
            measures = step.base is not None and tally is not None
            before = base.to(dtype) if measures else None
            if measures and tally is not None:
                tally.merged(merged)
            # a transposed matrix comes as a view; rounding goes by the order of the output's bytes
            exact = merged.contiguous().add_(base)
            recipe = self._plan.recipe
            round_to(
                exact,
                dtype,
                rounding=recipe.rounding,
                seed=recipe.seed,
                name=step.name,
                first_index=first,
                out=out,
            )
            # float32 whose squares have a sum fits in bfloat16 too, and is read faster than what was written
            narrow = dtype is torch.float16 or exact.dtype is torch.float64
            self._refuse_overflow(step, out, base, out if narrow else exact)
            if before is not None and tally is not None:
                tally.rounded(out, exact, before)
        data = bytes_of(slot)[:nbytes]
        return Block(step.name, first * dtype.itemsize, data, lambda: self._output.put(slot))

    def _refuse_overflow(self, step: Step, out: Tensor, base: Tensor, telling: Tensor) -> None:
        """Raise MergeError for a non-finite `out`; it has none where the norm of `telling` is finite."""
        # merged inputs were checked as they came in, and a copy keeps its infinities: a method or the cast made this
        if math.isfinite(torch.linalg.vector_norm(telling, dtype=compute_dtype(step)).item()):
            return
        made = ~torch.isfinite(out)
        if step.method == COPY:
            made &= torch.isfinite(base)
        bad = int(made.sum())
        if bad:
            by = "" if step.method == COPY else f" merged by {quoted(step.method)}"
            raise MergeError(
                f"{quoted(step.name)}{by} leaves the range of {step.dtype} in {bad} elements",
                hint="Choose a wider `out_dtype`, such as float32, or another method.",
            )

    def _free_output(self) -> Tensor:
        started = time.perf_counter()
        slot = self._output.get()
        self.output_waited_seconds += time.perf_counter() - started
        return slot


class _Tally:
    """Sums over a tensor's blocks that its outcome is made of."""

    def __init__(self, norms: Norms) -> None:
        self.norms = norms
        self._merged_squared = 0.0
        self._lost_squared = 0.0
        self._changed = 0

    def merged(self, delta: Tensor) -> None:
        norm = torch.linalg.vector_norm(delta).item()
        self._merged_squared += norm * norm

    def rounded(self, out: Tensor, exact: Tensor, before: Tensor) -> None:
        """`exact` is overwritten."""
        self._changed += int(torch.count_nonzero(out != before))
        if out.dtype != exact.dtype:
            norm = torch.linalg.vector_norm(exact.sub_(out)).item()
            self._lost_squared += norm * norm

    def settle(self, outcome: Outcome, elements: int) -> None:
        mean, norm = self.norms.mean, math.sqrt(self._merged_squared)
        if outcome.method == COPY:
            return
        outcome.norm_ratio = _ratio(norm, mean)
        outcome.rounding_loss = _ratio(math.sqrt(self._lost_squared), norm) if norm else 0.0
        outcome.changed = self._changed / elements


def _ratio(part: float, whole: float) -> float | None:
    # of norms that overflowed there is none, and JSON has no word for it
    return part / whole if whole and math.isfinite(part) and math.isfinite(whole) else None


def _threads_for(step: Step) -> int:
    # matrix products hide reading and writing; blocks of elements compete with them for the cores, and
    # a parallel loop whose threads must wait for a core is many times slower than a serial one
    return thread_limit() if step.by_matrix else max(thread_limit() - 2, 1)


def thread_limit() -> int:
    """Threads for arithmetic: the CPUs this process may run on, within its cgroup's quota."""
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, max(int(quota) // int(period), 1))
    except (OSError, ValueError):
        pass
    return cpus
