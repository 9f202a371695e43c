"""The deltas of one step as they come from the read-ahead: by block, or as whole matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from streammerge.checkpoint import TensorEntry
from streammerge.delta import Delta, Deltas, Found
from streammerge.outcome import ORIGIN, Norms, refuse_non_finite
from streammerge.readahead import ReadAhead, Request, Slot, cut
from streammerge.remembered import Remembered
from streammerge.step import Step, matrices_of
from streammerge.torch_dtypes import TORCH_DTYPES
from streammerge.workspace import Workspace

# elements of a stored matrix that are widened at a time
_WIDENED = 1 << 19


class Sources:
    """A step's inputs: the origin W_0 (the base, or the first expert) and the experts read beside it.

    Without a base the first expert is its own origin: its delta is zero and is not read again.
    `resident` steps keep all they read, so that further passes cost no reading; `passes` overrules the plan's;
    `again` says that all of it will be read once more, later.
    """

    def __init__(self, step: Step, *, resident: bool = False, passes: int | None = None, again: bool = False) -> None:
        self.step, self._again = step, again
        entries = (*((step.base,) if step.base else ()), *step.experts)
        self.origin: tuple[int, TensorEntry] = (step.models[0], entries[0])
        self.moving: tuple[tuple[int, TensorEntry], ...] = tuple(zip(step.models[1:], entries[1:], strict=True))
        self.passes = 1 if resident else step.passes if passes is None else passes

    @property
    def read_bytes(self) -> int:
        """Bytes of all requests: of a matrix the origin once and the rest once a pass, else all of them once a pass."""
        origins = 1 if self.step.by_matrix else self.passes
        return origins * self.origin[1].nbytes + self.passes * sum(entry.nbytes for _, entry in self.moving)

    def requests(self, block_elements: int) -> Iterator[Request]:
        """Every run the step is planned to read, in the order it will take them."""
        if self.step.by_matrix:
            for matrix in matrices_of(self.step):
                yield from self._of_matrix(matrix, block_elements)
            return
        elements, sources = self.step.elements, (self.origin, *self.moving)
        for number in range(self.passes):
            last = number == self.passes - 1 and not self._again
            for first in range(0, elements, block_elements):
                count = min(block_elements, elements - first)
                for model, entry in sources:
                    yield Request(model, entry, first, count, last)

    def blocks(self, block_elements: int) -> int:
        """Runs of one model."""
        return sum(-(-part.elements // block_elements) for part in self.step.parts or (self.step,))

    def _of_matrix(self, matrix: Step, block_elements: int) -> Iterator[Request]:
        yield from _cut(matrix, 0, block_elements, last=not self._again)
        for number in range(self.passes):
            last = number == self.passes - 1 and not self._again
            for source in range(1, 1 + len(self.moving)):
                yield from _cut(matrix, source, block_elements, last=last)


def _cut(step: Step, source: int, block_elements: int, *, last: bool) -> Iterator[Request]:
    """One matrix's runs; of a pool's, part by part. The origin is source 0."""
    for part in step.parts or (step,):
        entries = (*((part.base,) if part.base else ()), *part.experts)
        yield from cut(part.models[source], entries[source], block_elements, last=last)


class StepReader:
    """Takes one step's runs in the planned order; what is asked for out of order is read at once."""

    def __init__(self, ahead: ReadAhead, sources: Sources, block_elements: int) -> None:
        self._ahead, self._step = ahead, sources.step
        self._sources, self._block_elements = sources, block_elements
        self._planned = list(sources.requests(block_elements))
        self._taken = 0

    def take(self, position: int) -> tuple[Tensor, Callable[[], None]]:
        """The run at a position of the plan, 1-D in its stored dtype, and what gives its slot back.

        Positions beyond the plan go on as if there were more passes.
        """
        request = self._request(position)
        while self._taken < min(position, len(self._planned)):
            self._skip()
        if self._taken != position or position >= len(self._planned):
            return self._ahead.read_now(request), lambda: self._ahead.release(request)
        slot = self._ahead.take()
        assert slot.request == request, f"read-ahead gave {slot.request}, the step wants {request}"
        self._taken += 1
        return slot.data, lambda: self._ahead.give_back(slot)

    def beside(self, first_element: int, elements: int | None = None) -> Callable[[int], Tensor | None] | None:
        """A function that reads what lies beside an expert: a run of it, or all of it, in its shape. None without."""
        if not any(self._step.beside):
            return None

        def read(index: int) -> Tensor | None:
            found = self._step.beside[index]
            if found is None:
                return None
            model, entry = found
            request = Request(model, entry, first_element, entry.elements if elements is None else elements, True)
            data = self._ahead.read_now(request)
            self._ahead.release(request)
            return data.view(entry.shape) if elements is None else data

        return read

    def finish(self) -> None:
        """Give back every planned run that was not asked for."""
        while self._taken < len(self._planned):
            self._skip()

    def _request(self, position: int) -> Request:
        beyond = position - len(self._planned)
        if beyond < 0:
            return self._planned[position]
        # what the last planned pass read, counted from its end
        length = len(self._sources.moving) * self._sources.blocks(self._block_elements)
        return self._planned[beyond % length - length]

    def _skip(self) -> None:
        slot: Slot = self._ahead.take()
        self._taken += 1
        self._ahead.give_back(slot)


class ElementDeltas(Deltas):
    """One block of a tensor: the runs of every model are held, so iterating again costs no reading.

    workers  work on several experts' changes at a time, in `each`; None where one thread does all
    """

    def __init__(
        self,
        step: Step,
        names: Sequence[str],
        origin: Tensor,
        moving: Sequence[Tensor],
        first_element: int,
        workspace: Workspace,
        norms: Norms,
        workers: Executor | None,
        *,
        seed: int = 0,
        held: bool = False,
        beside: Callable[[int], Tensor | None] | None = None,
    ) -> None:
        self.name = step.name
        self._workers, self.held = workers, held
        if step.by_row:
            origin, moving = origin.view(-1, step.columns), [run.view(-1, step.columns) for run in moving]
        self.shape, self.whole = tuple(origin.shape), step.shape
        self.based, self.seed, self._beside = step.base is not None, seed, beside
        self.dtype = compute_dtype(step)
        self.device = torch.device("cpu")
        self.experts = len(step.experts)
        self.facts = {}
        self.first_element = first_element
        self._step, self._names, self._workspace, self._norms = step, names, workspace, norms
        self._runs: list[Tensor | None] = [*([] if step.base else [None]), *moving]
        # a pass before this one may have measured a whole tensor
        self._measured = [norms.begin(index, first_element, step.elements) for index in range(self.experts)]
        self._base = self.empty(*self.shape).copy_(origin)
        self._delta: Tensor | None = None
        if not norms.begin(ORIGIN, first_element, step.elements):
            squared, non_finite = self._measure(self._base, origin, 0)
            norms.origin_squared += squared
            norms.measured[ORIGIN] += self._base.numel()
            norms.non_finite += non_finite

    def __iter__(self) -> Iterator[Delta]:
        for index in range(self.experts):
            yield _ElementDelta(self, index)

    def each(self, work: Callable[[Delta, Tensor], Found]) -> tuple[list[Tensor], list[list[Found]]]:
        changes = [self.empty(*self.shape) for _ in range(self.experts)]

        def see(index: int) -> tuple[Found, tuple[float, int]]:
            form, change = partial(self._form, index), changes[index]
            formed = form(change)
            return work(_PieceDelta(index, self.first_element, form, change), change), formed

        found: list[list[Found]] = []
        for index, (result, formed) in enumerate(self._map(see)):
            self._count(index, *formed)
            found.append([result])
        return changes, found

    def _map(self, see: Callable[[int], Found]) -> Iterator[Found]:
        """What is seen of each expert."""
        if self._workers is None:
            return map(see, range(self.experts))
        return self._workers.map(see, range(self.experts))

    def base(self) -> Tensor:
        return self._base

    def beside(self, index: int) -> Tensor | None:
        found = self._beside(index) if self._beside else None
        return None if found is None else found.to(self.dtype).view(self.shape)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self._workspace.empty(shape, dtype or self.dtype)

    def form(self, index: int, out: Tensor | None) -> Tensor:
        """Expert `index`'s delta in `out`, or in the stream's one buffer."""
        if out is None:
            if self._delta is None:
                self._delta = self.empty(*self.shape)
            out = self._delta
        self._count(index, *self._form(index, out))
        return out

    def _form(self, index: int, out: Tensor) -> tuple[float, int]:
        """Form a delta; its squared norm and how many of the expert's values are not finite."""
        run = self._runs[index]
        if run is None:
            out.zero_()
            return 0.0, 0
        out.copy_(run).sub_(self._base)
        if self._measured[index]:
            return 0.0, 0
        return self._measure(out, run, index + (self._step.base is not None))

    def _measure(self, values: Tensor, run: Tensor, source: int) -> tuple[float, int]:
        """The squared norm of what was formed of a model's run, and how many of the run's values are not finite."""
        norm = torch.linalg.vector_norm(values).item()
        if math.isfinite(norm):
            return norm * norm, 0
        model = self._names[self._step.models[source]]
        return norm * norm, refuse_non_finite(run, self._step, model, self.first_element)

    def _count(self, index: int, squared: float, non_finite: int) -> None:
        if not self._measured[index]:
            self._measured[index] = True
            self._norms.measured[index] += self._base.numel()
            self._norms.squared[index] += squared
            self._norms.non_finite += non_finite


class _ElementDelta(Delta):
    def __init__(self, deltas: ElementDeltas, index: int) -> None:
        self.index, self.first_element = index, deltas.first_element
        self._deltas = deltas

    def dense(self, out: Tensor | None = None) -> Tensor:
        return self._deltas.form(self.index, out)


class _PieceDelta(Delta):
    def __init__(self, index: int, first_element: int, form: Callable[[Tensor], object], like: Tensor) -> None:
        self.index, self.first_element = index, first_element
        self._form, self._like = form, like

    def dense(self, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(self._like) if out is None else out
        self._form(out)
        return out


class MatrixDeltas(Deltas):
    """A whole matrix [out, in]: W_0 is kept as stored, each expert's delta is formed on demand.

    A matrix stored [in, out] is seen transposed. As many iterations as `reader` has passes were read ahead;
    further ones are read when asked for. Squares are added to `norms`: those of the step's parts, if it has any.

    remembered  what other merges of the same models found, and find
    """

    def __init__(
        self,
        step: Step,
        names: Sequence[str],
        reader: StepReader,
        blocks: int,
        workspace: Workspace,
        norms: Sequence[Norms],
        *,
        seed: int = 0,
        beside: Callable[[int], Tensor | None] | None = None,
        remembered: Remembered | None = None,
    ) -> None:
        self.name = step.label
        rows, columns = step.shape
        self.shape = self.whole = (columns, rows) if step.role.transposed else (rows, columns)
        self.based, self.seed, self._beside = step.base is not None, seed, beside
        self.dtype = compute_dtype(step)
        self.device = torch.device("cpu")
        self.experts = len(step.experts)
        self.facts = {}
        self._step, self._names, self._workspace, self._norms = step, names, workspace, norms
        self._reader, self._blocks = reader, blocks
        self._moving = len(step.models) - 1
        self._remembered = remembered
        self._measured = [False] * self.experts
        self._passes = 0
        self._delta: Tensor | None = None
        few_rows = max(min(_WIDENED // max(columns, 1), rows), 1)
        self._wide = torch.empty(few_rows, columns, dtype=self.dtype)
        self.stored_base = self._read_base()

    def __iter__(self) -> Iterator[Delta]:
        number = self._passes
        self._passes += 1
        for index in range(self.experts):
            yield _MatrixDelta(self, index, number)

    def base(self) -> Tensor:
        whole = self.stored_base.to(self.dtype)
        return whole.T if self._step.role.transposed else whole

    def beside(self, index: int) -> Tensor | None:
        return self._beside(index) if self._beside else None

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self._workspace.empty(shape, dtype or self.dtype)

    def recall(self, key: Hashable) -> Any | None:
        found = self._remembered.recall(self._subject(), key) if self._remembered else None
        if found is None:
            return None
        finding, squared = found
        self._measured = [True] * self.experts
        for norms, known in zip(self._norms, squared, strict=True):
            norms.squared[:] = known
        return finding

    def keep(self, key: Hashable, nbytes: int, make: Callable[[Callable[[Tensor], Tensor]], Any]) -> bool:
        if self._remembered is None:
            return False
        squared = [list(norms.squared) for norms in self._norms]
        return self._remembered.keep(self._subject(), key, nbytes, lambda copy: (make(copy), squared))

    def _subject(self) -> object:
        """All that decides about the deltas."""
        parts = self._step.parts or (self._step,)
        return [(part.models, part.base, part.experts, part.role.transposed, part.matrix) for part in parts]

    def form(self, index: int, number: int, out: Tensor | None) -> Tensor:
        """Expert `index`'s delta, read as part of pass `number`."""
        if out is None:
            if self._delta is None:
                self._delta = self._stored_like(self.dtype)
            out = self._delta.T if self._step.role.transposed else self._delta
        moving = index - (self._step.base is None)
        if moving < 0:
            return out.zero_()
        into = out.T if self._step.role.transposed else out
        position = (1 + number * self._moving + moving) * self._blocks
        squared = [0.0] * len(self._norms)
        for rows, run, give_back in self._rows(position):
            norm_squared = self._subtract(run, self.stored_base[rows], into[rows])
            if not math.isfinite(norm_squared):
                self._refuse(rows, run, index + (self._step.base is not None))
            squared[part_at(self._step, rows.start)[0]] += norm_squared
            give_back()
        if not self._measured[index]:
            self._measured[index] = True
            for norms, total in zip(self._norms, squared, strict=True):
                norms.squared[index] += total
        return out

    def _subtract(self, run: Tensor, base: Tensor, out: Tensor) -> float:
        """Form run - base in `out`, all [rows, columns]. Returns its squared norm."""
        return sum(_squared_norm(out[rows].copy_(run[rows]).sub_(wide)) for rows, wide in self._widened(base))

    def _widened(self, stored: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of a matrix and what they hold in the dtype of the deltas, a few rows at a time.

        Torch would widen all of it at once, into pages that are fresh each time: several times slower.
        """
        for first in range(0, len(stored), len(self._wide)):
            part = stored[first : first + len(self._wide)]
            yield slice(first, first + len(part)), self._wide[: len(part)].copy_(part)

    def _refuse(self, rows: slice, run: Tensor, source: int) -> None:
        number, start = part_at(self._step, rows.start)
        part = self._step.parts[number] if self._step.parts else self._step
        refuse_non_finite(run, part, self._names[self._step.models[source]], (rows.start - start) * run.shape[1])

    def _read_base(self) -> Tensor:
        entry = self._step.base or self._step.experts[0]
        kept = self._workspace.empty(self._step.shape, TORCH_DTYPES[entry.dtype])
        for rows, run, give_back in self._rows(0):
            kept[rows] = run
            norm_squared = sum(_squared_norm(wide) for _, wide in self._widened(run))
            if not math.isfinite(norm_squared):
                self._refuse(rows, run, 0)
            self._norms[part_at(self._step, rows.start)[0]].origin_squared += norm_squared
            give_back()
        return kept

    def _rows(self, position: int) -> Iterator[tuple[slice, Tensor, Callable[[], None]]]:
        columns = self._step.shape[1]
        first = 0
        for block in range(self._blocks):
            run, give_back = self._reader.take(position + block)
            rows = run.view(-1, columns)
            yield slice(first, first + len(rows)), rows, give_back
            first += len(rows)

    def _stored_like(self, dtype: torch.dtype) -> Tensor:
        return self._workspace.empty(self._step.shape, dtype)


class _MatrixDelta(Delta):
    def __init__(self, deltas: MatrixDeltas, index: int, number: int) -> None:
        self.index = index
        self._deltas, self._number = deltas, number

    def dense(self, out: Tensor | None = None) -> Tensor:
        return self._deltas.form(self.index, self._number, out)


def _squared_norm(values: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(values))
    return norm * norm


def part_at(step: Step, row: int) -> tuple[int, int]:
    """Which of a step's parts a row belongs to, and that part's first row; 0, 0 where it has none."""
    start = 0
    for number, part in enumerate(step.parts):
        if row < start + part.shape[0]:
            return number, start
        start += part.shape[0]
    return 0, 0


def compute_dtype(step: Step) -> torch.dtype:
    """The dtype of a step's arithmetic."""
    return torch.float64 if step.compute_bytes == 8 else torch.float32
