"""What became of each job of a batch: `results.jsonl`, a durable line for each event, the last of which counts."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from streammerge.batching.night import Job
from streammerge.errors import OutputError, quoted
from streammerge.journal import Journal, os_errors

RESULTS_NAME = "results.jsonl"

Status = Literal["merged", "evaluated", "failed", "deleted"]
_STATUSES = ("merged", "evaluated", "failed", "deleted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What happened to a job. `metrics` of an evaluated job are by `task.metric`; a deleted one keeps them.

    facts  of a merged job, what is told of it when its model is gone: `written_bytes`, `interference`
    """

    status: Status
    digest: str
    seconds: float | None = None
    error: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)


_HINT = "Move it away: merges that are complete are found without it, evaluations are made again."


class Ledger:
    """The results file of a batch's folder, locked: two batches never share a folder. Use as a context manager."""

    def __init__(self, out: str) -> None:
        folder = Path(os.path.abspath(out))
        self.path = folder / RESULTS_NAME
        with os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(self.path, hint=_HINT)
        self._entries: dict[str, dict[str, Entry]] = {}
        try:
            for line in self._journal.values():
                self._add(*self._read(line))
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()

    def last(self, job: Job) -> Entry | None:
        """A job's last event; None where there is none, or it is of another recipe."""
        return next(reversed(self.events(job).values()), None)

    def events(self, job: Job) -> dict[str, Entry]:
        """Of each kind of event a job's last, in the order in which they came."""
        entries = self._entries.get(job.name, {})
        return entries if all(entry.digest == job.digest for entry in entries.values()) else {}

    def note(
        self,
        job: Job,
        status: Status,
        *,
        seconds: float | None = None,
        error: str | None = None,
        metrics: Mapping[str, float] | None = None,
        facts: Mapping[str, float] | None = None,
    ) -> None:
        """Write an event; it is durable when this returns."""
        entry = Entry(
            status=status, digest=job.digest, seconds=seconds, error=error, metrics=metrics or {}, facts=facts or {}
        )
        line = {
            "job": job.name,
            "status": status,
            "recipe_sha256": job.digest,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **({"seconds": round(seconds, 3)} if seconds is not None else {}),
            **({"error": error} if error else {}),
            **({"metrics": dict(entry.metrics)} if entry.metrics else {}),
            **({"facts": dict(entry.facts)} if entry.facts else {}),
        }
        with os_errors(self.path):
            self._journal.append([line])
        self._add(job.name, entry)

    def _add(self, name: str, entry: Entry) -> None:
        known = self._entries.setdefault(name, {})
        if any(each.digest != entry.digest for each in known.values()):
            known.clear()
        # to the end, also where the event is not the first of its kind
        known.pop(entry.status, None)
        known[entry.status] = entry

    def _read(self, line: Any) -> tuple[str, Entry]:
        sound = isinstance(line, dict) and isinstance(line.get("job"), str) and line.get("status") in _STATUSES
        numbers = [line.get(key, {}) for key in ("metrics", "facts")] if sound else []
        if (
            not sound
            or not _is_finite(line.get("seconds", 0.0))
            or not all(isinstance(each, dict) and all(map(_is_finite, each.values())) for each in numbers)
        ):
            raise OutputError(f"{quoted(self.path)} holds a line that no batch writes", hint=_HINT)
        error, (metrics, facts) = line.get("error"), numbers
        return line["job"], Entry(
            status=line["status"],
            digest=str(line.get("recipe_sha256")),
            seconds=line.get("seconds"),
            error=None if error is None else str(error),
            metrics=metrics,
            facts=facts,
        )


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
