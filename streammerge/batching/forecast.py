"""What a batch would do, from headers alone: which jobs run together, what that reads, writes, fetches and takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from streammerge.batching.keeping import Folders
from streammerge.batching.ledger import RESULTS_NAME, Ledger
from streammerge.batching.night import Job, Night
from streammerge.batching.together import Group, Planner, grouped
from streammerge.checkpoint import Storage
from streammerge.errors import StreamMergeError
from streammerge.fetching import places_read
from streammerge.plan import free_bytes
from streammerge.rates import load_rates
from streammerge.storage.places import Fetching, Place


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOutline:
    """Jobs that run together. `seconds` is None before merges of their kinds ran here."""

    group: Group
    read_bytes: int
    fetch_bytes: int
    write_bytes: int
    seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What is left to do of a batch.

    failed      of each job that cannot be planned the reason
    done        jobs of which nothing is left but, perhaps, an evaluation
    alone_bytes  what the jobs would read one by one
    most_bytes  of disk at a time: models that stay, and a group's
    """

    groups: tuple[GroupOutline, ...]
    failed: Mapping[str, StreamMergeError]
    done: tuple[str, ...]
    alone_bytes: int
    most_bytes: int
    free_bytes: int

    @property
    def read_bytes(self) -> int:
        """Bytes that all groups read, each of them once."""
        return sum(each.read_bytes for each in self.groups)

    @property
    def fetch_bytes(self) -> int:
        """Bytes that are fetched, each file once."""
        return sum(each.fetch_bytes for each in self.groups)

    @property
    def seconds(self) -> float | None:
        """Time of all merges, evaluations aside; None where that of a group is unknown."""
        known = [each.seconds for each in self.groups if each.seconds is not None]
        return sum(known) if len(known) == len(self.groups) else None


def outline(night: Night, planner: Planner, storage: Storage) -> Outline:
    """What running a batch now would do. Nothing is written."""
    failed: dict[str, StreamMergeError] = {}
    done = _done(night)
    left = [job for job in night.jobs if job.name not in done]
    fetched: set[Place] = set()
    groups = tuple(
        _outlined(group, storage, fetched)
        for group in grouped(left, night.out, planner, lambda job, error: failed.update({job.name: error}))
    )
    return Outline(
        groups=groups,
        failed=failed,
        done=tuple(done),
        alone_bytes=sum(plan.read_bytes for each in groups for plan in each.group.plans),
        most_bytes=_most_bytes(groups, night.keep.best),
        free_bytes=free_bytes(night.out),
    )


def _done(night: Night) -> dict[str, Job]:
    """Jobs whose merge is there, or was there and was deleted. Raises OutputError where another batch runs."""
    if not os.path.exists(os.path.join(night.out, RESULTS_NAME)):
        return {}
    with Ledger(night.out) as ledger:
        folders = Folders(night, ledger)
        return {job.name: job for job in night.jobs if folders.is_deleted(job) or folders.holds(job)}


def _outlined(group: Group, storage: Storage, fetched: set[Place]) -> GroupOutline:
    plans = group.plans
    places: set[Place] = set()
    if isinstance(storage, Fetching):
        # what an earlier group fetched is there
        places = set().union(*map(places_read, plans)) - fetched
        fetched |= places
    return GroupOutline(
        group=group,
        # side by side the widest reading is everybody's
        read_bytes=max(plan.read_bytes for plan in plans),
        fetch_bytes=sum(storage.to_fetch(*place) for place in places) if isinstance(storage, Fetching) else 0,
        write_bytes=sum(plan.layout.total_bytes for plan in plans),
        seconds=_seconds(group),
    )


def _seconds(group: Group) -> float | None:
    """As for one merge: the longest of reading, which they share, of writing and of computing, which add up."""
    reading = writing = computing = 0.0
    for plan in group.plans:
        rates, work = load_rates(*plan.rates_keys), plan.work
        if rates is None:
            return None
        reading = max(reading, work.read_bytes / rates.read_bytes_per_second)
        writing += work.write_bytes / rates.write_bytes_per_second
        computing += rates.computing_seconds(work)
    return max(reading, writing, computing)


def _most_bytes(groups: tuple[GroupOutline, ...], best: int | None) -> int:
    most, stay = 0, list[int]()
    for each in groups:
        most = max(most, sum(stay) + each.write_bytes)
        stay += [plan.layout.total_bytes for plan in each.group.plans]
        if best is not None:
            # whichever turn out the best: these would take the most
            stay = sorted(stay, reverse=True)[:best]
    return most
