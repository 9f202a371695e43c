"""Read what the plan will need, in its order, ahead of its use, into slots that are reused."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from streammerge.checkpoint import DTYPE_BYTES, ByteFile, Checkpoint, Storage, TensorEntry
from streammerge.derived import DerivedEntry
from streammerge.torch_dtypes import TORCH_DTYPES

# of the slots, so many are given back at a time: the reading thread wakes up once for all of them
_GIVEN_BACK = 1 / 16


# a tuple is made and compared in a fraction of a dataclass's time, and there are several for each tensor
class Request(NamedTuple):
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
        return self.entry.offset + self.first_element * DTYPE_BYTES[self.entry.dtype]

    @property
    def nbytes(self) -> int:
        """Length of the run."""
        return self.elements * DTYPE_BYTES[self.entry.dtype]


class Slot:
    """A reusable buffer of uint8 and what was last read into it: `data`, 1-D in its stored dtype.

    `bytes` is all of it, for system calls.
    """

    __slots__ = ("_buffer", "_view", "_viewed", "bytes", "data", "request")

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = self._view = self.data = buffer
        self._viewed = len(buffer), torch.uint8
        self.bytes = bytes_of(buffer)
        self.request: Request | None = None

    def view(self, nbytes: int, dtype: torch.dtype) -> Tensor:
        """Its first bytes as a 1-D tensor: the same one as before, where as many were asked for in that dtype."""
        # making one takes longer than a small tensor's arithmetic, and runs of equal size are what most files hold
        if self._viewed != (nbytes, dtype):
            self._viewed, self._view = (nbytes, dtype), self._buffer[:nbytes].view(dtype)
        return self._view


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
        self._free: queue.SimpleQueue[list[Slot] | None] = queue.SimpleQueue()
        memory = torch.empty(slots * slot_bytes, dtype=torch.uint8) if memory is None else memory
        self._given_back = [Slot(memory[i * slot_bytes : (i + 1) * slot_bytes]) for i in range(slots)]
        self._most_given_back = slots * _GIVEN_BACK
        # of the reading thread
        self._usable: deque[Slot] = deque()
        self._hand_back()
        self._ready: queue.SimpleQueue[Slot | BaseException] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="streammerge-read", daemon=True)
        self._thread.start()

    def take(self) -> Slot:
        """The next request's slot, waiting for it. Raises what the reading thread raised."""
        started = time.perf_counter()
        if self._ready.empty():
            # it may be what reading waits for
            self._hand_back()
        slot = self._ready.get()
        self.waited_seconds += time.perf_counter() - started
        if isinstance(slot, BaseException):
            raise slot
        return slot

    def give_back(self, slot: Slot) -> None:
        """The slot's data is no longer needed. To be called by the thread that takes."""
        self._given_back.append(slot)
        if len(self._given_back) >= self._most_given_back:
            self._hand_back()

    def read_now(self, request: Request) -> Tensor:
        """Read a run out of turn, into memory of its own: 1-D in its stored dtype. `release` when it is done with."""
        started = time.perf_counter()
        data = self._fetch(request, _slot_of(request))
        self.waited_seconds += time.perf_counter() - started
        return data

    def release(self, request: Request) -> None:
        """Give back what reading a run took of memory and page cache, unless it is to be read again."""
        if request.last and not isinstance(request.entry, DerivedEntry):
            self._files.of(request).release(request.offset, request.nbytes)

    def close(self) -> None:
        """Stop reading, wait for the thread and close the files."""
        self._stopped.set()
        self._hand_back()
        self._free.put(None)
        self._thread.join()
        while not self._free.empty():
            self._usable += self._free.get() or ()
        while not self._ready.empty():
            read = self._ready.get()
            self._usable += () if isinstance(read, BaseException) else (read,)
        for slot in self._usable:
            self._empty(slot)
        self._files.close()

    def _run(self) -> None:
        try:
            for request in self._requests:
                slot = self._next_free()
                if slot is None:
                    return
                started = time.perf_counter()
                self._empty(slot)
                slot.data = self._fetch(request, slot)
                slot.request = request
                self.busy_seconds += time.perf_counter() - started
                self.read_bytes += request.nbytes
                self._ready.put(slot)
        except BaseException as error:  # noqa: BLE001 - handed over to the thread that takes
            self._ready.put(error)

    def _next_free(self) -> Slot | None:
        if not self._usable:
            self._usable += self._free.get() or ()
        return None if self._stopped.is_set() else self._usable.popleft()

    def _hand_back(self) -> None:
        if self._given_back:
            slots, self._given_back = self._given_back, []
            self._free.put(slots)

    def _fetch(self, request: Request, slot: Slot) -> Tensor:
        nbytes, dtype = request.nbytes, TORCH_DTYPES[request.entry.dtype]
        if isinstance(request.entry, DerivedEntry):
            return self._derive(request, request.entry, slot.view(nbytes, dtype))
        view = self._files.of(request).fetch(request.offset, nbytes, slot.bytes)
        if view.obj is slot.bytes.obj:
            return slot.view(nbytes, dtype)
        return torch.frombuffer(view, dtype=torch.uint8).view(dtype)

    def _derive(self, request: Request, entry: DerivedEntry, out: Tensor) -> Tensor:
        parts: list[Request] = []

        def read(part: TensorEntry, first_element: int, elements: int) -> Tensor:
            parts.append(Request(request.model, part, first_element, elements, request.last))
            return self._fetch(parts[-1], _slot_of(parts[-1]))

        entry.derivation.fill(entry, out, request.first_element, read)
        for part in parts:
            self.release(part)
        return out

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
        if (file := self._open.get(place)) is not None:
            return file
        with self._lock:
            if place not in self._open:
                self._open[place] = self._storage.open(*place)
            return self._open[place]

    def close(self) -> None:
        for file in self._open.values():
            file.close()


def _slot_of(request: Request) -> Slot:
    return Slot(torch.empty(request.nbytes, dtype=torch.uint8))


def bytes_of(buffer: Tensor) -> memoryview:
    """The memory of a uint8 tensor, for system calls to read into or write from."""
    return memoryview(buffer.numpy())  # type: ignore[arg-type]  # numpy's stubs hide the buffer protocol


def cut(model: int, entry: TensorEntry, block_elements: int, *, last: bool) -> Iterator[Request]:
    """A tensor as runs of at most `block_elements`."""
    for first in range(0, entry.elements, block_elements):
        yield Request(model, entry, first, min(block_elements, entry.elements - first), last)
