"""Merges of the same models side by side, step by step, so that what they read is read once."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

from streammerge import devices
from streammerge.batching.night import Job
from streammerge.errors import PlanError, StreamMergeError
from streammerge.journal import refuse_unready
from streammerge.memory import fit_memory
from streammerge.plan import Plan, free_bytes
from streammerge.recipe import Recipe
from streammerge.report import Report
from streammerge.storage.shared import SharedStorage
from streammerge.world import thread_limit

# slots of a merge that shares the budget with others: enough to read and write ahead of one step
SHARE_BYTES = 64 << 20
# at most this share of what steps leave of the budget goes to slots; the rest keeps what was read for the next merge
_SLOTS_SHARE = 0.5
# of what is kept: the rest is what was read
_FOUND_SHARE = 0.5
_MOST_STEPS_OF_A_ROUND = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Jobs that run together, each with its plan.

    kept_bytes  memory for what one of them read or found, until the others have had it; 0 for a job alone
    lanes       how many threads merge them, each a step of whichever is next; cores are divided among them
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
_Life = Generator[None, None, Report]


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
            plans = tuple(_within_share(each) for _, each in chosen)
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


def _within_share(alone: Plan) -> Plan:
    """The plan with the slots of one among others: of all it says nothing else depends on the budget."""
    budget = alone.memory.workspace_bytes + alone.memory.reserve_bytes + SHARE_BYTES
    return replace(alone, memory=fit_memory(alone.steps, budget, staged=False))


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
    stopped  asked after each step, by any thread: whether to leave everything as it is, to be resumed
    delete_consumed  give each file that was fetched back to `storage` when all that is made of it is on the disk
    progress told the bytes read so far and in all, by all of the group

    An exception other than ours ends all of them; what is done stays resumable.
    """
    devices.prepare_torch()
    # torch takes seconds to load, and planning refuses without it
    import torch

    from streammerge.merging import Merging
    from streammerge.remembered import Remembered
    from streammerge.shared_blocks import same_steps
    from streammerge.workspace import LaneWorkspace

    found_bytes = int(_FOUND_SHARE * group.kept_bytes)
    storage.keep(group.kept_bytes - found_bytes)
    found = Remembered(found_bytes, same_steps(group.plans))
    workspace = LaneWorkspace(max(each.memory.workspace_bytes for each in group.plans))
    threads = max(thread_limit() // group.lanes, 1)
    sums = _Sums(progress)

    def life(job: Job, planned: Plan) -> _Life:
        """A merge turn by turn, whichever lane takes the next: it begins, takes its steps, and is published."""
        refuse_unready(planned, place(job), resume=True)
        with Merging(
            planned, place(job), storage, resume=True, delete_consumed=delete_consumed,
            progress=sums.of(job.name), workspace=workspace, remembered=found, threads=threads,
        ) as merging:  # fmt: skip
            try:
                yield
                for _ in merging.steps():
                    yield
                return merging.publish()
            except StreamMergeError:
                raise
            except BaseException:
                # all are about to be left, and leaving waits for what is being read
                storage.end()
                raise

    under_way = {n: life(job, plan) for n, (job, plan) in enumerate(zip(group.jobs, group.plans, strict=True))}
    finds = Counter[int]()
    ended: dict[int, Report | StreamMergeError] = {}
    # a step that takes long may be under way when its merge is to take the next
    stepping = {number: threading.Lock() for number in under_way}

    def turn(number: int) -> None:
        with stepping[number]:
            if number in ended or stopped():
                return
            # a step that failed may have left something
            workspace.reset()
            try:
                next(under_way[number])
            except StopIteration as end:
                ended[number] = end.value
            except StreamMergeError as error:
                ended[number] = error
            finally:
                finds[number] += found.end_turn()

    steps = _steps_of_a_round(group.plans, found_bytes)
    lanes: ThreadPoolExecutor | None = None
    if group.lanes > 1:
        lanes = ThreadPoolExecutor(group.lanes, "streammerge-lane", torch.set_num_threads, (threads,))
    try:
        while under_way and not stopped():
            # each takes a turn before any takes another: none gets ahead of what the others read and find
            found.forget()
            # what takes longest and others wait for comes first: of a grid, one merge of each method finds for the rest
            order = sorted(under_way, key=lambda number: -finds[number]) * steps
            for _ in lanes.map(turn, order) if lanes else map(turn, order):
                pass
            for number, outcome in sorted(ended.items()):
                if under_way.pop(number, None) is None:
                    continue
                if isinstance(outcome, StreamMergeError):
                    failed(group.jobs[number], outcome)
                else:
                    yield group.jobs[number], outcome
    finally:
        # else each would wait for what it is about to read
        storage.end()
        if lanes:
            lanes.shutdown(cancel_futures=True)
        for merge in reversed(under_way.values()):
            # what the journal says is durable is so, whatever happens now
            with suppress(StreamMergeError):
                merge.close()


def _steps_of_a_round(plans: Sequence[Plan], each_bytes: int) -> int:
    """How many turns each merge takes until all wait for the last of them: the more, the less they wait.

    each_bytes  that are kept of what merges read until the others have had it, and as many of what they find
    """
    read = max((step.experts[0].nbytes * len(step.models) for plan in plans for step in plan.steps), default=0)
    found = sum(plan.memory.workspace_bytes for plan in plans)
    return min(max(each_bytes // max(read, found, 1), 1), _MOST_STEPS_OF_A_ROUND)


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
