"""Merges of the same models side by side, step by step, so that what they read is read once."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge import devices
from streammerge.batching.night import Job
from streammerge.errors import PlanError, StreamMergeError
from streammerge.journal import refuse_unready
from streammerge.plan import Plan, free_bytes
from streammerge.recipe import Recipe
from streammerge.report import Report
from streammerge.storage.shared import SharedStorage
from streammerge.world import thread_limit

if TYPE_CHECKING:
    from streammerge.merging import Merging

# slots of a merge that shares the budget with others: enough to read and write ahead of one step
SHARE_BYTES = 64 << 20
# at most this share of what steps leave of the budget goes to slots; the rest keeps what was read for the next merge
_SLOTS_SHARE = 0.5
# of what is kept: the rest is what was read
_FOUND_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Jobs that run together, each with its plan.

    kept_bytes  memory for what one of them read or found, until the others have had it; 0 for a job alone
    lanes       how many threads merge some of them each, a step of one after the other; cores are divided among them
    """

    jobs: tuple[Job, ...]
    plans: tuple[Plan, ...]
    kept_bytes: int = 0
    lanes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Plans a recipe within a budget of memory; `budget_bytes` is the batch's."""

    budget_bytes: int
    plan: Callable[[Recipe, int], Plan]


Failed = Callable[[Job, StreamMergeError], None]
_Ended = tuple[Job, "Merging", StreamMergeError | None]


def grouped(
    jobs: Sequence[Job], out: str, planner: Planner, failed: Failed, planned_one: Callable[[Plan], None] | None = None
) -> Iterator[Group]:
    """Plan jobs and put those together that read the same models, as many as the budget and the disk allow.

    out     the folder that their models go to: what is free there is asked when a group's turn comes
    failed  told of each job that cannot be planned
    planned_one  told of each that can, all of them before the first group

    In order of each group's first job. The plans of a group take the budget together: a workspace for each lane, the
    slots of each, and what is kept for the others.
    """
    planned: dict[tuple[str, ...], list[tuple[Job, Plan]]] = {}
    for job in jobs:
        try:
            found = planner.plan(job.recipe, planner.budget_bytes)
        except StreamMergeError as error:
            failed(job, error)
            continue
        planned.setdefault(found.recipe.locations, []).append((job, found))
        if planned_one is not None:
            planned_one(found)
    for alike in planned.values():
        while alike:
            group = _fitting(alike, out, planner)
            yield group
            del alike[: len(group.jobs)]


def _fitting(alike: Sequence[tuple[Job, Plan]], out: str, planner: Planner) -> Group:
    """As many of the first jobs as fit the budget and the disk together, or else the first."""
    free = free_bytes(out)
    most = 1 if alike[0][1].device_memory else len(alike)
    for count, lanes in itertools.product(range(most, 1, -1), _lane_counts()):
        chosen = alike[:count]
        steps = max(each.memory.workspace_bytes + each.memory.reserve_bytes for _, each in chosen)
        left = planner.budget_bytes - min(lanes, count) * steps
        needed = sum(each.layout.total_bytes for _, each in chosen)
        if count * SHARE_BYTES > _SLOTS_SHARE * left or needed > free:
            continue
        try:
            plans = tuple(_within_share(each, planner) for _, each in chosen)
        except PlanError:
            # more slots are needed than a share has
            continue
        return Group(
            jobs=tuple(job for job, _ in chosen),
            plans=plans,
            kept_bytes=left - count * SHARE_BYTES,
            lanes=min(lanes, count),
        )
    job, alone = alike[0]
    return Group(jobs=(job,), plans=(alone,))


def _lane_counts() -> list[int]:
    """How many lanes to try: a core for each, or several, down to all for one."""
    cores = thread_limit()
    return [cores >> halvings for halvings in range(cores.bit_length())]


def _within_share(alone: Plan, planner: Planner) -> Plan:
    memory = alone.memory
    return planner.plan(alone.recipe, memory.workspace_bytes + memory.reserve_bytes + SHARE_BYTES)


def merge_together(
    group: Group,
    place: Callable[[Job], str],
    storage: SharedStorage,
    *,
    failed: Failed,
    stopped: Callable[[], bool],
    delete_consumed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Job, Report]]:
    """Run a group's merges, resuming what earlier runs left, and publish each that succeeds.

    place    the folder of a job
    failed   told of each job that fails; the others go on
    stopped  asked after each step: whether to leave everything as it is, to be resumed
    delete_consumed  give each file that was fetched back to `storage` when all that is made of it is on the disk
    progress told the bytes read so far and in all, by all of the group

    An exception other than ours ends all of them; what is done stays resumable.
    """
    devices.prepare_torch()
    # torch takes seconds to load, and planning refuses without it
    from streammerge.merging import Merging
    from streammerge.remembered import Remembered
    from streammerge.workspace import Workspace

    found_bytes = int(_FOUND_SHARE * group.kept_bytes)
    storage.keep(group.kept_bytes - found_bytes)
    workspace_bytes = max(each.memory.workspace_bytes for each in group.plans)
    threads = max(thread_limit() // group.lanes, 1)
    lanes = [_Lane(threads if group.lanes > 1 else None) for _ in range(group.lanes)]
    workspaces = [Workspace(workspace_bytes) for _ in lanes]
    found = [Remembered(found_bytes // len(lanes)) if found_bytes else None for _ in lanes]
    sums = _Sums(progress)
    ended: list[tuple[Job, Merging]] = []

    def fail(job: Job, merging: Merging | None, error: StreamMergeError) -> None:
        if merging is not None:
            merging.__exit__(type(error), error, error.__traceback__)
        failed(job, error)

    try:
        for number, (job, planned) in enumerate(zip(group.jobs, group.plans, strict=True)):
            # neighbours stay together: of a grid they differ in the last of its keys
            lane = number * len(lanes) // len(group.jobs)
            try:
                refuse_unready(planned, place(job), resume=True)
                merging = Merging(
                    planned, place(job), storage, resume=True, delete_consumed=delete_consumed,
                    progress=sums.of(job.name), workspace=workspaces[lane], remembered=found[lane],
                    threads=threads,
                )  # fmt: skip
                merging.__enter__()
            except StreamMergeError as error:
                failed(job, error)
                continue
            lanes[lane].under_way[job.name] = job, merging, merging.steps()
        while any(lane.under_way for lane in lanes) and not stopped():
            for job, merging, failure in _advanced(lanes):
                if failure is None:
                    ended.append((job, merging))
                else:
                    fail(job, merging, failure)
        while ended:
            job, merging = ended.pop(0)
            try:
                report = merging.publish()
            except StreamMergeError as error:
                fail(job, merging, error)
                continue
            merging.__exit__(None, None, None)
            yield job, report
    except BaseException as error:
        # else each would wait for what it is about to read
        storage.end()
        _leave([*(m for lane in lanes for m in lane.end()), *(m for _, m in ended)], error)
        raise
    storage.end()
    _leave([merging for lane in lanes for merging in lane.end()], None)


class _Lane:
    """Merges that one thread carries out, a step of each in turn: its own, whose loops run on `threads`, or ours."""

    def __init__(self, threads: int | None) -> None:
        import torch

        self.under_way: dict[str, tuple[Job, Merging, Iterator[str]]] = {}
        self._thread: ThreadPoolExecutor | None = None
        if threads is not None:
            self._thread = ThreadPoolExecutor(1, "streammerge-lane", torch.set_num_threads, (threads,))

    def begin(self) -> Future[list[_Ended]]:
        """Take a step of each merge; those that came to their end, and those that failed."""
        if self._thread is not None:
            return self._thread.submit(self._step)
        done: Future[list[_Ended]] = Future()
        done.set_result(self._step())
        return done

    def end(self) -> list[Merging]:
        """Wait for the step that is under way; the merges that have not ended."""
        if self._thread is not None:
            self._thread.shutdown()
        return [merging for _, merging, _ in self.under_way.values()]

    def _step(self) -> list[_Ended]:
        ended: list[_Ended] = []
        for name, (job, merging, steps) in list(self.under_way.items()):
            failure: StreamMergeError | None = None
            try:
                if next(steps, None) is not None:
                    continue
            except StreamMergeError as error:
                failure = error
            del self.under_way[name]
            ended.append((job, merging, failure))
        return ended


def _advanced(lanes: Sequence[_Lane]) -> list[_Ended]:
    """What ended after one more step of all: none gets ahead of what the others read."""
    return [each for done in [lane.begin() for lane in lanes] for each in done.result()]


def _leave(mergings: Sequence[Merging], error: BaseException | None) -> None:
    for merging in reversed(mergings):
        # what the journal says is durable is so, whatever happens now
        with suppress(StreamMergeError):
            merging.__exit__(None if error is None else type(error), error, None)


class _Sums:
    """Adds up what several merges tell of their progress, each from its lane."""

    def __init__(self, progress: Callable[[int, int], None] | None) -> None:
        self._progress = progress
        self._told: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def of(self, name: str) -> Callable[[int, int], None] | None:
        if self._progress is None:
            return None
        progress = self._progress

        def tell(done_bytes: int, total_bytes: int) -> None:
            with self._lock:
                self._told[name] = done_bytes, total_bytes
                progress(sum(done for done, _ in self._told.values()), sum(total for _, total in self._told.values()))

        return tell
