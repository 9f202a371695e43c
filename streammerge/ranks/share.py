"""What one of several processes writes: its share of the tensors, into the same files as the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

from streammerge.checkpoint import Storage
from streammerge.entries import Entry
from streammerge.errors import OutputError, quoted
from streammerge.journal import Journal, os_errors
from streammerge.layout import Layout
from streammerge.merging import Merging
from streammerge.outcome import Outcome
from streammerge.plan import Plan
from streammerge.report import Report
from streammerge.share_journals import share_journal
from streammerge.storage.output import OutputFile, sync_folder
from streammerge.write import Writer, staged_name

# what a file system may keep as one piece: a page, or several
_PIECE_BYTES = 64 << 10


class Ground(Writer):
    """The output as the first process lays it out for all: locked and allocated, and in the end published.

    `cited` is what earlier runs finished, by what their journals say: each process compares its own share's bytes.
    """

    cited: dict[str, Entry]

    def _open(self, identity: Mapping[str, Any], *, resume: bool) -> None:
        self.cited, self._all_left = {}, False
        super()._open(identity, resume=resume)

    def _trust(self, entries: Mapping[str, Entry]) -> None:
        self.cited = dict(entries)

    def _leave_no_trace(self) -> None:
        # what others may still write to stays for whoever resumes
        if self._all_left and not self.cited:
            super()._leave_no_trace()

    def gather(self) -> None:
        """Take over what all journals cite, once all other processes have ended."""
        self._all_left = True
        with os_errors(self.partial):
            self.cited |= self._adopt(self._identity())

    def settle(self, owners: Sequence[frozenset[str]]) -> None:
        """Take over what all processes of a merge that succeeded cite: by then it is everything.

        owners  the tensors of each

        Raises OutputError where a tensor is missing, or where two processes' neighbouring bytes disturbed each other.
        """
        with os_errors(self.partial):
            entries = self._adopt(self._identity())
            self.cited |= entries
            for file in self._files:
                file.close()
            self._files.clear()
            # opened anew: a network file system shows then what others wrote
            self._open_shards(create=False)
            disturbed = [
                name
                for name in neighbours(self._layout, owners)
                if name in entries and self._hash(name) != entries[name].sha256
            ]
        if disturbed:
            raise OutputError(
                f"{quoted(disturbed[0])} was written beside another process's tensor, and its bytes are others now"
                + (f", as are those of {len(disturbed) - 1} more" if len(disturbed) > 1 else ""),
                hint="The file system does not keep what several hosts write into one file. Nothing was published; "
                "pass `--resume` with one process, which merges these again.",
            )
        self.checksums |= {name: entry.sha256 for name, entry in entries.items()}
        self.outcomes |= {name: Outcome(**entry.outcome) for name, entry in entries.items()}
        self.refuse_missing()

    def _identity(self) -> Mapping[str, Any]:
        return self._journal.begun() or {}


class ShareWriter(Writer):
    """Writes one process's tensors into files that the first process laid out, with a journal of its own.

    cited  what earlier runs finished of them: what still has the bytes that were cited counts as merged
    """

    def __init__(
        self, out: str, layout: Layout, fingerprint: Mapping[str, Any], *, rank: int, cited: Mapping[str, Entry]
    ) -> None:
        self._rank, self._cited = rank, cited
        super().__init__(out, layout, fingerprint, resume=True)

    def _open(self, identity: Mapping[str, Any], *, resume: bool) -> None:
        with os_errors(self.partial):
            self._journal = Journal(self.partial / share_journal(self._rank))
            try:
                for shard in self._layout.shards:
                    self._files.append(OutputFile(self.partial / staged_name(shard.file), shard.nbytes, create=False))
                self._journal.append([identity])
                sync_folder(self.partial)
            except BaseException:
                self._close()
                raise

    def check(self) -> None:
        """Compare the bytes of what earlier runs finished, before anything is written; cite what is as it was."""
        with os_errors(self.partial):
            self._trust(self._cited)
            if self.checksums:
                self._journal.append([asdict(self._cited[name]) for name in self.checksums])

    def _leave_no_trace(self) -> None:
        # the folder is the first process's
        pass


class ShareMerging(Merging):
    """A merge of which this process carries out a share, once `take` has said which."""

    def __init__(
        self, planned: Plan, out: str, storage: Storage, *, progress: Callable[[int, int], None] | None = None
    ) -> None:
        super().__init__(planned, out, storage, resume=True, progress=progress)
        self._rank = 0
        self._names: frozenset[str] = frozenset()
        self._cited: Mapping[str, Entry] = {}

    def take(self, rank: int, names: frozenset[str], cited: Mapping[str, Entry]) -> None:
        """Merge these tensors; `cited` is what earlier runs finished of all."""
        # what went by until all were there is nobody's work
        self._started = time.perf_counter()
        self._rank, self._names = rank, names
        self._cited = {name: entry for name, entry in cited.items() if name in names}

    def _open_writer(self) -> Writer:
        layout, rank = self._planned.layout, self._rank
        writer = ShareWriter(self._out, layout, self.identity, rank=rank, cited=self._cited)
        try:
            writer.check()
        except BaseException as error:
            writer.__exit__(type(error), error, error.__traceback__)
            raise
        return writer

    def _left_out(self) -> set[str]:
        finished = set(self._writer.checksums)
        self._finished_before = len(finished)
        return finished | (self._planned.layout.placements.keys() - self._names)

    def finish(self) -> Report:
        """Make all that was merged durable; what this process did."""
        self.flush()
        self._reading.close()
        names = (name for step in self._planned.steps for name, _, _ in step.outputs if name in self._names)
        return replace(
            self._report(names),
            resumed_tensors=self._finished_before,
            written_bytes=sum(self._planned.layout.placements[name].nbytes for name in self._names),
        )

    @property
    def side_files(self) -> Mapping[str, bytes]:
        """What is published beside the weights."""
        return self._beside


def neighbours(layout: Layout, owners: Sequence[frozenset[str]]) -> list[str]:
    """Tensors that share a piece of a file with another process's tensor."""
    owner = {name: number for number, names in enumerate(owners) for name in names}
    places = sorted(layout.placements.items(), key=lambda item: (item[1].shard, item[1].offset))
    found: dict[str, None] = {}
    for (one, place), (other, after) in pairwise((name, place) for name, place in places if place.nbytes):
        last = (place.offset + place.nbytes - 1) // _PIECE_BYTES
        if place.shard == after.shard and owner[one] != owner[other] and after.offset // _PIECE_BYTES == last:
            found |= {one: None, other: None}
    return list(found)
