"""One storage for several merges: what they read at about the same time, and what they fetch, comes once.

Nothing that one of them ends or discards is taken from the others.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from streammerge.checkpoint import ByteFile, FileFacts, Storage
from streammerge.storage.places import Fetching, Place

CHUNK_BYTES = 1 << 20

_Key = tuple[str, str, int]


class SharedStorage:
    """A storage that merges use beside and after each other, each as if it were its own.

    capacity_bytes  tensor data is read in chunks, of which so many bytes are kept for other readers; with 0 it is
                    read as it is asked for

    Files are fetched until the last of those that expect any stops, or all do at `end`. A file that one discards goes
    when everybody who claimed it has discarded it; so one that fails keeps what it claimed, to be tried again.

    `read_bytes` counts what was really read in chunks. Threads may use it side by side, but for `keep` and `claim`: a
    chunk that one of them reads is waited for by the others that want it.
    """

    def __init__(self, storage: Storage, capacity_bytes: int = 0) -> None:
        self.read_bytes = 0
        self._storage = storage
        self._fetching = storage if isinstance(storage, Fetching) else None
        self._chunks: OrderedDict[_Key, _Chunk] = OrderedDict()
        self._lock = threading.Lock()
        self._claims: Counter[Place] = Counter()
        self._expecting = 0
        # one that ends all fetching must not end what another has just begun
        self._fetches = threading.RLock()
        self.keep(capacity_bytes)

    def keep(self, capacity_bytes: int) -> None:
        """Keep so many bytes from now on, for files that are opened from now on; forget what was kept."""
        with self._lock:
            self._most = max(capacity_bytes // CHUNK_BYTES, 1) if capacity_bytes else 0
            self._chunks.clear()

    # what every storage does

    def files(self, location: str) -> dict[str, FileFacts]:
        """The plain files of a model."""
        return self._storage.files(location)

    def read(self, location: str, name: str, offset: int, nbytes: int) -> bytes:
        """A small range of a file, not kept."""
        return self._storage.read(location, name, offset, nbytes)

    def open(self, location: str, name: str) -> ByteFile:
        """Open a file for reading tensor data."""
        file = self._storage.open(location, name)
        if not self._most:
            return file
        return _SharedFile(self, file, location, name, self._storage.files(location)[name].size)

    # what a storage does that fetches: see `streammerge.fetching`

    def pinned(self, location: str) -> str:
        """The location with all that could come to mean something else made fast."""
        return self._fetching.pinned(location) if self._fetching else location

    def to_fetch(self, location: str, name: str) -> int:
        """Bytes to be fetched before the file can be read."""
        return self._fetching.to_fetch(location, name) if self._fetching else 0

    def cache_folder(self, location: str) -> str:
        """Where what is fetched of a model is kept; the model's own place, if nothing is."""
        return self._fetching.cache_folder(location) if self._fetching else location

    def downloaded(self, location: str) -> str:
        """A folder here that holds all of a model: its own, or where it was fetched to."""
        return self._fetching.downloaded(location) if self._fetching else location

    def expect(self, places: Sequence[Place], ahead: int) -> None:
        """Fetch files in this order, after those that others expect already."""
        with self._fetches:
            self._expecting += 1
            if self._fetching:
                self._fetching.expect(places, ahead)

    def discard(self, location: str, name: str) -> None:
        """One merge will not read the file again: delete it if nobody will."""
        with self._lock:
            self._claims[location, name] -= 1
            last = self._claims[location, name] <= 0
        if self._fetching and last:
            self._fetching.discard(location, name)

    def stop(self) -> None:
        """One merge expects no more files: end fetching if nobody does."""
        with self._fetches:
            self._expecting -= 1
            if self._expecting <= 0:
                self.end()

    # what several merges need beside

    def claim(self, places: Iterable[Place]) -> None:
        """One more merge will read these files, and discard them if it discards any."""
        self._claims.update(set(places))

    def end(self) -> None:
        """End all fetching: nobody goes on."""
        with self._fetches:
            self._expecting = 0
            if self._fetching:
                self._fetching.stop()

    # how

    def chunk(self, file: ByteFile, location: str, name: str, number: int, nbytes: int) -> memoryview:
        """One chunk's bytes, read if nobody has."""
        key = location, name, number
        with self._lock:
            chunk = self._chunks.get(key)
            mine = chunk is None
            if chunk is None:
                chunk = self._chunks[key] = _Chunk()
                while len(self._chunks) > self._most:
                    self._chunks.popitem(last=False)
            self._chunks.move_to_end(key)
        if mine:
            self._fill(chunk, file, key, nbytes)
        chunk.ready.wait()
        if chunk.failure is not None:
            raise chunk.failure
        return chunk.data

    def _fill(self, chunk: _Chunk, file: ByteFile, key: _Key, nbytes: int) -> None:
        offset = key[2] * CHUNK_BYTES
        try:
            buffer = memoryview(bytearray(nbytes))
            found = file.fetch(offset, nbytes, buffer)
            if found.obj is not buffer.obj:
                buffer[:] = found
            file.release(offset, nbytes)
            chunk.data = buffer
            with self._lock:
                self.read_bytes += nbytes
        except BaseException as error:
            chunk.failure = error
            with self._lock:
                # the next reader tries again
                self._chunks.pop(key, None)
            raise
        finally:
            chunk.ready.set()


@dataclass(slots=True, eq=False)
class _Chunk:
    data: memoryview = field(default_factory=lambda: memoryview(b""))
    ready: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None


class _SharedFile:
    def __init__(self, shared: SharedStorage, file: ByteFile, location: str, name: str, size: int) -> None:
        self._shared, self._file, self._place, self._size = shared, file, (location, name), size

    def fetch(self, offset: int, nbytes: int, buffer: memoryview) -> memoryview:
        done = 0
        while done < nbytes:
            number, skipped = divmod(offset + done, CHUNK_BYTES)
            length = max(min(CHUNK_BYTES, self._size - number * CHUNK_BYTES), skipped + 1)
            chunk = self._shared.chunk(self._file, *self._place, number, length)
            part = chunk[skipped : skipped + nbytes - done]
            buffer[done : done + len(part)] = part
            done += len(part)
        return buffer[:nbytes]

    def release(self, offset: int, nbytes: int) -> None:
        """Chunks are given back as others take their place."""

    def close(self) -> None:
        self._file.close()
