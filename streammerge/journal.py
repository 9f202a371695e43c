"""Whether an output folder may be had, and the journal of what in it is durable. Loads no torch."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from streammerge.errors import OutputError, quoted

JOURNAL = "journal.jsonl"
_READ_BYTES = 64 << 20


class Journal:
    """Lines of JSON, durable when `append` returns; locked, so that two merges never share a folder.

    The lock is the kernel's and ends with the process that holds it, however that ends: none is ever stale.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, 0o644)
        self._torn_at: int | None = None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._descriptor), os.stat(path)):
                raise FileNotFoundError
        except (BlockingIOError, FileNotFoundError) as error:
            # also when its holder published or removed the folder between the opening and the lock
            self.close()
            raise OutputError(
                f"{quoted(path.parent)} is being written by another process",
                hint="Wait for it, or choose another folder.",
            ) from error
        except BaseException:
            self.close()
            raise

    def append(self, lines: list[Any]) -> None:
        """Write lines; they are on the device when this returns."""
        if self._torn_at is not None:
            os.ftruncate(self._descriptor, self._torn_at)
            self._torn_at = None
        rest = memoryview(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        # unbuffered: what a full disk refused must not be written later, when the file is closed
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        os.fsync(self._descriptor)

    def read(self) -> list[Any]:
        """All lines up to the first that a crash tore; the next `append` cuts that off with what follows it."""
        found, end = [], 0
        text = self._text()
        for line in text.splitlines(keepends=True):
            try:
                found.append(json.loads(line))
            except ValueError:
                break
            if not line.endswith(b"\n"):
                found.pop()
                break
            end += len(line)
        self._torn_at = end if end < len(text) else None
        return found

    def forget(self) -> None:
        """Keep the first line alone, which says what is being merged."""
        os.ftruncate(self._descriptor, self._text().find(b"\n") + 1)
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file and give up the lock; closing again does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)

    def _text(self) -> bytes:
        parts: list[bytes] = []
        while part := os.pread(self._descriptor, _READ_BYTES, sum(map(len, parts))):
            parts.append(part)
        return b"".join(parts)


class os_errors:
    """Turn what the operating system says of a folder into OutputError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            raise output_error(error, self._path) from error


def output_error(error: OSError, path: Path) -> OutputError:
    """What the operating system says of a folder, with what to do."""
    hints = {
        errno.ENOSPC: "The disk is full. Free some space, then pass `--resume`.",
        errno.EDQUOT: "The disk quota is used up. Free some space, then pass `--resume`.",
        errno.EACCES: "Choose a folder that you may write to.",
        errno.EPERM: "Choose a folder that you may write to.",
        errno.EROFS: "The file system is read-only. Choose another folder.",
        errno.ENOTDIR: "A part of the path is a file. Choose another folder.",
        errno.ENAMETOOLONG: "Choose a shorter name for the output folder.",
    }
    reason = (error.strerror or str(error)).lower()
    return OutputError(f"{quoted(path)} cannot be written: {reason}", hint=hints.get(error.errno or 0))


def refuse_occupied(out: Path) -> None:
    """Raise OutputError unless `out` does not exist or is an empty folder."""
    if out.is_symlink():
        raise OutputError(f"{quoted(out)} is a link", hint="Choose another name for the output folder.")
    if os.path.lexists(out) and not out.is_dir():
        raise OutputError(f"{quoted(out)} is a file", hint="Choose another name for the output folder.")
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{quoted(out)} is not empty", hint="Choose another folder, or delete this one first.")


def refuse_taken(out: str | Path, *, resume: bool) -> None:
    """Raise OutputError unless `out` may be written, or with `resume` be continued. Changes nothing."""
    folder = Path(os.path.abspath(out))
    partial = partial_folder(folder)
    with os_errors(partial):
        if is_untidied(folder):
            # refuses when it is locked
            Journal(folder / JOURNAL).close()
            if resume:
                return
            raise OutputError(
                f"{quoted(folder)} holds a merge that was stopped just after it was complete",
                hint="Pass `--resume` to check it and to remove its journal, or choose another folder.",
            )
        refuse_occupied(folder)
        if not os.path.lexists(partial):
            return
        if not resume:
            if (partial / JOURNAL).is_file():
                # refuses when it is locked
                Journal(partial / JOURNAL).close()
            raise OutputError(
                f"{quoted(partial)} holds an interrupted merge",
                hint="Pass `--resume` to continue it, or delete that folder.",
            )
        unused = partial.is_dir() and not os.listdir(partial)
        if not unused and (partial.is_symlink() or not (partial / JOURNAL).is_file()):
            raise OutputError(
                f"{quoted(partial)} has no journal, so it cannot be resumed",
                hint="Delete that folder and merge again.",
            )


def is_untidied(out: Path) -> bool:
    """Whether a merge was stopped between giving `out` its name and removing the journal from it."""
    return not (os.path.islink(out) or os.path.lexists(partial_folder(out)) or not os.path.isfile(out / JOURNAL))


def partial_folder(out: Path) -> Path:
    """Where a model lies until it is complete."""
    return out.with_name(out.name + ".partial")
