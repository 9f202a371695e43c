"""The folders of a batch: which of them are its merges, which are the best, and how the others go."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from streammerge.batching.ledger import Ledger
from streammerge.batching.night import Job, Night
from streammerge.errors import EvaluationError, OutputError, quoted
from streammerge.folder import REPORT_NAME
from streammerge.journal import os_errors
from streammerge.report import parse_report


class Folders:
    """A batch's folders, as they are and as the ledger says they should be."""

    def __init__(self, night: Night, ledger: Ledger) -> None:
        self._night, self._ledger = night, ledger

    def of(self, job: Job) -> Path:
        """Where a job's model goes."""
        return Path(os.path.abspath(self._night.out)) / job.name

    def holds(self, job: Job) -> bool:
        """Whether a job's merge is there, complete. Raises OutputError where something else is."""
        folder = self.of(job)
        if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
            return False
        found = self._recipe_in(folder)
        if found == _unpinned(job.recipe.to_dict()):
            return True
        what = "is no merge" if found is None else "is a merge of another recipe"
        raise OutputError(
            f"{quoted(folder)} {what}", hint=f"Move it away, or give the job {quoted(job.name)} another `name`."
        )

    def is_deleted(self, job: Job) -> bool:
        """Whether a job's merge was deleted, or was about to be."""
        entry = self._ledger.last(job)
        return entry is not None and entry.status == "deleted"

    def losers(self) -> list[Job]:
        """Evaluated merges that are not among the best. Raises EvaluationError where one lacks the metric."""
        keep = self._night.keep
        if keep.best is None:
            return []
        entries = ((job, self._ledger.last(job)) for job in self._night.jobs)
        evaluated = [(job, entry.metrics) for job, entry in entries if entry and entry.status == "evaluated"]
        if keep.best == 0:
            return [job for job, _ in evaluated]
        for job, metrics in evaluated:
            if keep.by not in metrics:
                raise EvaluationError(
                    f"{quoted(job.name)} has no metric {quoted(keep.by)}, but {', '.join(map(quoted, metrics))}",
                    hint="Nothing was deleted. Name one of them in `keep`, and run the batch again.",
                )
        sign = -1.0 if keep.largest else 1.0
        # of equals the earlier job stays
        ranked = sorted(evaluated, key=lambda each: sign * each[1][keep.by])
        return [job for job, _ in ranked[keep.best :]]

    def delete(self, job: Job) -> None:
        """Delete a job's merge, if it is there; its metrics stay in the ledger."""
        entry = self._ledger.last(job)
        if entry is None or entry.status != "deleted":
            self._ledger.note(job, "deleted", metrics=None if entry is None else entry.metrics)
        folder = self.of(job)
        going = folder.with_name(f".{job.name}.deleted")
        with os_errors(folder):
            if self.holds(job):
                # under this name nobody takes what is left of it for a model
                os.rename(folder, going)
            if os.path.lexists(going):
                shutil.rmtree(going)

    @staticmethod
    def _recipe_in(folder: Path) -> object:
        try:
            report = parse_report((folder / REPORT_NAME).read_text(), quoted(folder / REPORT_NAME))
        except (OSError, UnicodeDecodeError, OutputError):
            return None
        return _unpinned(report.get("recipe"))


def _unpinned(recipe: object) -> object:
    """A recipe as JSON has it, models on the hub without the commits that a merge's report adds."""
    return json.loads(re.sub(r'@[0-9a-f]{40}(?=["+])', "", json.dumps(recipe)))
