"""Merges of the same models side by side, step by step, so that what they read is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    """

    jobs: tuple[Job, ...]
    plans: tuple[Plan, ...]
    kept_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Plans a recipe within a budget of memory; `budget_bytes` is the batch's."""

    budget_bytes: int
    plan: Callable[[Recipe, int], Plan]


Failed = Callable[[Job, StreamMergeError], None]


def grouped(
    jobs: Sequence[Job], out: str, planner: Planner, failed: Failed, planned_one: Callable[[Plan], None] | None = None
) -> Iterator[Group]:
    """Plan jobs and put those together that read the same models, as many as the budget and the disk allow.

    out     the folder that their models go to: what is free there is asked when a group's turn comes
    failed  told of each job that cannot be planned
    planned_one  told of each that can, all of them before the first group

    In order of each group's first job. The plans of a group take the budget together: one workspace, the slots of
    each, and what is kept for the others.
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
    for count in range(most, 1, -1):
        chosen = alike[:count]
        steps = max(each.memory.workspace_bytes + each.memory.reserve_bytes for _, each in chosen)
        left = planner.budget_bytes - steps
        needed = sum(each.layout.total_bytes for _, each in chosen)
        if count * SHARE_BYTES > _SLOTS_SHARE * left or needed > free:
            continue
        try:
            plans = tuple(_within_share(each, planner) for _, each in chosen)
        except PlanError:
            # more slots are needed than a share has
            continue
        return Group(jobs=tuple(job for job, _ in chosen), plans=plans, kept_bytes=left - count * SHARE_BYTES)
    job, alone = alike[0]
    return Group(jobs=(job,), plans=(alone,))


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
    remembered = Remembered(found_bytes) if found_bytes else None
    workspace = Workspace(max(each.memory.workspace_bytes for each in group.plans))
    sums = _Sums(progress)
    under_way: dict[str, tuple[Job, Merging, Iterator[str]]] = {}
    ended: list[tuple[Job, Merging]] = []

    def fail(job: Job, merging: Merging | None, error: StreamMergeError) -> None:
        if merging is not None:
            merging.__exit__(type(error), error, error.__traceback__)
        failed(job, error)

    try:
        for job, planned in zip(group.jobs, group.plans, strict=True):
            try:
                refuse_unready(planned, place(job), resume=True)
                merging = Merging(
                    planned, place(job), storage, resume=True, delete_consumed=delete_consumed,
                    progress=sums.of(job.name), workspace=workspace, remembered=remembered,
                )  # fmt: skip
                merging.__enter__()
            except StreamMergeError as error:
                failed(job, error)
                continue
            under_way[job.name] = job, merging, merging.steps()
        while under_way and not stopped():
            for name, (job, merging, steps) in list(under_way.items()):
                try:
                    if next(steps, None) is not None:
                        continue
                except StreamMergeError as error:
                    del under_way[name]
                    fail(job, merging, error)
                    continue
                ended.append((job, merging))
                del under_way[name]
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
        _leave([*(m for _, m, _ in under_way.values()), *(m for _, m in ended)], error)
        raise
    storage.end()
    _leave([merging for _, merging, _ in under_way.values()], None)


def _leave(mergings: Sequence[Merging], error: BaseException | None) -> None:
    for merging in reversed(mergings):
        # what the journal says is durable is so, whatever happens now
        with suppress(StreamMergeError):
            merging.__exit__(None if error is None else type(error), error, None)


class _Sums:
    """Adds up what several merges tell of their progress."""

    def __init__(self, progress: Callable[[int, int], None] | None) -> None:
        self._progress = progress
        self._told: dict[str, tuple[int, int]] = {}

    def of(self, name: str) -> Callable[[int, int], None] | None:
        if self._progress is None:
            return None
        progress = self._progress

        def tell(done_bytes: int, total_bytes: int) -> None:
            self._told[name] = done_bytes, total_bytes
            progress(sum(done for done, _ in self._told.values()), sum(total for _, total in self._told.values()))

        return tell
