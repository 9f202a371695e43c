"""Read what the plan will need, in its order, ahead of its use, into slots that are reused."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streammerge.checkpoint import ByteFile, Checkpoint, Storage, TensorEntry
from streammerge.derived import DerivedEntry
from streammerge.torch_dtypes import TORCH_DTYPES


@dataclass(frozen=True, slots=True)
class Request:
    """A run of one tensor's bytes. `last`: nobody is planned to read it again.

    `offset` says nothing of a derived tensor, whose parts are read.
    """

    model: int
    entry: TensorEntry
    first_element: int
    elements: int
    last: bool

    @property
    def offset(self) -> int:
        """Position in the file."""
        return self.entry.offset + self.first_element * self._itemsize

    @property
    def nbytes(self) -> int:
        """Length of the run."""
        return self.elements * self._itemsize

    @property
    def _itemsize(self) -> int:
        return self.entry.nbytes // max(self.entry.elements, 1)


class Slot:
    """A reusable buffer of uint8 and what was last read into it."""

    __slots__ = ("buffer", "data", "request")

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.data: Tensor = buffer
        self.request: Request | None = None


class ReadAhead:
    """A thread that fulfils requests in order, as far ahead as there are free slots.

    requests  in the order in which they will be taken
    slots     how many buffers of `slot_bytes` there are; no request is larger than one
    memory    what the slots are cut from, uint8; fresh memory when None

    `take` gives the next fulfilled request; `give_back` frees its slot. An error in the thread is raised
    by `take`. `busy_seconds` is time spent reading; `waited_seconds` is time `take` spent waiting.
    """

    def __init__(
        self,
        storage: Storage,
        models: Sequence[Checkpoint],
        requests: Iterable[Request],
        *,
        slots: int,
        slot_bytes: int,
        memory: Tensor | None = None,
    ) -> None:
        self.busy_seconds = 0.0
        self.waited_seconds = 0.0
        self.read_bytes = 0
        self._files = _OpenFiles(storage, models)
        self._requests = iter(requests)
        self._slot_bytes = slot_bytes
        # None says that there will be no more
        self._free: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        memory = torch.empty(slots * slot_bytes, dtype=torch.uint8) if memory is None else memory
        for i in range(slots):
            self._free.put(Slot(memory[i * slot_bytes : (i + 1) * slot_bytes]))
        self._ready: queue.SimpleQueue[Slot | BaseException] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="streammerge-read", daemon=True)
        self._thread.start()

    def take(self) -> Slot:
        """The next request's slot, waiting for it. Raises what the reading thread raised."""
        started = time.perf_counter()
        slot = self._ready.get()
        self.waited_seconds += time.perf_counter() - started
        if isinstance(slot, BaseException):
            raise slot
        return slot

    def give_back(self, slot: Slot) -> None:
        """The slot's data is no longer needed."""
        self._free.put(slot)

    def read_now(self, request: Request) -> Tensor:
        """Read a run out of turn, into memory of its own; `release` when it is done with."""
        started = time.perf_counter()
        data = self._fetch(request, torch.empty(request.nbytes, dtype=torch.uint8))
        self.waited_seconds += time.perf_counter() - started
        return data

    def release(self, request: Request) -> None:
        """Give back what reading a run took of memory and page cache, unless it is to be read again."""
        if request.last and not isinstance(request.entry, DerivedEntry):
            self._files.of(request).release(request.offset, request.nbytes)

    def close(self) -> None:
        """Stop reading, wait for the thread and close the files."""
        self._stopped.set()
        self._free.put(None)
        self._thread.join()
        for slots in (self._free, self._ready):
            while not slots.empty():
                unused = slots.get()
                if isinstance(unused, Slot):
                    self._empty(unused)
        self._files.close()

    def _run(self) -> None:
        try:
            for request in self._requests:
                slot = self._next_free()
                if slot is None:
                    return
                started = time.perf_counter()
                self._empty(slot)
                slot.data = self._fetch(request, slot.buffer)
                slot.request = request
                self.busy_seconds += time.perf_counter() - started
                self.read_bytes += request.nbytes
                self._ready.put(slot)
        except BaseException as error:  # noqa: BLE001 - handed over to the thread that takes
            self._ready.put(error)

    def _next_free(self) -> Slot | None:
        slot = self._free.get()
        if slot is not None and self._stopped.is_set():
            self._free.put(slot)
            return None
        return slot

    def _fetch(self, request: Request, buffer: Tensor) -> Tensor:
        if isinstance(request.entry, DerivedEntry):
            return self._derive(request, request.entry, buffer[: request.nbytes])
        file = self._files.of(request)
        own = bytes_of(buffer)
        view = file.fetch(request.offset, request.nbytes, own)
        if view.obj is own.obj:
            return buffer[: request.nbytes]
        return torch.frombuffer(view, dtype=torch.uint8)

    def _derive(self, request: Request, entry: DerivedEntry, buffer: Tensor) -> Tensor:
        parts: list[Request] = []

        def read(part: TensorEntry, first_element: int, elements: int) -> Tensor:
            parts.append(Request(request.model, part, first_element, elements, request.last))
            data = self._fetch(parts[-1], torch.empty(parts[-1].nbytes, dtype=torch.uint8))
            return data.view(TORCH_DTYPES[part.dtype])

        entry.derivation.fill(entry, buffer.view(TORCH_DTYPES[entry.dtype]), request.first_element, read)
        for part in parts:
            self.release(part)
        return buffer

    def _empty(self, slot: Slot) -> None:
        # by this thread, so that the one that computes is not kept
        if slot.request is not None:
            self.release(slot.request)
        slot.request = None


class _OpenFiles:
    """Each input file, opened when first read."""

    def __init__(self, storage: Storage, models: Sequence[Checkpoint]) -> None:
        self._storage = storage
        self._models = models
        self._open: dict[tuple[str, str], ByteFile] = {}
        self._lock = threading.Lock()

    def of(self, request: Request) -> ByteFile:
        place = (request.entry.location or self._models[request.model].location, request.entry.file)
        with self._lock:
            if place not in self._open:
                self._open[place] = self._storage.open(*place)
            return self._open[place]

    def close(self) -> None:
        for file in self._open.values():
            file.close()


def bytes_of(buffer: Tensor) -> memoryview:
    """The memory of a uint8 tensor, for system calls to read into or write from."""
    return memoryview(buffer.numpy())  # type: ignore[arg-type]  # numpy's stubs hide the buffer protocol


def cut(model: int, entry: TensorEntry, block_elements: int, *, last: bool) -> Iterator[Request]:
    """A tensor as runs of at most `block_elements`."""
    for first in range(0, entry.elements, block_elements):
        yield Request(model, entry, first, min(block_elements, entry.elements - first), last)
