"""Run a plan on an accelerator: inputs arrive, steps compute and results leave at the same time.

The main thread takes what was read ahead, copies it to the device and, in the plan's order, copies results
back; worker threads compute, each on a stream of its own, so that small factorisations overlap.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from streammerge import methods
from streammerge.budget import format_bytes
from streammerge.checkpoint import Storage
from streammerge.device_deltas import DeviceDeltas
from streammerge.device_memory import MOST_AT_ONCE, stays_whole, step_device_bytes
from streammerge.errors import MergeError, quoted
from streammerge.outcome import Block, Facts, Tally, add_facts, naming, refuse_overflow
from streammerge.plan import Plan
from streammerge.readahead import ReadAhead, bytes_of
from streammerge.schedule import Schedule
from streammerge.solve.cost import PANEL_ELEMENTS
from streammerge.step import COPY, Step, matrices_of
from streammerge.streamed_deltas import Sources, StepReader
from streammerge.torch_dtypes import TORCH_DTYPES
from streammerge_kernels.apply import Applied, apply_

logger = logging.getLogger(__name__)

# a block that does not fit is halved down to this
_FEWEST_ELEMENTS = 1 << 16
# tasks of one tensor end on several threads
_COUNTING = threading.Lock()


class DeviceStream:
    """Iterate to merge, like `stream.Stream`: the same blocks in the same order, the arithmetic on `plan.device`.

    Never more than `plan.device_memory` at once, by the plan's figures; where the device still runs out, the
    step is tried again alone, then in smaller pieces, and then refused.
    """

    def __init__(self, plan: Plan, storage: Storage, *, skip: Container[str] = ()) -> None:
        assert plan.device_memory is not None, "the plan has no device memory"
        self._plan, self._budget = plan, plan.device_memory.budget_bytes
        self._schedule = Schedule(plan, skip, resident=True)
        self._skip = skip
        self._looks: dict[str, methods.Look] = {}
        self.to_read_bytes = self._schedule.read_bytes
        self.output_waited_seconds = 0.0
        self._device = torch.device(plan.device)
        self._library: Any = torch.get_device_module(self._device)
        self._settings = ExitStack()
        memory, slot_bytes = plan.memory, plan.memory.slot_bytes
        inputs = torch.empty(memory.input_slots * slot_bytes, dtype=torch.uint8)
        outputs = torch.empty(memory.output_slots * slot_bytes, dtype=torch.uint8)
        self._locked = [unlock for unlock in (self._lock(inputs), self._lock(outputs)) if unlock]
        self._output: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for i in range(memory.output_slots):
            self._output.put(outputs[i * slot_bytes : (i + 1) * slot_bytes])
        self._arriving, self._leaving = self._new_stream(), self._new_stream()
        self._lane = threading.local()
        # the CPU's own threads are enough there, and its settings belong to the process
        lanes = MOST_AT_ONCE if self._device.type == "cuda" else 1
        self._workers = ThreadPoolExecutor(
            lanes, thread_name_prefix="streammerge-compute", initializer=self._enter_lane
        )
        # slots whose bytes are on their way to the device, oldest first
        self._departing: deque[tuple[Any, Callable[[], None]]] = deque()
        self.ahead = ReadAhead(
            storage,
            plan.models,
            self._schedule.requests(),
            slots=memory.input_slots,
            slot_bytes=slot_bytes,
            memory=inputs,
        )

    def __enter__(self) -> DeviceStream:
        precision = torch.get_float32_matmul_precision()
        self._settings.callback(torch.set_float32_matmul_precision, precision)
        # TF32 keeps ten bits
        torch.set_float32_matmul_precision("highest")
        if self._device.type == "cuda":
            total = torch.cuda.get_device_properties(self._device).total_memory
            self._settings.callback(torch.cuda.set_per_process_memory_fraction, 1.0, self._device)
            torch.cuda.set_per_process_memory_fraction(min(self._budget / total, 1.0), self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._workers.shutdown(cancel_futures=True)
        self._library.synchronize(self._device)
        self.ahead.close()
        for unlock in self._locked:
            unlock()
        self._settings.close()

    def __iter__(self) -> Iterator[Block]:
        window: deque[_Task] = deque()
        for number, looks in itertools.groupby(self._schedule.looks, key=lambda look: look[0]):
            steps = [step for _, step in looks]
            for step in steps:
                with naming(step):
                    self._look_at_model(number, step)
            for method in {step.method for step in steps}:
                self._looks[method].finish(number)
        for step in self._schedule.steps:
            if step.method == COPY:
                yield from self._drain(window, to=0)
                yield from self._copy(step, self._reader(step, self._schedule.sources(step)))
                continue
            nbytes = step_device_bytes(step, self._plan.memory.slot_bytes)
            for task in self._all_tasks(step):
                while window and (
                    len(window) >= MOST_AT_ONCE or nbytes + sum(t.device_bytes for t in window) > self._budget
                ):
                    yield from self._drain(window, to=len(window) - 1)
                task.device_bytes = nbytes
                self._stage(task)
                task.future = self._workers.submit(self._attempt, task)
                window.append(task)
                while window and window[0].future is not None and window[0].future.done():
                    yield from self._drain(window, to=len(window) - 1)
        yield from self._drain(window, to=0)

    def memory_facts(self) -> dict[str, int]:
        """What was taken of the device, for the report."""
        taken = self._library.max_memory_reserved(self._device) if self._device.type == "cuda" else 0
        return {"device_budget": self._budget, "device_used": int(taken)}

    def _reader(self, step: Step, sources: Sources) -> StepReader:
        return StepReader(self.ahead, sources, self._schedule.block_elements(step))

    def _all_tasks(self, step: Step) -> Iterator[_Task]:
        tallies = [Tally(part) for part in step.parts or (step,)]
        for matrix in matrices_of(step):
            shared = _Shared(matrix, self._reader(matrix, self._schedule.sources(matrix)), tallies)
            for task in self._tasks(shared):
                task.last = task.last and matrix.first_element + task.first + task.elements == step.elements
                yield task

    def _tasks(self, shared: _Shared) -> Iterator[_Task]:
        step, block = shared.step, self._schedule.block_elements(shared.step)
        if stays_whole(step):
            yield _Task(shared, 0, step.elements, last=True)
            return
        for first in range(0, step.elements, block):
            elements = min(block, step.elements - first)
            yield _Task(shared, first, elements, last=first + elements == step.elements)

    def _stage(self, task: _Task) -> None:
        """Start copying a task's inputs to the device."""
        step, reader = task.shared.step, task.shared.reader
        sources = Sources(step, resident=True)
        entries = (sources.origin[1], *(entry for _, entry in sources.moving))
        shape = step.shape if step.by_matrix else (task.elements,)
        block = self._schedule.block_elements(step)
        runs = sources.blocks(block) if step.by_matrix else -(-task.elements // block)
        with self._library.stream(self._arriving):
            task.runs = self._places(entries, shape)
            if step.by_matrix:
                order = [(model, model * runs + run) for model in range(len(entries)) for run in range(runs)]
            else:
                first = task.first // block
                order = [
                    (model, (first + run) * len(entries) + model)
                    for run in range(runs)
                    for model in range(len(entries))
                ]
            filled = [0] * len(entries)
            for model, position in order:
                self._let_slots_go()
                data, give_back = reader.take(position)
                place = task.runs[model].view(-1)[filled[model] : filled[model] + data.numel()]
                place.copy_(data, non_blocking=True)
                filled[model] += data.numel()
                self._departing.append((self._mark(self._arriving), give_back))
            task.staged = self._mark(self._arriving)

    def _places(self, entries: Sequence[Any], shape: tuple[int, ...]) -> list[Tensor]:
        """Device memory for a step's inputs; experts of one dtype lie in one piece, as kernels like them."""
        origin, *moving = (TORCH_DTYPES[entry.dtype] for entry in entries)
        first = torch.empty(shape, dtype=origin, device=self._device)
        if len(set(moving)) == 1:
            return [first, *torch.empty((len(moving), *shape), dtype=moving[0], device=self._device)]
        return [first, *(torch.empty(shape, dtype=dtype, device=self._device) for dtype in moving)]

    def _let_slots_go(self) -> None:
        """Give back slots whose bytes have arrived; wait for some where half of all are still on their way."""
        while self._departing:
            event, give_back = self._departing[0]
            if not event.query():
                if len(self._departing) <= self._plan.memory.input_slots // 2:
                    return
                event.synchronize()
            self._departing.popleft()
            give_back()

    def _attempt(self, task: _Task) -> bool:
        """Compute a task on this thread's stream; False where the device ran out of memory."""
        stream = self._lane.stream
        with self._library.stream(stream):
            stream.wait_event(task.staged)
            try:
                with naming(task.shared.step):
                    self._compute(task, stream)
            except torch.OutOfMemoryError:
                return False
            return True

    def _compute(self, task: _Task, stream: Any) -> None:
        started = time.perf_counter()
        for run in task.runs:
            self._record(run, stream)
        step = task.shared.step
        out = torch.empty(
            step.shape if step.by_matrix else (task.elements,), dtype=TORCH_DTYPES[step.dtype], device=self._device
        )
        # on a second try too, only what this one does counts
        squares = [[0.0] * len(step.experts) for _ in task.shared.parts]
        task.non_finite = 0
        merge = self._merge_matrix if step.by_matrix else self._merge_elements
        applied = merge(task, out, squares)
        # waits for all of the above
        sums = torch.stack([torch.stack([part.sums for part in parts]).sum(0) for parts in applied]).tolist()
        for part, (*_, bad) in zip(task.shared.parts, sums, strict=True):
            refuse_overflow(part, int(bad))
        task.shared.count(sums, squares, task, time.perf_counter() - started)
        task.runs.clear()
        task.out = out.view(-1)

    def _merge_matrix(self, task: _Task, out: Tensor, squares: list[list[float]]) -> list[list[Applied]]:
        step = task.shared.step
        deltas = self._matrix(task)
        deltas.seen = self._looks.get(step.method) if step.looks_at_model else None
        merged = self._merged(task, deltas)
        stored = merged.mT if step.role.transposed else merged
        rows = self._schedule.block_elements(step) // step.shape[1]
        applied, top = [], 0
        for part in task.shared.parts:
            bottom = top + part.shape[0]
            places = [slice(row, min(row + rows, bottom)) for row in range(top, bottom, rows)]
            first = part.first_element - top * step.shape[1]
            applied.append(
                [
                    self._apply(part, deltas.origin[at], stored[at], out[at], first + at.start * step.shape[1])
                    for at in places
                ]
            )
            top = bottom
        deltas.add_squared_norms(squares)
        return applied

    def _merge_elements(self, task: _Task, out: Tensor, squares: list[list[float]]) -> list[list[Applied]]:
        """Block by block, after the looks; on the last try in pieces halved until they fit."""
        step = task.shared.step
        unit = step.columns if step.by_row else PANEL_ELEMENTS
        block = self._schedule.block_elements(step)
        if task.pieces:
            block = max(block // 16 // unit, 1) * unit
        pieces = deque((start, min(start + block, task.elements)) for start in range(0, task.elements, block))
        look = self._looks.get(step.method) if step.looks_at_model else self._look(task, pieces)
        done: list[Applied] = []
        while pieces:
            start, end = pieces.popleft()
            try:
                done.append(self._merge_piece(task, out, start, end, squares, look))
                continue
            except torch.OutOfMemoryError:
                if not task.pieces or step.by_row or end - start <= _FEWEST_ELEMENTS:
                    raise
            middle = (start + end) // 2
            pieces.extendleft([(middle, end), (start, middle)])
        return [done]

    def _look(self, task: _Task, pieces: Sequence[tuple[int, int]]) -> methods.Look | None:
        """What the step's method must know of the whole tensor, which is there."""
        step = task.shared.step
        look: methods.Look | None = None
        for number in range(step.looks):
            for start, end in pieces:
                deltas = self._piece(task, start, end)
                look = look or methods.describe(step.method).look(deltas, step.arguments)
                look.look(number, deltas)
            if look is not None:
                look.finish(number)
        return look

    def _look_at_model(self, number: int, step: Step) -> None:
        """Look at one step's blocks, one at a time: no results leave, and the next look waits for this one anyway.

        Raises MergeError where the device runs out of memory: a look that has seen a part cannot be tried again.
        """
        for matrix in matrices_of(step):
            reader = self._reader(matrix, self._schedule.look_sources(matrix))
            shared = _Shared(matrix, reader, [Tally(matrix)])
            for task in self._tasks(shared):
                try:
                    self._stage(task)
                    task.staged.synchronize()
                    deltas = self._matrix(task) if step.by_matrix else self._piece(task, 0, task.elements)
                    if step.method not in self._looks:
                        self._looks[step.method] = methods.describe(step.method).look(deltas, step.arguments)
                    self._looks[step.method].look(number, deltas)
                except torch.OutOfMemoryError as error:
                    raise self._does_not_fit(step) from error
                # what was looked at makes room for the next
                self._library.synchronize(self._device)
                del deltas
                task.runs.clear()

    def _merge_piece(
        self, task: _Task, out: Tensor, start: int, end: int, squares: list[list[float]], look: methods.Look | None
    ) -> Applied:
        deltas = self._piece(task, start, end)
        deltas.seen = look
        merged = self._merged(task, deltas)
        applied = self._apply(
            task.shared.step, deltas.origin, merged, out[start:end].view(merged.shape), task.first + start
        )
        deltas.add_squared_norms(squares)
        task.non_finite += deltas.non_finite
        return applied

    def _piece(self, task: _Task, start: int, end: int) -> DeviceDeltas:
        step = task.shared.step
        origin, *moving = (run[start:end] for run in task.runs)
        if step.by_row:
            origin, moving = origin.view(-1, step.columns), [run.view(-1, step.columns) for run in moving]
        deltas = self._deltas(task, origin, moving, task.first + start)
        deltas.refuse_non_finite(self._plan.names, task.first + start)
        return deltas

    def _matrix(self, task: _Task) -> DeviceDeltas:
        moving: Any = self._stacked(task.runs[1:]) if not task.pieces else lambda number: self._again(task, number)
        deltas = self._deltas(task, task.runs[0], moving, 0)
        deltas.refuse_non_finite(self._plan.names, 0)
        return deltas

    def _deltas(self, task: _Task, origin: Tensor, moving: Any, first: int) -> DeviceDeltas:
        step = task.shared.step
        beside = task.shared.reader.beside(first, None if step.by_matrix else origin.numel())
        return DeviceDeltas(step, origin, moving, first_element=first, seed=self._plan.recipe.seed, beside=beside)

    def _merged(self, task: _Task, deltas: DeviceDeltas) -> Tensor:
        step = task.shared.step
        merged = methods.describe(step.method).load()(deltas, **step.arguments)
        assert merged.shape == deltas.shape, f"{step.method} returned {tuple(merged.shape)} for {deltas.shape}"
        task.facts.update(deltas.facts)
        return merged

    def _apply(self, step: Step, base: Tensor, merged: Tensor, out: Tensor, first: int) -> Applied:
        recipe = self._plan.recipe
        return apply_(
            base, merged.contiguous(), out, rounding=recipe.rounding, seed=recipe.seed, name=step.name,
            first_index=first, measure=step.base is not None,
        )  # fmt: skip

    def _again(self, task: _Task, number: int) -> Tensor:
        """One moving input, read again from its file: for a step whose inputs do not fit together."""
        step, reader = task.shared.step, task.shared.reader
        sources = Sources(step, resident=True)
        runs = sources.blocks(self._schedule.block_elements(step))
        place = torch.empty(step.shape, dtype=TORCH_DTYPES[sources.moving[number][1].dtype], device=self._device)
        filled = 0
        for run in range(runs):
            data, give_back = reader.take((1 + number) * runs + run)
            place.view(-1)[filled : filled + data.numel()].copy_(data)
            filled += data.numel()
            give_back()
        return place

    @staticmethod
    def _stacked(runs: Sequence[Tensor]) -> Tensor | list[Tensor]:
        # rows of one tensor, if `_places` made them so
        whole = runs[0]._base if runs else None
        return whole if whole is not None and whole.ndim == runs[0].ndim + 1 else list(runs)

    def _drain(self, window: deque[_Task], *, to: int) -> Iterator[Block]:
        """Hand over the window's oldest tasks until `to` are left."""
        while len(window) > to:
            task = window[0]
            assert task.future is not None, "a task in the window was submitted"
            if not task.future.result():
                self._try_again(task, window)
            yield from self._hand_over(task)
            window.popleft()

    def _try_again(self, task: _Task, window: deque[_Task]) -> None:
        """Alone, then in pieces. Raises MergeError where that does not fit either."""
        step = task.shared.step
        for pieces in (False, True):
            for other in list(window)[1:]:
                if other.future is not None:
                    other.future.exception()
            self._library.synchronize(self._device)
            if self._device.type == "cuda":
                self._library.empty_cache()
            if pieces:
                task.pieces = True
                # a matrix keeps its origin only, and reads each expert when it is needed
                del task.runs[1 if step.by_matrix else len(task.runs) :]
            logger.warning(
                "%s did not fit on %s: trying again %s",
                quoted(step.name), self._plan.device, "in smaller pieces" if pieces else "alone",
            )  # fmt: skip
            if self._workers.submit(self._attempt, task).result():
                return
        raise self._does_not_fit(step)

    def _does_not_fit(self, step: Step) -> MergeError:
        nbytes = step_device_bytes(step, self._plan.memory.slot_bytes)
        return MergeError(
            f"{quoted(step.name)} does not fit on {self._plan.device}: {step.method} was planned to take "
            f"{format_bytes(nbytes)} there",
            hint="Another program may have taken memory there. Pass a smaller `--device-memory`, or `--device cpu`.",
        )

    def _hand_over(self, task: _Task) -> Iterator[Block]:
        """Copy a result to the host, the next slot while the last is handed over."""
        step, out = task.shared.step, task.out
        assert out is not None, "the task was computed"
        self._record(out, self._leaving)
        block = self._schedule.block_elements(step)
        waiting: tuple[Any, Block] | None = None
        top = 0
        for part, tally in zip(task.shared.parts, task.shared.tallies, strict=True):
            end = top + (part.elements if step.parts else len(out))
            for start in range(top, end, block) if part.name not in self._skip else ():
                slot = self._free_output()
                run = out[start : min(start + block, end)]
                with self._library.stream(self._leaving):
                    slot[: run.nbytes].view(run.dtype).copy_(run, non_blocking=True)
                data = bytes_of(slot)[: run.nbytes]
                offset = (part.first_element + task.first + start - top) * run.dtype.itemsize
                left = self._mark(self._leaving)
                if waiting is not None:
                    waiting[0].synchronize()
                    yield waiting[1]
                outcome = tally.settled() if task.last and start + block >= end else None
                waiting = left, Block(part.name, offset, data, lambda slot=slot: self._output.put(slot), outcome)  # type: ignore[misc]
            top = end
        assert waiting is not None, "a tensor without elements is copied"
        event, last = waiting
        event.synchronize()
        task.out = None
        yield last

    def _copy(self, step: Step, reader: StepReader) -> Iterator[Block]:
        """From slot to slot, without the device."""
        dtype, block = TORCH_DTYPES[step.dtype], self._schedule.block_elements(step)
        started, outcome = time.perf_counter(), Tally(step).outcome
        last = Block(step.name, 0, memoryview(b""), lambda: None)
        for number, first in enumerate(range(0, step.elements, block)):
            if number:
                yield last
            run, give_back = reader.take(number)
            slot = self._free_output()
            out = slot[: run.numel() * dtype.itemsize].view(dtype).copy_(run)
            if step.dtype != step.experts[0].dtype:
                bad = int((~torch.isfinite(out) & torch.isfinite(run)).sum())
                refuse_overflow(step, bad)
                outcome.non_finite += bad
            give_back()
            data = bytes_of(slot)[: out.nbytes]
            last = Block(step.name, first * dtype.itemsize, data, lambda slot=slot: self._output.put(slot))  # type: ignore[misc]
        outcome.seconds = time.perf_counter() - started
        last.outcome = outcome
        yield last

    def _free_output(self) -> Tensor:
        started = time.perf_counter()
        slot = self._output.get()
        self.output_waited_seconds += time.perf_counter() - started
        return slot

    def _enter_lane(self) -> None:
        if self._device.type == "cuda":
            self._library.set_device(self._device)
        self._lane.stream = self._new_stream()

    def _new_stream(self) -> Any:
        return self._library.Stream(self._device) if self._device.type == "cuda" else self._library.Stream()

    def _mark(self, stream: Any) -> Any:
        event = self._library.Event()
        event.record(stream)
        return event

    def _record(self, tensor: Tensor, stream: Any) -> None:
        # the allocator must not give the memory to another stream before this one is through with it
        if self._device.type == "cuda":
            tensor.record_stream(stream)

    def _lock(self, memory: Tensor) -> Callable[[], None] | None:
        """Lock pages in memory, so that the device copies from and to them by itself; return what unlocks them."""
        if self._device.type != "cuda":
            return None
        # torch's own pinned allocator would round the size up to a power of two
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = memory.data_ptr()
        failed = int(runtime.cudaHostRegister(address, memory.nbytes, 0))
        if failed:
            logger.warning("%s of memory cannot be locked (CUDA error %d): copies will be slower",
                           format_bytes(memory.nbytes), failed)  # fmt: skip
            return None
        return lambda: runtime.cudaHostUnregister(address)


class _Shared:
    """What the tasks of one step, or one matrix of a stack, add to: a tally for each tensor."""

    def __init__(self, step: Step, reader: StepReader, tallies: Sequence[Tally]) -> None:
        self.step, self.reader, self.tallies = step, reader, tallies
        self.parts = step.parts or (step,)

    def count(
        self, sums: Sequence[Sequence[float]], squares: Sequence[Sequence[float]], task: _Task, seconds: float
    ) -> None:
        """Add a task's results: what `Applied.sums` says of each part, and each expert's squared norm in it."""
        with _COUNTING:
            for tally, (changed, merged, lost, bad), experts in zip(self.tallies, sums, squares, strict=True):
                tally.count(changed, merged, lost)
                tally.outcome.non_finite += int(bad)
                add_facts(tally.outcome.facts, task.facts)
                tally.norms.non_finite += task.non_finite
                for index, squared in enumerate(experts):
                    tally.norms.squared[index] += squared
            self.tallies[-1].outcome.seconds += seconds


@dataclass(slots=True)
class _Task:
    """A block of elements, or a whole matrix: its inputs on the device, then its result there.

    pieces  it did not fit: to be computed in smaller ones
    """

    shared: _Shared
    first: int
    elements: int
    last: bool
    runs: list[Tensor] = field(default_factory=list)
    staged: Any = None
    future: Future[bool] | None = None
    out: Tensor | None = None
    device_bytes: int = 0
    non_finite: int = 0
    pieces: bool = False
    facts: Facts = field(default_factory=dict)
