"""Output files in a local folder: allocated whole, written at offsets, made durable in groups."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path

_CALL_LIMIT_BYTES = 1 << 30
_SYNC_FILE_RANGE_WRITE = 2
# the kernel is asked to store runs of about this many bytes: asking for every small tensor takes longer than writing it
_WRITEBACK_BYTES = 1 << 20
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class OutputFile:
    """A file of known size. `create` allocates it; without, an existing one is reopened."""

    def __init__(self, path: Path, nbytes: int, *, create: bool) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if create else 0)
        self._descriptor = os.open(path, flags, 0o644)
        # what was written last without a gap, and not yet asked for
        self._begin = self._end = 0
        try:
            if create:
                self._allocate(nbytes)
        except BaseException:
            self.close()
            raise

    def write(self, offset: int, data: memoryview) -> None:
        """Write at an offset and let the kernel begin storing it, at once or with what follows it."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done : done + _CALL_LIMIT_BYTES], offset + done)
        if offset != self._end:
            self._begin = offset
        self._end = offset + len(data)
        if self._end - self._begin >= _WRITEBACK_BYTES:
            _start_writeback(self._descriptor, self._begin, self._end - self._begin)
            self._begin = self._end

    def read(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from an offset; how many bytes there were."""
        return os.preadv(self._descriptor, [buffer], offset)

    def sync(self) -> None:
        """Return when everything written is on the device; its page cache is given back."""
        os.fdatasync(self._descriptor)
        # a hint only
        with suppress(OSError):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    @property
    def nbytes(self) -> int:
        """The file's size."""
        return os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Close the file; closing again does nothing."""
        # first taken out: after an error, too, the number belongs to whoever opens the next file
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _allocate(self, nbytes: int) -> None:
        try:
            os.posix_fallocate(self._descriptor, 0, nbytes)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                # what was allocated before the disk was full
                os.ftruncate(self._descriptor, 0)
                raise
            os.ftruncate(self._descriptor, nbytes)


def sync_folder(path: Path) -> None:
    """Make the folder's entries themselves durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """A small file, on the device when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest[:_CALL_LIMIT_BYTES]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_libc = ctypes.CDLL(None, use_errno=True)


def _start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    # without it dirty pages pile up until the sync, which then has all the work;
    # a hint only, so its result does not matter
    _libc.sync_file_range(
        descriptor, ctypes.c_int64(offset), ctypes.c_int64(nbytes), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE)
    )
