"""Files that several merges read at about the same time, read once: a bounded memory of what was read last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from streammerge.checkpoint import ByteFile, FileFacts, Storage

CHUNK_BYTES = 1 << 20

_Key = tuple[str, str, int]


class SharedStorage:
    """A storage whose tensor data is read in chunks, of which the last `capacity_bytes` are kept for other readers.

    `read_bytes` counts what was really read. Safe for threads: a chunk that one of them reads is waited for by the
    others that want it.
    """

    def __init__(self, storage: Storage, capacity_bytes: int) -> None:
        self.read_bytes = 0
        self._storage, self._most = storage, max(capacity_bytes // CHUNK_BYTES, 1)
        self._chunks: OrderedDict[_Key, _Chunk] = OrderedDict()
        self._lock = threading.Lock()

    def files(self, location: str) -> dict[str, FileFacts]:
        """The plain files of a model."""
        return self._storage.files(location)

    def read(self, location: str, name: str, offset: int, nbytes: int) -> bytes:
        """A small range of a file, not kept."""
        return self._storage.read(location, name, offset, nbytes)

    def open(self, location: str, name: str) -> ByteFile:
        """Open a file for reading tensor data."""
        size = self._storage.files(location)[name].size
        return _SharedFile(self, self._storage.open(location, name), location, name, size)

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
