"""Write tensors in place, keep a journal of what is durable, publish the folder by one rename.

While it is being written the model lies in `OUT.partial/`: shards named `….safetensors.partial` and
`journal.jsonl`. The journal's first line says what is being merged; each further line cites a tensor
whose bytes were on the device before the line was.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from streammerge.entries import Entry
from streammerge.errors import OutputError, listed, quoted
from streammerge.journal import (
    JOURNAL,
    Journal,
    is_untidied,
    os_errors,
    output_error,
    partial_folder,
    refuse_taken,
)
from streammerge.layout import INDEX_NAME, Layout
from streammerge.outcome import Block, Outcome
from streammerge.share_journals import adopt, forget_shares
from streammerge.storage.output import OutputFile, sync_folder, write_durably

# of the journal; raise it when what a line says, or what a merge is identified by, changes
FORMAT = 3
CONFIG = "config.json"
# how much may be lost to a crash: tensors are made durable in groups of about this many bytes
GROUP_BYTES = 256 << 20
_CHECK_BYTES = 8 << 20
# of fewer, handing them to another thread takes longer than their checksum
_HASHED_BESIDE_BYTES = 256 << 10


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
        self.partial = partial_folder(self.out)
        self.checksums: dict[str, str] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.busy_seconds = 0.0
        self.written_bytes = 0
        self._layout = layout
        self._files: list[OutputFile] = []
        self._above = [self.partial.parent]
        self._failure: BaseException | None = None
        self._queue: queue.SimpleQueue[Block | None] = queue.SimpleQueue()
        self._hasher = ThreadPoolExecutor(1, "streammerge-hash")
        self._open(json.loads(json.dumps({"format": FORMAT, **fingerprint})), resume=resume)
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

        Raises OutputError when a tensor is missing: nothing incomplete is ever published.
        """
        self.refuse_missing()
        index = self._layout.index_json()
        small = dict(side_files) | ({} if index is None else {INDEX_NAME: index.encode()})
        # everything that a full disk could stop comes before the first rename, and what makes it a model comes last
        names = [name for name in (*small, *(shard.file for shard in self._layout.shards)) if name != CONFIG]
        with os_errors(self.partial):
            for file in self._files:
                file.close()
            for name, data in small.items():
                write_durably(self.partial / staged_name(name), data)
            for name in names:
                os.rename(self.partial / staged_name(name), self.partial / name)
            if CONFIG in small:
                # a power cut may keep a later rename and lose an earlier one
                sync_folder(self.partial)
                os.rename(self.partial / staged_name(CONFIG), self.partial / CONFIG)
            sync_folder(self.partial)
            os.rename(self.partial, self.out)
            sync_folder(self.out.parent)
            # the model is complete with or without it: a crash here leaves one file too many, see `_open_journal`
            (self.out / JOURNAL).unlink()
        self._journal.close()

    def refuse_missing(self) -> None:
        """Raise OutputError unless every tensor was written."""
        missing = self._layout.placements.keys() - self.checksums.keys()
        if missing:
            raise OutputError(f"{len(missing)} tensors were never written, such as {quoted(min(missing))}")

    def distrust(self) -> None:
        """Forget what was merged, keep the folder: a later run with `resume` merges every tensor again."""
        with os_errors(self.partial):
            self._journal.forget()

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
                self._leave_no_trace()

    def _leave_no_trace(self) -> None:
        """There is nothing to resume."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _close(self) -> None:
        for file in self._files:
            with suppress(OSError):
                file.close()
        self._journal.close()

    def _open(self, identity: Mapping[str, Any], *, resume: bool) -> None:
        """Lock the folder and open its files, with what an earlier run left there or from nothing."""
        refuse_taken(self.out, resume=resume)
        with os_errors(self.partial):
            resuming = self._open_partial()
            self._journal = self._open_journal(identity)
            try:
                if resuming:
                    self._resume(identity)
                else:
                    self._begin(identity)
            except BaseException:
                if not resuming:
                    shutil.rmtree(self.partial, ignore_errors=True)
                self._close()
                raise

    def _open_partial(self) -> bool:
        """Whether there is an interrupted merge to continue; if there is none its folder is made."""
        if is_untidied(self.out) or (os.path.lexists(self.partial) and os.listdir(self.partial)):
            return True
        # parents that are made have names to be made durable, too
        while not self._above[-1].exists():
            self._above.append(self._above[-1].parent)
        self.partial.mkdir(parents=True, exist_ok=True)
        return False

    def _open_journal(self, identity: Mapping[str, Any]) -> Journal:
        """The locked journal. A merge stopped just before it removed its own gets back its unfinished name."""
        if not is_untidied(self.out):
            try:
                return Journal(self.partial / JOURNAL)
            except BaseException:
                # unless it is another's
                with suppress(OSError):
                    self.partial.rmdir()
                raise
        journal = Journal(self.out / JOURNAL)
        try:
            # all of it, before anything is renamed: what is complete stays so whatever the journal says
            self._refuse_changes(journal.begun() or {}, identity, self.out)
            journal.entries(self._layout.placements)
            os.rename(self.out, self.partial)
            # before anything in it changes: a power cut must not leave half of it under the old name
            sync_folder(self.out.parent)
        except BaseException:
            journal.close()
            raise
        return journal

    def _begin(self, identity: Mapping[str, Any]) -> None:
        # files without a journal could not be told from someone's own
        sync_folder(self.partial)
        self._open_shards(create=True)
        # a journal that says what is merged says that the files are there
        sync_folder(self.partial)
        self._journal.append([identity])
        for folder in self._above:
            sync_folder(folder)

    def _open_shards(self, *, create: bool) -> None:
        for shard in self._layout.shards:
            file = OutputFile(self.partial / staged_name(shard.file), shard.nbytes, create=create)
            self._files.append(file)
            file.write(0, memoryview(shard.header))
            file.sync()

    def _resume(self, identity: Mapping[str, Any]) -> None:
        begun = self._journal.begun()
        if begun is None:
            # stopped while the files were laid out: nothing in them is worth keeping
            for staged in self.partial.glob(staged_name("*")):
                staged.unlink()
            forget_shares(self.partial)
            self._begin(identity)
            return
        self._refuse_changes(begun, identity, self.partial)
        entries = self._journal.entries(self._layout.placements)
        entries |= self._adopt(identity)
        if os.path.lexists(self.partial / CONFIG):
            # stopped while it was published: first take back what makes it a model
            (self.partial / CONFIG).unlink()
            sync_folder(self.partial)
        for shard in self._layout.shards:
            staged = self.partial / staged_name(shard.file)
            if staged.exists():
                continue
            if not (self.partial / shard.file).exists():
                raise OutputError(f"{quoted(staged)} is gone", hint="Delete that folder and merge again.")
            os.rename(self.partial / shard.file, staged)
        self._open_shards(create=False)
        self._trust(entries)

    def _adopt(self, identity: Mapping[str, Any]) -> dict[str, Entry]:
        """Take over what processes that merged together left: see `streammerge.ranks`."""

        def refuse(begun: Mapping[str, Any]) -> None:
            self._refuse_changes(begun, identity, self.partial)

        return adopt(self.partial, self._journal, self._layout.placements, refuse)

    def _trust(self, entries: Mapping[str, Entry]) -> None:
        """Count what journals cite as merged, where its bytes are those that were cited."""
        for name, entry in entries.items():
            if self._hash(name) == entry.sha256:
                self.checksums[name] = entry.sha256
                self.outcomes[name] = Outcome(**entry.outcome)

    def _refuse_changes(self, begun: Mapping[str, Any], identity: Mapping[str, Any], folder: Path) -> None:
        if begun.get("format") != FORMAT:
            found = json.dumps(begun.get("format"))
            raise OutputError(
                f"{quoted(folder / JOURNAL)} has the format {quoted(found)}, expected {quoted(FORMAT)}",
                hint="Finish it with the version of streammerge that began it, or delete that folder and merge again.",
            )
        changes = changed_values(begun, identity, "{} was {} and is {}")
        if changes:
            raise OutputError(
                f"{quoted(folder)} was begun with other inputs:{listed(changes)}",
                hint="Restore them to resume, or delete that folder and merge again.",
            )

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
                    with self._hashed(digest, block.data):
                        self._files[place.shard].write(place.offset + block.offset, block.data)
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
        self._hasher.shutdown()

    @contextmanager
    def _hashed(self, digest: Any, data: memoryview) -> Iterator[None]:
        """Take the data into a checksum beside what is done within; on leaving, however, both are done."""
        if len(data) < _HASHED_BESIDE_BYTES:
            digest.update(data)
            yield
            return
        hashed = self._hasher.submit(digest.update, data)
        try:
            yield
        finally:
            hashed.result()

    def _commit(self, group: list[tuple[Outcome, str]]) -> None:
        """Make the group's bytes durable, then cite them in the journal."""
        if not group:
            return
        # taken out first: a sync that succeeds after one that failed says nothing about what was lost
        finished = list(group)
        group.clear()
        for number in sorted({self._layout.placements[outcome.name].shard for outcome, _ in finished}):
            self._files[number].sync()
        self._journal.append([{"name": o.name, "sha256": checksum, "outcome": o.to_dict()} for o, checksum in finished])
        for outcome, checksum in finished:
            self.checksums[outcome.name] = checksum
            self.outcomes[outcome.name] = outcome

    def _raise_failure(self) -> None:
        if isinstance(self._failure, OSError):
            raise output_error(self._failure, self.partial) from self._failure
        if self._failure is not None:
            raise self._failure


def staged_name(file: str) -> str:
    """What a file is called until the folder is complete."""
    return file + ".partial"


def changed_values(before: Any, now: Any, words: str, path: str = "") -> list[str]:
    """Every place where two JSON values differ: `words` with where that is and both values put in."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            line
            for key in keys
            for line in changed_values(before.get(key), now.get(key), words, f"{path}.{key}" if path else str(key))
        ]
    if before == now:
        return []
    return [words.format(quoted(path), quoted(json.dumps(before)), quoted(json.dumps(now)))]
