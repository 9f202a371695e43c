"""Carry out a plan in several processes: what each does, from meeting the others to the published folder."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from streammerge.checkpoint import Storage
from streammerge.entries import Entry
from streammerge.errors import OutputError
from streammerge.folder import REPORT_NAME
from streammerge.journal import JOURNAL, Journal, os_errors, partial_folder
from streammerge.merging import refuse_changed, versions
from streammerge.plan import Plan
from streammerge.ranks.meeting import Meeting
from streammerge.ranks.share import Ground, ShareMerging
from streammerge.ranks.split import rates_of, shares
from streammerge.rates import Rates
from streammerge.report import Report
from streammerge.world import World

logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]


def merge_as_one_of(
    planned: Plan, out: str, storage: Storage, world: World, *, resume: bool = False, progress: Progress | None = None
) -> Report:
    """Merge together with the other processes of `world`, each of which calls this with the same plan.

    Returns in all of them when `out` is there: in the first the report of the whole merge, in each other that of its
    share. Raises StreamMergeError in all of them where one fails; what is done is kept for `resume`.
    """
    process = _Process(planned, out, storage, world, progress)
    return process.lead(resume=resume) if world.is_first else process.follow()


class _Process:
    def __init__(self, planned: Plan, out: str, storage: Storage, world: World, progress: Progress | None) -> None:
        self._planned, self._out, self._storage, self._world = planned, out, storage, world
        self._progress = progress
        self._partial = partial_folder(Path(os.path.abspath(out)))
        self._merging = ShareMerging(planned, out, storage, progress=self._note)
        # another version may round otherwise
        identity = {**self._merging.identity, "versions": {**versions(), "python": ""}}
        self._meeting = Meeting(self._partial, world, identity, tell=logger.warning)

    def lead(self, *, resume: bool) -> Report:
        planned, meeting = self._planned, self._meeting
        ground = Ground(self._out, planned.layout, self._merging.identity, resume=resume)
        with ground:
            try:
                with meeting:
                    rates = rates_of(planned)
                    meeting.open({"rates": asdict(rates)})
                    owners = shares(planned, ground.cited, self._world.size, rates)
                    own = self._carry_out(owners[0], ground.cited)
                    own, told = self._await_others(own)
                    meeting.close()
            except BaseException:
                if meeting.is_over:
                    # what it says is not why the merge failed
                    with suppress(OutputError):
                        ground.gather()
                raise
            ground.settle(owners)
            refuse_changed(planned, self._storage, ground)
            report = _whole(own, ground, planned, told)
            ground.publish({**self._merging.side_files, REPORT_NAME: report.to_json().encode()})
        return report

    def follow(self) -> Report:
        with self._meeting as meeting:
            rates = Rates(**meeting.join()["rates"])
            cited = self._cited()
            owners = shares(self._planned, cited, self._world.size, rates)
            own = self._carry_out(owners[self._world.rank], cited)
            meeting.wait_published()
        return own

    def _carry_out(self, names: frozenset[str], cited: Mapping[str, Entry]) -> Report:
        self._merging.take(self._world.rank, names, cited)
        merging = self._merging
        with merging:
            self._meeting.working()
            for _ in merging.steps():
                pass
            report = merging.finish()
            if not self._world.is_first:
                # while the journal is locked: who lets go of it without a word is taken for dead
                self._meeting.done(self._facts(report))
        return report

    def _await_others(self, own: Report) -> tuple[Report, list[Mapping[str, Any]]]:
        """The first process's report with the time that it waited, and what each process did."""
        started = time.perf_counter()
        told = self._meeting.all_done(lambda: self._note(own.read_bytes, own.read_bytes))
        waited = time.perf_counter() - started
        seconds = replace(
            own.seconds,
            wall=own.seconds.wall + waited,
            waiting_for_output=own.seconds.waiting_for_output + waited,
        )
        return replace(own, seconds=seconds), [self._facts(own), *told]

    def _facts(self, report: Report) -> dict[str, Any]:
        return {
            "rank": self._world.rank,
            "host": self._meeting.host,
            "device": self._planned.device,
            "tensors": len(report.tensors),
            "resumed_tensors": report.resumed_tensors,
            "read_bytes": report.read_bytes,
            "written_bytes": report.written_bytes,
            "memory_bytes": dict(report.memory),
            "seconds": {**asdict(report.seconds), "computing": report.seconds.computing},
        }

    def _note(self, done_bytes: int, total_bytes: int) -> None:
        sums = self._meeting.progress(done_bytes, total_bytes)
        if self._progress:
            self._progress(*sums)

    def _cited(self) -> dict[str, Entry]:
        with os_errors(self._partial):
            journal = Journal(self._partial / JOURNAL, locked=False)
            try:
                return journal.entries(self._planned.layout.placements)
            finally:
                journal.close()


def _whole(own: Report, ground: Ground, planned: Plan, processes: list[Mapping[str, Any]]) -> Report:
    names = [name for step in planned.steps for name, _, _ in step.outputs]
    return replace(
        own,
        tensors=tuple(ground.outcomes[name] for name in names),
        checksums=ground.checksums,
        read_bytes=sum(each["read_bytes"] for each in processes),
        written_bytes=planned.layout.total_bytes,
        resumed_tensors=sum(each["resumed_tensors"] for each in processes),
        processes=tuple(processes),
    )
