"""Whether an output folder may be had, and the journal of what in it is durable. Loads no torch."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Container, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from streammerge import devices
from streammerge.checkpoint import parse_json
from streammerge.entries import Entry, entry_of
from streammerge.errors import CheckpointError, OutputError, quoted
from streammerge.plan import Plan, check_disk

JOURNAL = "journal.jsonl"
# a recipe has at most 1 MiB, and a name of such a length is no model's
MOST_LINE_BYTES = 16 << 20
_READ_BYTES = 64 << 10
_PARTIAL = ".partial"


class Journal:
    """Lines of JSON, durable when `append` returns; locked, so that two merges never share a folder.

    hint    what to do about a line that no crash leaves; by default what helps with a merge's journal
    locked  False to read what another process holds; then nothing can be appended

    The lock is the kernel's and ends with the process that holds it, however that ends: none is ever stale.
    """

    def __init__(self, path: Path, *, hint: str | None = None, locked: bool = True) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT if locked else os.O_RDONLY
        self._descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        self._path, self._given_hint = path, hint
        self._torn_at: int | None = None
        if not locked:
            return
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
            # a power cut must not keep what is appended and, around it, what was cut off
            os.fsync(self._descriptor)
            self._torn_at = None
        rest = memoryview(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        # unbuffered: what a full disk refused must not be written later, when the file is closed
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        os.fsync(self._descriptor)

    def begun(self) -> dict[str, Any] | None:
        """The first line, which says what is being merged; None where a crash left nothing of it."""
        for value in self.values():
            if not isinstance(value, dict):
                raise self._damaged(1, f"is {quoted(json.dumps(value))}, expected what is being merged")
            return value
        return None

    def entries(self, names: Container[str]) -> dict[str, Entry]:
        """What the further lines say, up to the first that a crash tore: of each tensor the last.

        The next `append` cuts off what was torn. Raises OutputError for what no crash leaves, such as a tensor
        that is not among `names`, in memory that does not grow with the journal.
        """
        found: dict[str, Entry] = {}
        for number, value in enumerate(self.values(), 1):
            if number == 1:
                continue
            try:
                entry = entry_of(value)
            except ValueError as error:
                raise self._damaged(number, str(error)) from error
            if entry.name not in names:
                raise self._damaged(number, f"is about {quoted(entry.name)}, which is no tensor of this merge")
            found[entry.name] = entry
        return found

    def forget(self) -> None:
        """Keep the first line alone."""
        first = next(self._lines(), b"")
        os.ftruncate(self._descriptor, len(first) if first.endswith(b"\n") else 0)
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file and give up the lock; closing again does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)

    def values(self) -> Iterator[Any]:
        """The JSON of each line up to the first that a crash tore. Raises OutputError for what no crash leaves."""
        end = 0
        for number, line in enumerate(self._lines(), 1):
            # what did not reach the disk of an append is missing at its end, or reads as zeros, which no JSON holds
            if not line.endswith(b"\n") or b"\0" in line:
                self._torn_at = end
                return
            try:
                yield parse_json(line, self._label(number))
            except CheckpointError as error:
                raise OutputError(error.message, hint=self._hint) from error
            end += len(line)
        self._torn_at = None

    def _lines(self) -> Iterator[bytes]:
        """Each line with its end; the last may have none."""
        rest, position, number = bytearray(), 0, 1
        while part := os.pread(self._descriptor, _READ_BYTES, position):
            position += len(part)
            first, *others = part.split(b"\n")
            rest += first
            for other in others:
                yield bytes(rest) + b"\n"
                rest = bytearray(other)
                number += 1
            if len(rest) > MOST_LINE_BYTES:
                raise self._damaged(number, f"has more than {MOST_LINE_BYTES} bytes")
        if rest:
            yield bytes(rest)

    def _label(self, number: int) -> str:
        return f"line {number} of {quoted(self._path)}"

    def _damaged(self, number: int, reason: str) -> OutputError:
        return OutputError(f"{self._label(number)} {reason}", hint=self._hint)

    @property
    def _hint(self) -> str:
        if self._given_hint is not None:
            return self._given_hint
        if self._path.parent.name.endswith(_PARTIAL):
            return f"No crash leaves that. Delete {quoted(self._path.parent)} and merge again."
        return f"No crash leaves that. If the folder is a merged model, delete {quoted(JOURNAL)} and verify the folder."


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


def refuse_unready(planned: Plan, out: str, *, resume: bool) -> None:
    """Raise where no merge into `out` can begin: the folder is taken, the disk full, the device away."""
    refuse_taken(out, resume=resume)
    folder = Path(os.path.abspath(out))
    if not (resume and (os.path.lexists(partial_folder(folder)) or is_untidied(folder))):
        check_disk(planned, out)
    devices.refuse_absent(planned.device)


def is_untidied(out: Path) -> bool:
    """Whether a merge was stopped between giving `out` its name and removing the journal from it."""
    return not (os.path.islink(out) or os.path.lexists(partial_folder(out)) or not os.path.isfile(out / JOURNAL))


def partial_folder(out: Path) -> Path:
    """Where a model lies until it is complete."""
    return out.with_name(out.name + _PARTIAL)
