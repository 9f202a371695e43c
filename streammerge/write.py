"""Write tensors in place, keep a journal of what is durable, publish the folder by one rename.

While it is being written the model lies in `OUT.partial/`: shards named `….safetensors.partial` and
`journal.jsonl`. The journal's first line says what is being merged; each further line cites a tensor
whose bytes were on the device before the line was.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from streammerge.errors import OutputError, quoted
from streammerge.layout import INDEX_NAME, Layout
from streammerge.storage.output import OutputFile, sync_folder, write_durably
from streammerge.stream import Block, Outcome

FORMAT = 1
JOURNAL = "journal.jsonl"
CONFIG = "config.json"
# how much may be lost to a crash: tensors are made durable in groups of about this many bytes
GROUP_BYTES = 256 << 20
_CHECK_BYTES = 8 << 20


class Writer:
    """Writes blocks on a thread of its own. Use as a context manager; `publish` ends a whole merge.

    out          the folder to make; it must not exist or be empty
    fingerprint  what must be equal for a later run to resume this one
    resume       continue in `OUT.partial`, if there is one

    `outcomes` and `checksums` (SHA-256) grow as tensors become durable; after a resumption they begin
    with what the journal cites and a second look at the bytes confirms.
    Raises OutputError before anything is written when the output cannot be had.
    """

    def __init__(self, out: str, layout: Layout, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        self.out = Path(os.path.abspath(out))
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.checksums: dict[str, str] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.busy_seconds = 0.0
        self.written_bytes = 0
        self._layout = layout
        self._files: list[OutputFile] = []
        self._failure: BaseException | None = None
        self._queue: queue.SimpleQueue[Block | None] = queue.SimpleQueue()
        identity = json.loads(json.dumps({"format": FORMAT, **fingerprint}))
        with _os_errors(self.partial):
            _refuse_occupied(self.out)
            resuming = self._open_partial(resume)
            self._journal = _Journal(self.partial / JOURNAL)
            try:
                if resuming:
                    self._resume(identity)
                else:
                    self._begin(identity)
            except BaseException:
                self._close()
                if not resuming:
                    shutil.rmtree(self.partial, ignore_errors=True)
                raise
        self._thread = threading.Thread(target=self._run, name="streammerge-write", daemon=True)
        self._thread.start()

    def write(self, block: Block) -> None:
        """Hand a block over. Raises what writing an earlier one raised."""
        self._raise_failure()
        self._queue.put(block)

    def flush(self) -> None:
        """Return when everything handed over is durable and journaled. Ends the writing thread."""
        self._queue.put(None)
        self._thread.join()
        self._raise_failure()

    def publish(self, side_files: Mapping[str, bytes]) -> None:
        """Complete the folder with the files beside the weights and give it its name.

        Nothing incomplete is ever published: with a tensor missing this is an AssertionError.
        """
        missing = self._layout.placements.keys() - self.checksums.keys()
        assert not missing, f"{len(missing)} tensors were never written, such as {sorted(missing)[0]}"
        index = self._layout.index_json()
        small = dict(side_files) | ({} if index is None else {INDEX_NAME: index.encode()})
        # everything that a full disk could stop comes before the first rename, and what makes it a model comes last
        names = sorted([*small, *(shard.file for shard in self._layout.shards)], key=lambda name: name == CONFIG)
        with _os_errors(self.partial):
            for file in self._files:
                file.close()
            for name, data in small.items():
                write_durably(self.partial / _staged(name), data)
            for name in names:
                os.rename(self.partial / _staged(name), self.partial / name)
            sync_folder(self.partial)
            os.rename(self.partial, self.out)
            sync_folder(self.out.parent)
            # the model is complete with or without it: a crash here leaves one file too many
            (self.out / JOURNAL).unlink()
        self._journal.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with suppress(OutputError) if error else nullcontext():
                self.flush()
        finally:
            self._close()
            if not self.checksums:
                # nothing to resume: leave no trace
                shutil.rmtree(self.partial, ignore_errors=True)

    def _close(self) -> None:
        for file in self._files:
            with suppress(OSError):
                file.close()
        self._journal.close()

    def _open_partial(self, resume: bool) -> bool:
        """Whether there is an interrupted merge to continue; if there is none its folder is made."""
        if resume and self.partial.is_dir() and not os.listdir(self.partial):
            # stopped before it began
            return False
        if os.path.lexists(self.partial):
            if not resume:
                if (self.partial / JOURNAL).is_file():
                    # refuses when it is locked
                    _Journal(self.partial / JOURNAL).close()
                raise OutputError(
                    f"{quoted(self.partial)} holds an interrupted merge",
                    hint="Pass `--resume` to continue it, or delete that folder.",
                )
            if self.partial.is_symlink() or not (self.partial / JOURNAL).is_file():
                raise OutputError(
                    f"{quoted(self.partial)} has no journal, so it cannot be resumed",
                    hint="Delete that folder and merge again.",
                )
            return True
        self.partial.mkdir(parents=True)
        return False

    def _begin(self, identity: Mapping[str, Any]) -> None:
        self._open_shards(create=True)
        self._journal.append([identity])
        sync_folder(self.partial)
        sync_folder(self.partial.parent)

    def _open_shards(self, *, create: bool) -> None:
        for shard in self._layout.shards:
            file = OutputFile(self.partial / _staged(shard.file), shard.nbytes, create=create)
            self._files.append(file)
            file.write(0, memoryview(shard.header))
            file.sync()

    def _resume(self, identity: Mapping[str, Any]) -> None:
        lines = self._journal.read()
        if not lines:
            # stopped while the files were laid out: nothing in them is worth keeping
            for staged in self.partial.glob(_staged("*")):
                staged.unlink()
            self._begin(identity)
            return
        changes = _changes(lines[0], identity)
        if changes:
            raise OutputError(
                f"{quoted(self.partial)} was begun with other inputs:\n  " + "\n  ".join(changes[:20]),
                hint="Restore them to resume, or delete that folder and merge again.",
            )
        # stopped while it was published: first take back what makes it a model
        (self.partial / CONFIG).unlink(missing_ok=True)
        for shard in self._layout.shards:
            staged = self.partial / _staged(shard.file)
            if staged.exists():
                continue
            if not (self.partial / shard.file).exists():
                raise OutputError(f"{quoted(staged)} is gone", hint="Delete that folder and merge again.")
            os.rename(self.partial / shard.file, staged)
        self._open_shards(create=False)
        for line in lines[1:]:
            name = line["name"]
            if self._hash(name) == line["sha256"]:
                self.checksums[name] = line["sha256"]
                self.outcomes[name] = Outcome(**line["outcome"])

    def _hash(self, name: str) -> str:
        place = self._layout.placements[name]
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(_CHECK_BYTES, place.nbytes)))
        done = 0
        while done < place.nbytes:
            part = buffer[: place.nbytes - done]
            count = self._files[place.shard].read(place.offset + done, part)
            if count == 0:
                break
            digest.update(part[:count])
            done += count
        return digest.hexdigest()

    def _run(self) -> None:
        """The writing thread: on failure it keeps giving buffers back, so that nobody waits for one."""
        digests: dict[str, Any] = {}
        group: list[tuple[Outcome, str]] = []
        group_bytes = 0
        while (block := self._queue.get()) is not None:
            try:
                if self._failure is None:
                    started = time.perf_counter()
                    place = self._layout.placements[block.name]
                    digest = digests.setdefault(block.name, hashlib.sha256())
                    self._files[place.shard].write(place.offset + block.offset, block.data)
                    digest.update(block.data)
                    group_bytes += len(block.data)
                    self.written_bytes += len(block.data)
                    if block.outcome is not None:
                        group.append((block.outcome, digests.pop(block.name).hexdigest()))
                        if group_bytes >= GROUP_BYTES:
                            self._commit(group)
                            group_bytes = 0
                    self.busy_seconds += time.perf_counter() - started
            except BaseException as error:  # noqa: BLE001 - handed over to the thread that writes next
                self._failure = error
            finally:
                block.release()
        try:
            self._commit(group)
        except BaseException as error:  # noqa: BLE001 - as above
            self._failure = self._failure or error

    def _commit(self, group: list[tuple[Outcome, str]]) -> None:
        """Make the group's bytes durable, then cite them in the journal."""
        if not group:
            return
        # taken out first: a sync that succeeds after one that failed says nothing about what was lost
        finished = list(group)
        group.clear()
        for number in sorted({self._layout.placements[outcome.name].shard for outcome, _ in finished}):
            self._files[number].sync()
        self._journal.append([{"name": o.name, "sha256": checksum, "outcome": asdict(o)} for o, checksum in finished])
        for outcome, checksum in finished:
            self.checksums[outcome.name] = checksum
            self.outcomes[outcome.name] = outcome

    def _raise_failure(self) -> None:
        if isinstance(self._failure, OSError):
            raise _output_error(self._failure, self.partial) from self._failure
        if self._failure is not None:
            raise self._failure


class _Journal:
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
        self._file.close()


class _os_errors:
    """Turn what the operating system says of a folder into OutputError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            raise _output_error(error, self._path) from error


def _output_error(error: OSError, path: Path) -> OutputError:
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


def _refuse_occupied(out: Path) -> None:
    if out.is_symlink():
        raise OutputError(f"{quoted(out)} is a link", hint="Choose another name for the output folder.")
    if os.path.lexists(out) and not out.is_dir():
        raise OutputError(f"{quoted(out)} is a file", hint="Choose another name for the output folder.")
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{quoted(out)} is not empty", hint="Choose another folder, or delete this one first.")


def _staged(file: str) -> str:
    return file + ".partial"


def _changes(before: Any, now: Any, path: str = "") -> list[str]:
    """Every place where two JSON values differ, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            line
            for key in keys
            for line in _changes(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        ]
    if before == now:
        return []
    return [f"{quoted(path)} was {quoted(json.dumps(before))} and is {quoted(json.dumps(now))}"]
