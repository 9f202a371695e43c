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
    """A job's last event. `metrics` of an evaluated job are by `task.metric`; a deleted one keeps them."""

    status: Status
    digest: str
    seconds: float = 0.0
    error: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


_HINT = "Move it away: merges that are complete are found without it, evaluations are made again."


class Ledger:
    """The results file of a batch's folder, locked: two batches never share a folder. Use as a context manager."""

    def __init__(self, out: str) -> None:
        folder = Path(os.path.abspath(out))
        self.path = folder / RESULTS_NAME
        with os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(self.path, hint=_HINT)
        try:
            self._entries = dict(self._read(line) for line in self._journal.values())
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
        entry = self._entries.get(job.name)
        return entry if entry is not None and entry.digest == job.digest else None

    def note(
        self,
        job: Job,
        status: Status,
        *,
        seconds: float = 0.0,
        error: str | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Write an event; it is durable when this returns."""
        entry = Entry(status=status, digest=job.digest, seconds=seconds, error=error, metrics=metrics or {})
        line = {
            "job": job.name,
            "status": status,
            "recipe_sha256": job.digest,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 3),
            **({"error": error} if error else {}),
            **({"metrics": dict(entry.metrics)} if entry.metrics else {}),
        }
        with os_errors(self.path):
            self._journal.append([line])
        self._entries[job.name] = entry

    def _read(self, line: Any) -> tuple[str, Entry]:
        sound = isinstance(line, dict) and isinstance(line.get("job"), str) and line.get("status") in _STATUSES
        metrics = line.get("metrics", {}) if sound else None
        if not isinstance(metrics, dict) or not all(map(_is_finite, metrics.values())):
            raise OutputError(
                f"{quoted(self.path)} holds a line that no batch writes",
                hint=_HINT,
            )
        digest, error = str(line.get("recipe_sha256")), line.get("error")
        entry = Entry(
            status=line["status"], digest=digest, error=None if error is None else str(error), metrics=metrics
        )
        return line["job"], entry


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
