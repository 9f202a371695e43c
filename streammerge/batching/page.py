"""The page of a batch, as its ledger and its folders tell: written as jobs end, at a twentieth of the time at most."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from streammerge.batching.keeping import Folders
from streammerge.batching.ledger import Ledger
from streammerge.batching.night import Job, Night
from streammerge.errors import OutputError, escaped
from streammerge.folder import REPORT_NAME
from streammerge.reporting.batch_page import BatchFacts, JobFacts, batch_page
from streammerge.reporting.facts import MergeFacts, read_merge
from streammerge.reporting.write import write_page

PAGE_NAME = "report.html"
# side by side: more would be neither read nor kept in mind
_MOST_COMPARED = 6
_SHARE = 1 / 20
# of a recipe, what stands in columns of its own, or in other words
_TOLD = re.compile(r"name|merge_method|base_model|models\.\d+\.model")


class Page:
    """The file `report.html` in a batch's folder. What keeps it from being written is told once, and ends nothing.

    tell  told why the page could not be written
    """

    def __init__(self, night: Night, ledger: Ledger, folders: Folders, tell: Callable[[str], None]) -> None:
        self._night, self._ledger, self._folders, self._tell = night, ledger, folders, tell
        self._path = ledger.path.with_name(PAGE_NAME)
        self._settings = settings_of(night.jobs)
        self._read: dict[str, MergeFacts] = {}
        self._under_way: frozenset[str] = frozenset()
        self._changed, self._told = True, False
        self._due = 0.0

    def changed(self, job: Job) -> None:
        """Something happened to a job."""
        self._read.pop(job.name, None)
        self._changed = True
        self.refresh()

    def under_way(self, names: Collection[str]) -> None:
        """These jobs are being merged from now on."""
        self._under_way, self._changed = frozenset(names), True
        self.refresh()

    def refresh(self) -> None:
        """Write the page if something changed, and writing it takes no more than its share of the time."""
        if self._changed and time.monotonic() >= self._due:
            self._write("is under way")

    def finish(self, *, stopped: bool) -> None:
        """Write the page for the last time."""
        self._under_way = frozenset()
        self._write("was stopped; the same command goes on" if stopped else "has ended")

    def _write(self, state: str) -> None:
        started = time.monotonic()
        self._changed = False
        try:
            write_page(self._page(state), self._path)
        except Exception as error:  # noqa: BLE001 - no page is worth a night's merges
            if not self._told:
                self._told = True
                self._tell(escaped(getattr(error, "message", f"{type(error).__name__}: {error}")))
        ended = time.monotonic()
        self._due = ended + (ended - started) * (1 / _SHARE - 1)

    def _page(self, state: str) -> str:
        night, keep = self._night, self._night.keep
        existing = [job for job in night.jobs if (self._folders.of(job) / REPORT_NAME).is_file()]
        there = {job.name for job in existing}
        merges: list[MergeFacts] = []
        unread: list[str] = []
        for job in self._best(existing)[:_MOST_COMPARED]:
            try:
                merges.append(self._facts_of(job))
            except OutputError as error:
                unread.append(error.message)
        shown = {merge.label for merge in merges}
        self._read = {name: each for name, each in self._read.items() if name in shown}
        batch = BatchFacts(
            name=Path(night.out).resolve().name,
            state=f"As of {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC the batch {state}.",
            jobs=[self._job(job, job.name in there) for job in night.jobs],
            metric=keep.by,
            largest=keep.largest,
            kept="" if not keep.best else f"The best {keep.best} by `{escaped(keep.by)}` stay.",
            unread=unread,
        )
        return batch_page(batch, merges, len(existing))

    def _best(self, jobs: list[Job]) -> list[Job]:
        """The best first by the metric that decides what is kept; without one the last first."""
        keep = self._night.keep
        if not keep.by:
            return jobs[::-1]

        def place(job: Job) -> float:
            entry = self._ledger.last(job)
            value = None if entry is None else entry.metrics.get(keep.by)
            return float("inf") if value is None else -value if keep.largest else value

        return sorted(jobs, key=place)

    def _facts_of(self, job: Job) -> MergeFacts:
        if job.name not in self._read:
            self._read[job.name] = read_merge(self._folders.of(job), job.name)
        return self._read[job.name]

    def _job(self, job: Job, exists: bool) -> JobFacts:
        events, last = self._ledger.events(job), self._ledger.last(job)
        merged, evaluated = events.get("merged"), events.get("evaluated")
        status = "merging" if job.name in self._under_way else "merged" if exists else "to do"
        if last is not None and (last.status in ("failed", "deleted") or exists):
            status = last.status
        return JobFacts(
            name=job.name,
            method=job.recipe.method,
            status=status,
            settings=self._settings[job.name],
            merging=None if merged is None else merged.seconds,
            evaluating=None if evaluated is None else evaluated.seconds,
            written_bytes=None if merged is None else merged.facts.get("written_bytes"),
            interference=None if merged is None else merged.facts.get("interference"),
            metrics={} if last is None else last.metrics,
            error=last.error if last is not None and status == "failed" else None,
        )


def settings_of(jobs: Collection[Job]) -> dict[str, str]:
    """In what a job's recipe differs from the others', beside name and method; of a single job, its parameters."""
    flat = {
        job.name: {**dict(_leaves("", job.recipe.to_dict())), "models": " + ".join(job.recipe.names)} for job in jobs
    }
    keys = [key for key in dict.fromkeys(key for leaves in flat.values() for key in leaves) if not _TOLD.fullmatch(key)]
    if len(flat) > 1:
        telling = [key for key in keys if len({leaves.get(key) for leaves in flat.values()}) > 1]
    else:
        telling = [key for key in keys if key.startswith("parameters.")]
    return {
        name: ", ".join(f"{key.removeprefix('parameters.')} {leaves[key]}" for key in telling if key in leaves)
        for name, leaves in flat.items()
    }


def _leaves(path: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), each)
    elif isinstance(value, list) and any(isinstance(each, (dict, list)) for each in value):
        for number, each in enumerate(value):
            yield from _leaves(f"{path}.{number}", each)
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)
