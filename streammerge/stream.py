"""Run a plan under its budget: read ahead, merge one tensor at a time, hand over finished blocks."""

from __future__ import annotations

import itertools
import math
import queue
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from streammerge import methods
from streammerge.checkpoint import Storage
from streammerge.delta import Deltas
from streammerge.memory import MOST_PIECES, piece_elements, piece_workspace_bytes
from streammerge.outcome import Block, Norms, Tally, add_facts, naming, refuse_non_finite, refuse_overflow
from streammerge.plan import Plan
from streammerge.readahead import ReadAhead, Slot
from streammerge.remembered import Remembered
from streammerge.schedule import Schedule
from streammerge.shared_blocks import MergedPiece, SharedBlocks
from streammerge.step import COPY, Step, matrices_of
from streammerge.streamed_deltas import ElementDeltas, MatrixDeltas, StepReader, compute_dtype
from streammerge.thin_steps import ThinChange, merge_thin, read_factors
from streammerge.torch_dtypes import TORCH_DTYPES
from streammerge.workspace import Workspace
from streammerge.world import thread_limit
from streammerge_kernels.apply import apply_
from streammerge_kernels.matmul import fast_matmul

# up to here several threads save a matrix no time, and on busy cores cost much: 128 x 128
SMALL_MATRIX_ELEMENTS = 1 << 14

Found = TypeVar("Found")


class Stream:
    """Iterate to merge: blocks come in the plan's order, each tensor's in the order of its bytes.

    skip       tensors that need no merging because an earlier run finished them
    workspace  to be shared with other streams, none of which is in the middle of a step on the same thread; None for
               one of its own
    remembered  what streams of the same models leave to each other; None where there is only this one
    threads    for arithmetic; None for all there are

    Use as a context manager: leaving it, however, stops the reading thread and closes every file.
    Raises MergeError naming tensor and expert, and whatever reading raised.
    """

    def __init__(
        self,
        plan: Plan,
        storage: Storage,
        *,
        skip: Container[str] = (),
        workspace: Workspace | None = None,
        remembered: Remembered | None = None,
        threads: int | None = None,
    ) -> None:
        self._plan = plan
        self._schedule = Schedule(plan, skip)
        self.to_read_bytes = self._schedule.read_bytes
        self._skip = skip
        self._looks: dict[str, methods.Look] = {}
        self._settings = ExitStack()
        self.output_waited_seconds = 0.0
        self.workspace = workspace or Workspace(plan.memory.workspace_bytes)
        self._remembered = remembered
        self._threads = threads or thread_limit()
        at_a_time = _pieces_at_a_time(plan, self._threads)
        self._workers = _workers(at_a_time) if at_a_time > 1 else None
        self._parts = self.workspace.parts(at_a_time) if self._workers else []
        self._workspaces: queue.SimpleQueue[Workspace] = queue.SimpleQueue()
        for part in self._parts:
            self._workspaces.put(part)
        self._output: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        slot_bytes = plan.memory.slot_bytes
        memory = torch.empty(plan.memory.output_slots * slot_bytes, dtype=torch.uint8)
        for i in range(plan.memory.output_slots):
            self._output.put(Slot(memory[i * slot_bytes : (i + 1) * slot_bytes]))
        self.ahead = ReadAhead(
            storage,
            plan.models,
            self._schedule.requests(),
            slots=plan.memory.input_slots,
            slot_bytes=slot_bytes,
        )

    def __enter__(self) -> Stream:
        threads = torch.get_num_threads()
        self._settings.callback(torch.set_num_threads, threads)
        if any(step.by_matrix for step in self._schedule.steps):
            self._settings.enter_context(fast_matmul())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._settings.close()
        if self._workers:
            self._workers.shutdown()
        self.ahead.close()

    def __iter__(self) -> Iterator[Block]:
        for number, looks in itertools.groupby(self._schedule.looks, key=lambda look: look[0]):
            steps = [step for _, step in looks]
            for step in steps:
                with naming(step):
                    self._look_at_model(number, step)
            for method in {step.method for step in steps}:
                self._looks[method].finish(number)
        for step in self._schedule.steps:
            with naming(step):
                yield from self._run(step)

    def memory_facts(self) -> dict[str, int]:
        """What was taken of the workspace, for the report."""
        return {
            "workspace_planned": self._plan.memory.workspace_bytes,
            "workspace_used": max(self.workspace.peak_bytes, sum(part.peak_bytes for part in self._parts)),
            "workspace_overdraft": max(self.workspace.overdraft_bytes, sum(p.overdraft_bytes for p in self._parts)),
        }

    def _run(self, step: Step) -> Iterator[Block]:
        started = time.perf_counter()
        tallies = {part.name: Tally(part) for part in step.parts or (step,)}
        torch.set_num_threads(threads_for(step, self._threads))
        waiting: Block | None = None
        for finished in self._merge(step, tallies):
            if waiting is not None:
                if finished.name != waiting.name:
                    waiting.outcome = tallies[waiting.name].settled()
                yield waiting
            waiting = finished
        last = waiting or Block(step.name, 0, memoryview(b""), lambda: None)
        last.outcome = tallies[last.name].settled()
        last.outcome.seconds = time.perf_counter() - started
        yield last

    def _merge(self, step: Step, tallies: Mapping[str, Tally]) -> Iterator[Block]:
        by_matrix = self._thin if step.thin else self._by_matrix
        merge = self._copy if step.method == COPY else by_matrix if step.by_matrix else self._by_element
        block = self._schedule.block_elements(step)
        for matrix in matrices_of(step):
            reader = StepReader(self.ahead, self._schedule.sources(matrix), block)
            yield from merge(matrix, reader, block, tallies)
            reader.finish()
            self.workspace.reset()

    def _copy(self, step: Step, reader: StepReader, block: int, tallies: Mapping[str, Tally]) -> Iterator[Block]:
        for number, first in enumerate(range(0, step.elements, block)):
            run, give_back = reader.take(number)
            yield self._emit(step, first, run, tally=tallies[step.name])
            give_back()

    def _by_element(self, step: Step, reader: StepReader, block: int, tallies: Mapping[str, Tally]) -> Iterator[Block]:
        tally = tallies[step.name]
        method = methods.describe(step.method)
        function = method.load()
        runs = _Runs(reader, step, block, held=self._schedule.is_held(step))
        look = self._looks.get(step.method) if step.looks_at_model else None
        passes = 0 if step.looks_at_model else step.looks
        for number in range(passes):
            for deltas in self._pieces(step, reader, runs, number, tally.norms):
                look = look or method.look(deltas, step.arguments)
                look.look(number, deltas)
            if look is not None:
                look.finish(number)

        def merge(piece: _Piece, norms: Norms, workspace: Workspace) -> MergedPiece:
            deltas = self._deltas(step, reader, runs, piece, norms, workspace)
            deltas.seen = look
            merged = function(deltas, **step.arguments)
            sums = self._apply(step, piece.first, deltas.base(), merged, piece.out, measured=step.base is not None)
            workspace.reset()
            return MergedPiece(norms, sums, deltas.facts)

        shared = SharedBlocks(self._remembered, self._plan, step)
        for first, origin, moving in runs.blocks(passes):
            slot, out = self._slot_for(step, origin)
            merged = shared.recall(first, out)
            if merged is None:
                pieces = _cut(step, first, origin, moving, out)
                of_pieces = [tally.norms.of_piece(piece.first, step.elements) for piece in pieces]
                merged = list(self._each(merge, pieces, of_pieces))
                shared.keep(first, out, merged)
            for piece in merged:
                tally.norms.add(piece.norms, step.elements)
                add_facts(tally.outcome.facts, piece.facts)
                self._count(step, piece.sums, tally)
            yield self._block(step, first, slot, out)

    def _each(
        self, merge: Callable[[_Piece, Norms, Workspace], Found], pieces: Sequence[_Piece], norms: Sequence[Norms]
    ) -> Iterable[Found]:
        """What `merge` gives of each piece, several at a time."""
        if self._workers is None or len(pieces) == 1:
            return [merge(piece, sums, self.workspace) for piece, sums in zip(pieces, norms, strict=True)]

        def in_its_own(piece: _Piece, sums: Norms) -> Found:
            workspace = self._workspaces.get()
            try:
                return merge(piece, sums, workspace)
            finally:
                self._workspaces.put(workspace)

        return self._workers.map(in_its_own, pieces, norms)

    def _look_at_model(self, number: int, step: Step) -> None:
        block = self._schedule.block_elements(step)
        torch.set_num_threads(threads_for(step, self._threads))
        for matrix in matrices_of(step):
            reader = StepReader(self.ahead, self._schedule.look_sources(matrix), block)
            for deltas in self._model_blocks(matrix, reader, block):
                if step.method not in self._looks:
                    self._looks[step.method] = methods.describe(step.method).look(deltas, step.arguments)
                self._looks[step.method].look(number, deltas)
            reader.finish()
            self.workspace.reset()

    def _model_blocks(self, step: Step, reader: StepReader, block: int) -> Iterator[Deltas]:
        """What a look at the model sees of one step: its pieces, or the matrix."""
        norms = [Norms(len(step.experts)) for _ in step.parts or (step,)]
        if step.by_matrix:
            yield self._matrix(step, reader, block, norms)
        else:
            yield from self._pieces(step, reader, _Runs(reader, step, block, held=False), 0, norms[0])

    def _pieces(
        self, step: Step, reader: StepReader, runs: _Runs, number: int, norms: Norms
    ) -> Iterator[ElementDeltas]:
        """Each piece's deltas, in one pass; its memory is free again when the next is asked for."""
        for first, origin, moving in runs.blocks(number):
            for piece in _cut(step, first, origin, moving):
                yield self._deltas(step, reader, runs, piece, norms, self.workspace, self._workers)
                self.workspace.reset()

    def _deltas(
        self,
        step: Step,
        reader: StepReader,
        runs: _Runs,
        piece: _Piece,
        norms: Norms,
        workspace: Workspace,
        workers: Executor | None = None,
    ) -> ElementDeltas:
        return ElementDeltas(
            step, self._plan.names, piece.origin, piece.moving, piece.first, workspace, norms, workers,
            seed=self._plan.recipe.seed, held=runs.held, beside=reader.beside(piece.first, len(piece.origin)),
        )  # fmt: skip

    def _by_matrix(self, step: Step, reader: StepReader, block: int, tallies: Mapping[str, Tally]) -> Iterator[Block]:
        function = methods.describe(step.method).load()
        deltas = self._matrix(step, reader, block, [tally.norms for tally in tallies.values()])
        deltas.seen = self._looks.get(step.method) if step.looks_at_model else None
        merged = function(deltas, **step.arguments)
        stored = merged.T if step.role.transposed else merged
        rows = block // step.shape[1]
        top = 0
        for part in step.parts or (step,):
            tally = tallies[part.name]
            add_facts(tally.outcome.facts, deltas.facts)
            for first in range(0, part.shape[0], rows) if part.name not in self._skip else ():
                place = slice(top + first, top + min(first + rows, part.shape[0]))
                base = deltas.stored_base[place]
                # contiguous already, unless the matrix is seen transposed
                at = part.first_element + first * step.shape[1]
                yield self._emit(part, at, base, stored[place].contiguous(), tally)
            top += part.shape[0]

    def _matrix(self, step: Step, reader: StepReader, block: int, norms: Sequence[Norms]) -> MatrixDeltas:
        return MatrixDeltas(
            step, self._plan.names, reader, self._schedule.sources(step).blocks(block), self.workspace, norms,
            seed=self._plan.recipe.seed, beside=reader.beside(0), remembered=self._remembered,
        )  # fmt: skip

    def _thin(self, step: Step, reader: StepReader, block: int, tallies: Mapping[str, Tally]) -> Iterator[Block]:
        tally, columns, dtype = tallies[step.name], step.shape[1], compute_dtype(step)
        take, start = read_factors(step, reader, block)
        merged = merge_thin(step, self._plan.names, take, tally)
        change = ThinChange(merged, dtype, transposed=step.role.transposed)
        for number, first in enumerate(range(0, step.elements, block)):
            run, give_back = reader.take(start + number)
            if not math.isfinite(torch.linalg.vector_norm(run, dtype=dtype).item()):
                refuse_non_finite(run, step, self._plan.names[step.models[0]], first)
            base = run.view(-1, columns)
            row = first // columns
            yield self._emit(step, first, base, change.rows(row, row + len(base)), tally)
            give_back()

    def _emit(
        self,
        step: Step,
        first: int,
        base: Tensor,
        merged: Tensor | None = None,
        tally: Tally | None = None,
    ) -> Block:
        """Round base + merged into an output slot; `merged` may be overwritten."""
        slot, out = self._slot_for(step, base)
        if merged is None:
            out.copy_(base)
            # a norm is read faster than elements are tested
            wide = torch.float64 if out.dtype is torch.float64 else torch.float32
            if step.dtype != step.experts[0].dtype and not math.isfinite(torch.linalg.vector_norm(out, dtype=wide)):
                # a copy keeps its infinities: the cast made the others
                bad = int((~torch.isfinite(out) & torch.isfinite(base)).sum())
                refuse_overflow(step, bad)
                if tally is not None:
                    tally.outcome.non_finite += bad
        else:
            measured = step.base is not None and tally is not None
            self._count(step, self._apply(step, first, base, merged, out, measured=measured), tally)
        return self._block(step, first, slot, out)

    def _apply(
        self, step: Step, first: int, base: Tensor, merged: Tensor, out: Tensor, *, measured: bool
    ) -> list[float]:
        """Round base + merged to `out`; what `Applied` counts."""
        assert merged.shape == base.shape, f"{step.method} returned {tuple(merged.shape)} for {base.shape}"
        return apply_(
            base,
            # a transposed matrix comes as a view; rounding goes by the order of the output's bytes
            merged.contiguous(),
            out.view(base.shape),
            rounding=self._plan.recipe.rounding,
            seed=self._plan.recipe.seed,
            name=step.name,
            first_index=first,
            measure=measured,
            base_dtype=TORCH_DTYPES[(step.base or step.experts[0]).dtype],
        ).tolist()

    def _count(self, step: Step, sums: list[float], tally: Tally | None) -> None:
        changed, merged_squares, lost_squares, beyond = sums
        refuse_overflow(step, int(beyond))
        if tally is not None:
            tally.outcome.non_finite += int(beyond)
            tally.count(changed, merged_squares, lost_squares)

    def _slot_for(self, step: Step, run: Tensor) -> tuple[Slot, Tensor]:
        """A free output slot, and its beginning in the run's shape and the output's dtype."""
        slot, dtype = self._free_output(), TORCH_DTYPES[step.dtype]
        out = slot.view(run.numel() * dtype.itemsize, dtype)
        return slot, out if run.ndim == 1 else out.view(run.shape)

    def _block(self, step: Step, first: int, slot: Slot, out: Tensor) -> Block:
        size = out.dtype.itemsize
        return Block(step.name, first * size, slot.bytes[: out.numel() * size], lambda: self._output.put(slot))

    def _free_output(self) -> Slot:
        started = time.perf_counter()
        slot = self._output.get()
        self.output_waited_seconds += time.perf_counter() - started
        return slot


class _Piece(NamedTuple):
    """A piece of a block: where in the tensor it begins, the models' runs and that of the output, if there is one."""

    first: int
    origin: Tensor
    moving: Sequence[Tensor]
    out: Tensor


def _cut(step: Step, first: int, origin: Tensor, moving: Sequence[Tensor], out: Tensor | None = None) -> list[_Piece]:
    """A block's pieces; `out` is its part of the output, where it has one yet."""
    out, size = origin if out is None else out, piece_elements(step)
    if len(origin) <= size:
        return [_Piece(first, origin, moving, out)]
    places = [slice(start, start + size) for start in range(0, len(origin), size)]
    return [_Piece(first + place.start, origin[place], [run[place] for run in moving], out[place]) for place in places]


class _Runs:
    """A step's runs block by block, pass after pass; `held` takes each once and keeps it to the last pass."""

    def __init__(self, reader: StepReader, step: Step, block: int, *, held: bool) -> None:
        self._reader, self._step, self._block, self.held = reader, step, block, held
        self._kept: dict[int, tuple[Tensor, Callable[[], None]]] = {}

    def blocks(self, number: int) -> Iterator[tuple[int, Tensor, Sequence[Tensor]]]:
        """In pass `number`: the first element, the origin's run and the others'."""
        step, models = self._step, len(self._step.models)
        blocks = -(-step.elements // self._block)
        last = number == (0 if step.looks_at_model else step.looks)
        for place in range(blocks):
            before = 0 if self.held else number * blocks
            taken = [self._take((before + place) * models + model) for model in range(models)]
            origin, *moving = (run for run, _ in taken)
            yield place * self._block, origin, moving
            for give_back in (give_back for _, give_back in taken if last or not self.held):
                give_back()

    def _take(self, position: int) -> tuple[Tensor, Callable[[], None]]:
        if not self.held:
            return self._reader.take(position)
        if position not in self._kept:
            self._kept[position] = self._reader.take(position)
        return self._kept[position]


def threads_for(step: Step, most: int | None = None) -> int:
    """Threads for a step's arithmetic, beside those that read and write; of `most`, or of all there are."""
    # matrix products hide reading and writing; blocks of elements, and factors, compete with them for the cores, and
    # a parallel loop whose threads must wait for a core is many times slower than a serial one
    most = thread_limit() if most is None else most
    if step.by_matrix and not step.thin:
        return most if step.elements // step.matrices > SMALL_MATRIX_ELEMENTS else 1
    return max(most - 2, 1)


def _pieces_at_a_time(plan: Plan, threads: int) -> int:
    """How many threads merge a piece each: as many as the workspace was planned for."""
    slot_bytes = plan.memory.slot_bytes
    largest = max((piece_workspace_bytes(step, slot_bytes) for step in plan.steps if not step.by_matrix), default=0)
    return min(threads, MOST_PIECES, plan.memory.workspace_bytes // largest) if largest else 1


def _workers(count: int) -> ThreadPoolExecutor:
    """Threads that each work on a piece of a block: unlike a parallel loop's, none waits for another."""
    return ThreadPoolExecutor(count, "streammerge-piece", torch.set_num_threads, (1,))
