"""Whether an output folder may be had, and the journal of what in it is durable. Loads no torch."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from streammerge.errors import OutputError, quoted

JOURNAL = "journal.jsonl"


class Journal:
    """Lines of JSON, durable when `append` returns; locked, so that two merges never share a folder."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise OutputError(
                f"{quoted(path.parent)} is being written by another process",
                hint="Wait for it, or choose another folder.",
            ) from error

    def append(self, lines: list[Any]) -> None:
        """Write lines; they are on the device when this returns."""
        self._file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def read(self) -> list[Any]:
        """All lines up to the first that a crash tore, which is cut off with what follows it."""
        self._file.seek(0)
        found, end = [], 0
        for line in self._file.read().splitlines(keepends=True):
            try:
                found.append(json.loads(line))
            except ValueError:
                break
            if not line.endswith(b"\n"):
                found.pop()
                break
            end += len(line)
        self._file.truncate(end)
        return found

    def close(self) -> None:
        """Close the file and give up the lock."""
        self._file.close()


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


def partial_folder(out: Path) -> Path:
    """Where a model lies until it is complete."""
    return out.with_name(out.name + ".partial")
