"""Models in local folders: positioned reads into reused buffers, or memory mapping."""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from streammerge.checkpoint import ByteFile, FileFacts
from streammerge.errors import CheckpointError, quoted
from streammerge.pickled import PICKLED_ENDINGS

# one system call moves at most 0x7ffff000 bytes on Linux
_CALL_LIMIT_BYTES = 1 << 30
_PAGE = mmap.PAGESIZE
# the largest piece of page cache that the kernel keeps or drops as one
_FOLIO_BYTES = 2 << 20
_BLOCK_BYTES = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


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
                hint="Name a model folder. A model on the hub is named `ORG/NAME`.",
            ) from error
        except NotADirectoryError as error:
            raise CheckpointError(
                f"{quoted(location)} is a file, not a folder",
                hint="Name the folder that holds the model's files.",
            ) from error
        except (OSError, ValueError) as error:
            raise _unreadable(location, error) from error
        return {name: FileFacts(s.st_size, s.st_mtime_ns) for name, s in sorted(facts.items())}

    def read(self, location: str, name: str, offset: int, nbytes: int) -> bytes:
        """A small range of a file. Only weights may be links to anywhere: other files are copied into the output."""
        path = self._path(location, name)
        if not name.endswith((".safetensors", *PICKLED_ENDINGS)):
            _refuse_leaving(path)
        descriptor = _open(path)
        parts: list[bytes] = []
        done = 0
        try:
            with _os_errors(path):
                while part := os.pread(descriptor, min(nbytes - done, _CALL_LIMIT_BYTES), offset + done):
                    parts.append(part)
                    done += len(part)
        finally:
            _close(descriptor)
        return b"".join(parts)

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
        self._descriptor = _open(path)
        self._page_cache = _page_cache(path, self._descriptor)

    def fetch(self, offset: int, nbytes: int, buffer: memoryview) -> memoryview:
        """Read the range into `buffer`. Raises CheckpointError when the file ends early."""
        whole = buffer[:nbytes]
        rest = whole
        # a context would take as long as the call that reads a small tensor
        try:
            while rest:
                count = os.preadv(self._descriptor, [rest[:_CALL_LIMIT_BYTES]], offset + nbytes - len(rest))
                if count == 0:
                    raise _cut_short(self._path, self._descriptor)
                rest = rest[count:]
        except OSError as error:
            raise _unreadable(self._path, error) from error
        return whole

    def release(self, offset: int, nbytes: int) -> None:
        """Drop the range from the page cache, unless it was there before this merge read it."""
        self._page_cache.drop(offset, nbytes)

    def close(self) -> None:
        """Close the file."""
        _close(self._descriptor)


class MappedFile:
    """Maps the file; pages a range brought in are given back when it is released."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = _open(path)
        self._page_cache = _page_cache(path, self._descriptor)
        try:
            # a private writable mapping: torch wraps it without a warning, nothing writes to it
            self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            # a file system without mapping, or an empty file
            _close(self._descriptor)
            raise _unreadable(path, error) from error

    def fetch(self, offset: int, nbytes: int, buffer: memoryview) -> memoryview:
        """A view of the mapped range; `buffer` stays unused. Pages are asked for ahead of their use."""
        if not nbytes:
            return buffer[:0]
        with _os_errors(self._path):
            # touching a page beyond the file's end would kill the process
            if offset + nbytes > min(len(self._map), os.fstat(self._descriptor).st_size):
                raise _cut_short(self._path, self._descriptor)
            start, length = _page_range(offset, nbytes)
            self._map.madvise(mmap.MADV_WILLNEED, start, length)
        return memoryview(self._map)[offset : offset + nbytes]

    def release(self, offset: int, nbytes: int) -> None:
        """Give the range's pages back, and the page cache that was not there before."""
        if nbytes:
            self._map.madvise(mmap.MADV_DONTNEED, *_page_range(offset, nbytes))
            self._page_cache.drop(offset, nbytes)

    def close(self) -> None:
        """Unmap, unless views are still out; then the last of them does."""
        _close(self._descriptor)
        try:
            self._map.close()
        except BufferError:
            del self._map


class _PageCache:
    """Leaves a file's page cache as it was when the file was opened, to the MiB."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        # at once: later the kernel's own read-ahead, 8 MiB on some disks, makes every next range look cached
        self._found_cached = _cached_blocks(descriptor)

    def drop(self, offset: int, nbytes: int) -> None:
        """Give back what reading the range brought in."""
        if not nbytes or self._was_cached(offset + nbytes // 2):
            return
        # the kernel skips a large folio that the range cuts, so each drop takes along the end of the one before
        start = max(offset - _FOLIO_BYTES, 0)
        if any(self._found_cached[start // _BLOCK_BYTES : -(-offset // _BLOCK_BYTES)]):
            start = offset
        # a hint only
        with suppress(OSError):
            os.posix_fadvise(self._descriptor, start, offset + nbytes - start, os.POSIX_FADV_DONTNEED)

    def _was_cached(self, position: int) -> bool:
        block = max(position, 0) // _BLOCK_BYTES
        return block < len(self._found_cached) and self._found_cached[block]


def _cached_blocks(descriptor: int) -> list[bool]:
    """Which blocks of a file the page cache holds, by the last page of each.

    None of them, where the kernel does not tell: it does of files that one owns or may write.
    """
    facts = os.fstat(descriptor)
    if os.geteuid() not in (0, facts.st_uid) and not os.access(f"/proc/self/fd/{descriptor}", os.W_OK):
        return []
    try:
        whole = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):
        # nothing in it, or a file system without mapping
        return []
    with whole:
        first_byte = ctypes.c_char.from_buffer(whole)
        start = ctypes.addressof(first_byte)
        del first_byte
        found = ctypes.c_ubyte()

        def is_cached(position: int) -> bool:
            page = ctypes.c_void_p(start + position // _PAGE * _PAGE)
            return _libc.mincore(page, ctypes.c_size_t(1), ctypes.byref(found)) == 0 and found.value & 1 == 1

        ends = (min(block + _BLOCK_BYTES, len(whole)) for block in range(0, len(whole), _BLOCK_BYTES))
        return [is_cached(end - 1) for end in ends]


def _refuse_leaving(path: Path) -> None:
    """Raise CheckpointError unless a file lies, links followed, in its folder or in the hub cache around it."""
    target, folder = (Path(os.path.realpath(each)) for each in (path, path.parent))
    homes = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    if not any(target.is_relative_to(home) for home in homes):
        raise CheckpointError(
            f"{quoted(path)} is a link to {quoted(target)}, outside of the model's folder",
            hint="Put a copy of the file there, if it is meant to be part of the model.",
        )


def _open(path: Path) -> int:
    with _os_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CheckpointError(f"{quoted(path)} is not a plain file")
        except BaseException:
            _close(descriptor)
            raise
    return descriptor


def _close(descriptor: int) -> None:
    # of a file that was only read, an error says nothing
    with suppress(OSError):
        os.close(descriptor)


def _page_cache(path: Path, descriptor: int) -> _PageCache:
    try:
        with _os_errors(path):
            return _PageCache(descriptor)
    except BaseException:
        _close(descriptor)
        raise


def _page_range(offset: int, nbytes: int) -> tuple[int, int]:
    start = offset // _PAGE * _PAGE
    return start, offset + nbytes - start


def _cut_short(path: Path, descriptor: int) -> CheckpointError:
    return CheckpointError(
        f"{quoted(path)} ends at byte {os.fstat(descriptor).st_size}, inside a tensor",
        hint="The file was cut short during the merge. Fetch it again.",
    )


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: OSError | ValueError) -> CheckpointError:
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    return CheckpointError(
        f"{quoted(path)} cannot be read: {reason.lower()}", hint="Check that it is there and that you may read it."
    )
