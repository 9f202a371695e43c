"""Run a plan under its budget: read ahead, merge one tensor at a time, hand over finished blocks."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Container, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from streammerge import methods
from streammerge.checkpoint import Storage
from streammerge.memory import block_elements
from streammerge.outcome import Block, Norms, Outcome, Tally, naming, refuse_overflow
from streammerge.plan import Plan
from streammerge.readahead import ReadAhead, Request, bytes_of
from streammerge.step import COPY, Step
from streammerge.streamed_deltas import (
    TORCH_DTYPES,
    ElementDeltas,
    MatrixDeltas,
    Sources,
    StepReader,
)
from streammerge.workspace import Workspace
from streammerge_kernels.apply import apply_
from streammerge_kernels.matmul import fast_matmul


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
            with naming(step):
                yield from self._run(step)

    def memory_facts(self) -> dict[str, int]:
        """What was taken of the workspace, for the report."""
        return {
            "workspace_planned": self._plan.memory.workspace_bytes,
            "workspace_used": self.workspace.peak_bytes,
            "workspace_overdraft": self.workspace.overdraft_bytes,
        }

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
        tally = Tally(Norms(len(step.experts)))
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

    def _copy(self, step: Step, reader: StepReader, block: int, outcome: Outcome, tally: Tally) -> Iterator[Block]:
        for number, first in enumerate(range(0, step.elements, block)):
            run, give_back = reader.take(number)
            yield self._emit(step, first, run)
            give_back()

    def _by_element(
        self, step: Step, reader: StepReader, block: int, outcome: Outcome, tally: Tally
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

    def _by_matrix(self, step: Step, reader: StepReader, block: int, outcome: Outcome, tally: Tally) -> Iterator[Block]:
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
        tally: Tally | None = None,
    ) -> Block:
        """Round base + merged into an output slot; `merged` may be overwritten."""
        dtype = TORCH_DTYPES[step.dtype]
        slot = self._free_output()
        nbytes = base.numel() * dtype.itemsize
        out = slot[:nbytes].view(dtype).view(base.shape)
        if merged is None:
            out.copy_(base)
            if step.dtype != step.experts[0].dtype:
                # a copy keeps its infinities: the cast made the others
                refuse_overflow(step, int((~torch.isfinite(out) & torch.isfinite(base)).sum()))
        else:
            assert merged.shape == base.shape, f"{step.method} returned {tuple(merged.shape)} for {base.shape}"
            # a transposed matrix comes as a view; rounding goes by the order of the output's bytes
            applied = apply_(
                base,
                merged.contiguous(),
                out,
                rounding=self._plan.recipe.rounding,
                seed=self._plan.recipe.seed,
                name=step.name,
                first_index=first,
                measure=step.base is not None and tally is not None,
            )
            refuse_overflow(step, int(applied.non_finite))
            if tally is not None:
                tally.count(int(applied.changed), float(applied.merged_squares), float(applied.lost_squares))
        data = bytes_of(slot)[:nbytes]
        return Block(step.name, first * dtype.itemsize, data, lambda: self._output.put(slot))

    def _free_output(self) -> Tensor:
        started = time.perf_counter()
        slot = self._output.get()
        self.output_waited_seconds += time.perf_counter() - started
        return slot


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
