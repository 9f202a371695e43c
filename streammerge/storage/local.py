"""Models in local folders: positioned reads into reused buffers, or memory mapping."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

from streammerge.checkpoint import ByteFile, FileFacts
from streammerge.errors import CheckpointError, quoted

# one system call moves at most 0x7ffff000 bytes on Linux
_CALL_LIMIT_BYTES = 1 << 30
_PAGE = mmap.PAGESIZE


class LocalStorage:
    """Folders on this machine. `mapped` chooses memory mapping over positioned reads.

    Positioned reads are the default: measured in bench/results/readers.jsonl.
    """

    def __init__(self, *, mapped: bool = False) -> None:
        self.mapped = mapped

    def files(self, location: str) -> dict[str, FileFacts]:
        """The plain files of a folder, and links to plain files (a hub cache is made of them)."""
        try:
            with os.scandir(location) as entries:
                facts = {entry.name: entry.stat() for entry in entries if entry.is_file()}
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{quoted(location)} does not exist",
                hint="Name a model folder. To fetch one from the hub: `hf download ID --local-dir DIR`.",
            ) from error
        except NotADirectoryError as error:
            raise CheckpointError(
                f"{quoted(location)} is a file, not a folder",
                hint="Name the folder that holds the model's files.",
            ) from error
        except OSError as error:
            raise CheckpointError(f"{quoted(location)} cannot be read: {error.strerror}") from error
        return {name: FileFacts(s.st_size, s.st_mtime_ns) for name, s in sorted(facts.items())}

    def read(self, location: str, name: str, offset: int, nbytes: int) -> bytes:
        """A small range of a file."""
        with self._path(location, name).open("rb") as file:
            file.seek(offset)
            return file.read(nbytes)

    def open(self, location: str, name: str) -> ByteFile:
        """Open a file for reading tensor data."""
        path = self._path(location, name)
        return MappedFile(path) if self.mapped else PositionedFile(path)

    def _path(self, location: str, name: str) -> Path:
        return Path(location) / name


class PositionedFile:
    """Reads into the caller's buffer with `preadv`; drops from the page cache what it brought in."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            os.close(self._descriptor)
            raise CheckpointError(f"{quoted(path)} is not a plain file")
        self._found_cached: dict[int, bool] = {}
        self._probe = bytearray(1)

    def fetch(self, offset: int, nbytes: int, buffer: memoryview) -> memoryview:
        """Read the range into `buffer`. Raises CheckpointError when the file ends early."""
        if nbytes and offset not in self._found_cached:
            # only the first read can tell: a second pass finds what the first brought in
            self._found_cached[offset] = self._is_cached(offset + nbytes - 1)
        done = 0
        while done < nbytes:
            step = min(nbytes - done, _CALL_LIMIT_BYTES)
            count = os.preadv(self._descriptor, [buffer[done : done + step]], offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{quoted(self._path)} ends at byte {offset + done}, inside a tensor",
                    hint="The file was cut short during the merge. Fetch it again.",
                )
            done += count
        return buffer[:nbytes]

    def release(self, offset: int, nbytes: int) -> None:
        """Drop the range from the page cache, unless it was there before this merge read it."""
        if nbytes and not self._found_cached.get(offset, False):
            os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _is_cached(self, position: int) -> bool:
        # the last byte of a range lies beyond the kernel's own read-ahead of the range before it
        try:
            return os.preadv(self._descriptor, [self._probe], position, os.RWF_NOWAIT) == 1
        except OSError:
            # would have to wait (not cached), or this file system cannot tell
            return False


class MappedFile:
    """Maps the file; pages a range brought in are given back when it is released."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            # a private writable mapping: torch wraps it without a warning, nothing writes to it
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def fetch(self, offset: int, nbytes: int, buffer: memoryview) -> memoryview:
        """A view of the mapped range; `buffer` stays unused. Pages are asked for ahead of their use."""
        if offset + nbytes > self._size:
            raise CheckpointError(f"{quoted(self._path)} ends at byte {self._size}, inside a tensor")
        start, length = _page_range(offset, nbytes)
        self._map.madvise(mmap.MADV_WILLNEED, start, length)
        return memoryview(self._map)[offset : offset + nbytes]

    def release(self, offset: int, nbytes: int) -> None:
        """Give the range's pages back."""
        start, length = _page_range(offset, nbytes)
        if length:
            self._map.madvise(mmap.MADV_DONTNEED, start, length)

    def close(self) -> None:
        """Unmap, unless views are still out; then the last of them does."""
        try:
            self._map.close()
        except BufferError:
            del self._map


def _page_range(offset: int, nbytes: int) -> tuple[int, int]:
    start = offset // _PAGE * _PAGE
    return start, offset + nbytes - start
