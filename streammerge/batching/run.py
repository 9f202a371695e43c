"""Run what is left to do of a batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from streammerge.batching.keeping import Folders
from streammerge.batching.ledger import Ledger
from streammerge.batching.night import Job, Night
from streammerge.batching.together import Group, Planner, grouped, merge_together
from streammerge.checkpoint import Storage
from streammerge.errors import StreamMergeError
from streammerge.evaluation import evaluate


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a run of a batch came to: names of jobs that are as the batch asks, and why others are not.

    stopped  whether it was asked to stop before all was done
    """

    done: list[str] = field(default_factory=list)
    failed: dict[str, StreamMergeError] = field(default_factory=dict)
    stopped: bool = False


def outline(night: Night, planner: Planner) -> tuple[list[Group], dict[str, StreamMergeError]]:
    """What a batch would do, from headers alone: its groups, and of each job that cannot be planned the reason."""
    failed: dict[str, StreamMergeError] = {}
    groups = grouped(night.jobs, night.out, planner, lambda job, error: failed.update({job.name: error}))
    return list(groups), failed


def run_night(
    night: Night,
    planner: Planner,
    storage: Storage,
    *,
    tell: Callable[[Job, str], None] = lambda job, text: None,
    stopped: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Merge, evaluate and delete as a batch asks, but for what earlier runs did.

    tell      told in words what became of a job
    stopped   asked after each tensor; once it says so all is left as it is, and running the batch again goes on
    progress  told the bytes read so far and in all, by the merges under way

    A job that fails is noted and keeps no other from running; it is tried again when the batch runs again.
    Raises OutputError where the batch's folder cannot be had or holds something else under a job's name,
    EvaluationError where the metric that decides what is kept is not among those found.
    """
    with Ledger(night.out) as ledger:
        run = _Run(night, ledger, tell)
        left = []
        for job in night.jobs:
            if run.folders.is_deleted(job):
                run.folders.delete(job)
                run.outcome.done.append(job.name)
            elif not run.folders.holds(job):
                left.append(job)
        for job in night.jobs:
            if job not in left and not run.folders.is_deleted(job) and not stopped():
                run.settle(job)
        for group in grouped(left, night.out, planner, run.fail):
            merged = merge_together(
                group, lambda job: str(run.folders.of(job)), storage,
                failed=run.fail, stopped=stopped, progress=progress,
            )  # fmt: skip
            for job, report in merged:
                ledger.note(job, "merged", seconds=report.seconds.wall)
                tell(job, report.summary())
                if not stopped():
                    run.settle(job)
            if stopped():
                break
        settled = len(run.outcome.done) + len(run.outcome.failed)
        run.outcome.stopped = stopped() and settled < len(night.jobs)
        return run.outcome


class _Run:
    def __init__(self, night: Night, ledger: Ledger, tell: Callable[[Job, str], None]) -> None:
        self.outcome, self.folders = Outcome(), Folders(night, ledger)
        self._night, self._ledger, self._tell = night, ledger, tell

    def fail(self, job: Job, error: StreamMergeError) -> None:
        self.outcome.failed[job.name] = error
        self._ledger.note(job, "failed", error=error.message)
        self._tell(job, f"failed: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))

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
            self._tell(job, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        self.outcome.done.append(job.name)
        for loser in self.folders.losers():
            self.folders.delete(loser)
            self._tell(loser, "deleted: not among the best")

    def _is_evaluated(self, job: Job) -> bool:
        entry = self._ledger.last(job)
        return entry is not None and entry.status == "evaluated"
