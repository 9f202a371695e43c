"""The page of a batch: every job and what became of it, and the merges that are there side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from streammerge.reporting.comparison_page import comparison_sections
from streammerge.reporting.facts import MergeFacts
from streammerge.reporting.markup import Child, Html, element, joined, number, seconds, short
from streammerge.reporting.merge_page import size
from streammerge.reporting.page import facts, folded, lines, page, section, table

_MOST_JOBS, _MOST_METRICS = 1000, 6
_LONGEST_ERROR = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """What is known of a job, also when its model is gone.

    status    in a word
    settings  in what its recipe differs from the others'
    merging, evaluating  seconds
    metrics   by `task.metric`
    """

    name: str
    method: str
    status: str
    settings: str = ""
    merging: float | None = None
    evaluating: float | None = None
    written_bytes: float | None = None
    interference: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFacts:
    """What is known of a batch.

    state   where it stands, in a sentence
    metric  by which the best are told from the others, where the batch asks for that; `largest` says which they are
    kept    which models stay, in words; empty where all do
    unread  merges that are there and could not be read, and why
    """

    name: str
    state: str
    jobs: Sequence[JobFacts]
    metric: str = ""
    largest: bool = True
    kept: str = ""
    unread: Sequence[str] = ()


def batch_page(batch: BatchFacts, merges: Sequence[MergeFacts], existing: int) -> str:
    """The page, as HTML. `merges` are compared, of so many `existing`; their labels must differ."""
    return page(
        f"Batch: {short(batch.name)}",
        batch.state,
        _overview(batch),
        _failures(batch),
        _jobs(batch),
        _deleted(batch),
        _compared(batch, merges, existing),
        *(comparison_sections(merges) if merges else ()),
    )


def _overview(batch: BatchFacts) -> Html:
    counts = Counter(job.status for job in batch.jobs)
    told: list[tuple[str, Child]] = [("Jobs", f"{len(batch.jobs):,}")]
    told += [(status.capitalize(), f"{count:,}") for status, count in counts.items()]
    ranked = sorted(
        (job for job in batch.jobs if batch.metric in job.metrics), key=lambda job: job.metrics[batch.metric]
    )
    if ranked:
        best = ranked[-1 if batch.largest else 0]
        told.append((f"Best {short(batch.metric)}", f"{number(best.metrics[batch.metric], 4)}, {short(best.name)}"))
    told.append(("Merging took", seconds(sum(job.merging or 0.0 for job in batch.jobs))))
    if any(job.evaluating is not None for job in batch.jobs):
        told.append(("Evaluating took", seconds(sum(job.evaluating or 0.0 for job in batch.jobs))))
    return section("At a glance", None, facts(told))


def _failures(batch: BatchFacts) -> Html | None:
    failed = [f"{short(job.name)}: {_first_line(job.error)}" for job in batch.jobs if job.error]
    if not failed:
        return None
    whole = [
        folded(short(job.name), element("pre", job.error))
        for job in [job for job in batch.jobs if job.error and "\n" in job.error][:20]
    ]
    note = "What went wrong; the same command, given again, tries these jobs again."
    return section("Failed", note, lines(failed, "warn"), joined(*whole))


def _jobs(batch: BatchFacts) -> Html:
    counts = Counter(metric for job in batch.jobs for metric in job.metrics)
    metrics = [batch.metric] if batch.metric in counts else []
    metrics += [metric for metric, _ in counts.most_common(_MOST_METRICS) if metric not in metrics]
    metrics = metrics[:_MOST_METRICS]
    settings = any(job.settings for job in batch.jobs)
    measured = any(job.interference is not None for job in batch.jobs)
    rows: list[list[Child]] = [
        [
            short(job.name),
            job.status,
            job.method,
            *([short(job.settings)] if settings else []),
            *(number(job.metrics.get(metric), 4) for metric in metrics),
            *([number(job.interference, 2)] if measured else []),
            size(job.written_bytes),
            seconds(job.merging),
            seconds(job.evaluating),
        ]
        for job in batch.jobs[:_MOST_JOBS]
    ]
    head = ["job", "status", "method", *(["settings"] if settings else []), *map(short, metrics)]
    head += [*(["interference"] if measured else []), "size", "merging", "evaluating"]
    notes = ["Metrics are the evaluations'; results.jsonl has every event."]
    if measured:
        notes.append("Interference is the median over the matrices that a covariance method solved.")
    if len(batch.jobs) > _MOST_JOBS:
        notes.append(f"The first {_MOST_JOBS:,} of {len(batch.jobs):,} jobs.")
    if len(counts) > len(metrics):
        notes.append(f"{len(metrics)} of {len(counts)} metrics.")
    return section("Jobs", " ".join(notes), table(head, rows, numeric=4 if settings else 3))


def _deleted(batch: BatchFacts) -> Html | None:
    gone = [job for job in batch.jobs if job.status == "deleted"]
    if not gone:
        return None
    told = [
        f"{short(job.name)}, {short(batch.metric)} {number(job.metrics[batch.metric], 4)}"
        if batch.metric in job.metrics
        else short(job.name)
        for job in gone
    ]
    return section("Deleted", f"Models that were evaluated and are gone. {batch.kept}", lines(told))


def _compared(batch: BatchFacts, merges: Sequence[MergeFacts], existing: int) -> Html | None:
    told = [*batch.unread]
    if existing > len(merges) + len(told):
        which = f"the best by {short(batch.metric)}" if batch.metric else "the last in the batch's order"
        told.append(f"{len(merges)} of {existing:,} models are compared below: {which}.")
    return section("Not compared", None, lines(told)) if told else None


def _first_line(error: str | None) -> str:
    return (error or "").partition("\n")[0][:_LONGEST_ERROR]
