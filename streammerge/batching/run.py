"""Run what is left to do of a batch."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from streammerge.batching.keeping import Folders
from streammerge.batching.ledger import Ledger
from streammerge.batching.night import Job, Night
from streammerge.batching.page import PAGE_NAME, Page
from streammerge.batching.together import Planner, grouped, merge_together
from streammerge.checkpoint import Storage
from streammerge.errors import StreamMergeError
from streammerge.evaluation import evaluate
from streammerge.fetching import places_read
from streammerge.plan import Plan
from streammerge.report import Report
from streammerge.storage.shared import SharedStorage


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a run of a batch came to: names of jobs that are as the batch asks, and why others are not.

    page     where it is told
    stopped  whether it was asked to stop before all was done
    """

    page: str
    done: list[str] = field(default_factory=list)
    failed: dict[str, StreamMergeError] = field(default_factory=dict)
    stopped: bool = False


def run_night(
    night: Night,
    planner: Planner,
    storage: Storage,
    *,
    delete_consumed: bool = False,
    tell: Callable[[str, str], None] = lambda name, text: None,
    stopped: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Merge, evaluate and delete as a batch asks, but for what earlier runs did.

    delete_consumed  delete each file that this run fetched when no job needs it any more
    tell      told in words what became of a job, by its name, or why the page could not be written, by its own
    stopped   asked after each tensor; once it says so all is left as it is, and running the batch again goes on
    progress  told the bytes read so far and in all, by the merges under way

    A job that fails is noted and keeps no other from running; it is tried again when the batch runs again. All the
    while the page `report.html` in the batch's folder says how far it is.
    Raises OutputError where the batch's folder cannot be had or holds something else under a job's name,
    EvaluationError where the metric that decides what is kept is not among those found.
    """
    with Ledger(night.out) as ledger:
        run = _Run(night, ledger, tell)
        try:
            run.all(planner, storage, delete_consumed, stopped, progress)
        finally:
            settled = len(run.outcome.done) + len(run.outcome.failed)
            run.outcome.stopped = stopped() and settled < len(night.jobs)
            run.page.finish(stopped=settled < len(night.jobs))
        return run.outcome


class _Run:
    def __init__(self, night: Night, ledger: Ledger, tell: Callable[[str, str], None]) -> None:
        self.outcome = Outcome(page=str(ledger.path.with_name(PAGE_NAME)))
        self.folders = Folders(night, ledger)
        self.page = Page(night, ledger, self.folders, lambda text: tell(PAGE_NAME, text))
        self._night, self._ledger, self._tell = night, ledger, tell

    def all(
        self,
        planner: Planner,
        storage: Storage,
        delete_consumed: bool,
        stopped: Callable[[], bool],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Every job, in groups, but for what earlier runs did."""
        left: list[Job] = []
        for job in self._night.jobs:
            if self.folders.is_deleted(job):
                self.folders.delete(job)
                self.outcome.done.append(job.name)
            elif not self.folders.holds(job):
                left.append(job)
        self.page.refresh()

        def halted() -> bool:
            self.page.refresh()
            return stopped()

        waiting = {job.name for job in left}
        for job in self._night.jobs:
            if job.name not in waiting and not self.folders.is_deleted(job) and not stopped():
                self.settle(job)
        shared = SharedStorage(storage)

        def claim(plan: Plan) -> None:
            shared.claim(places_read(plan))

        for group in grouped(left, self._night.out, planner, self.fail, claim):
            self.page.under_way([job.name for job in group.jobs])
            merged = merge_together(
                group, lambda job: str(self.folders.of(job)), shared,
                failed=self.fail, stopped=halted, delete_consumed=delete_consumed, progress=progress,
            )  # fmt: skip
            for job, report in merged:
                self._ledger.note(job, "merged", seconds=report.seconds.wall, facts=_facts(report))
                self._tell(job.name, report.summary())
                self.page.changed(job)
                if not stopped():
                    self.settle(job)
            if stopped():
                break

    def fail(self, job: Job, error: StreamMergeError) -> None:
        self.outcome.failed[job.name] = error
        self._ledger.note(job, "failed", error=error.message)
        self._tell(job.name, f"failed: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
        self.page.changed(job)

    def settle(self, job: Job) -> None:
        """Evaluate a merged job, if that is asked for and not done, and delete what is not among the best."""
        if self._night.evaluation is not None and not self._is_evaluated(job):
            started = time.monotonic()
            try:
                results = evaluate(self.folders.of(job), self._night.evaluation)
            except StreamMergeError as error:
                self.fail(job, error)
                return
            metrics = {f"{task}.{name}": value for task, each in results.items() for name, value in each.items()}
            self._ledger.note(job, "evaluated", seconds=time.monotonic() - started, metrics=metrics)
            self._tell(job.name, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
            self.page.changed(job)
        self.outcome.done.append(job.name)
        for loser in self.folders.losers():
            self.folders.delete(loser)
            self._tell(loser.name, "deleted: not among the best")
            self.page.changed(loser)

    def _is_evaluated(self, job: Job) -> bool:
        entry = self._ledger.last(job)
        return entry is not None and entry.status == "evaluated"


def _facts(report: Report) -> dict[str, float]:
    told = [outcome.facts.get("interference") for outcome in report.tensors]
    found = [value for value in told if isinstance(value, float) and math.isfinite(value)]
    interference = {"interference": round(statistics.median(found), 6)} if found else {}
    return {"written_bytes": report.written_bytes, **interference}
