"""One merge under way: tensor by tensor from the plan to the published folder."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

from streammerge.checkpoint import Storage, changed_files
from streammerge.device_stream import DeviceStream
from streammerge.errors import CheckpointError, listed, quoted
from streammerge.fetching import Fetches
from streammerge.folder import REPORT_NAME, fingerprint_of, side_files
from streammerge.memory_samples import MemorySamples
from streammerge.plan import Plan, weight_files
from streammerge.quantised import quantised
from streammerge.rates import measured, save_rates
from streammerge.readahead import ReadAhead
from streammerge.remembered import Remembered
from streammerge.report import Report, Seconds
from streammerge.stream import Stream
from streammerge.workspace import Workspace
from streammerge.write import Writer

# of less, most of the time goes into what does not grow with the models
_TELLING_BYTES = 256 << 20


class Merging:
    """Carry out a plan step by step. Use as a context manager; leaving it early leaves what can be resumed.

    delete_consumed  delete each file that this merge fetched when all that is made of it is on the disk
    progress   told the bytes read so far and in all, after each block
    workspace  to be shared with other merges, none of which is in the middle of a step on the same thread; None for one
               of its own
    remembered  what merges of the same models leave to each other; None where there is only this one
    threads    for arithmetic; None for all there are
    """

    def __init__(
        self,
        planned: Plan,
        out: str,
        storage: Storage,
        *,
        resume: bool = False,
        delete_consumed: bool = False,
        progress: Callable[[int, int], None] | None = None,
        workspace: Workspace | None = None,
        remembered: Remembered | None = None,
        threads: int | None = None,
    ) -> None:
        self._started = time.perf_counter()
        self._planned, self._out, self._storage = planned, out, storage
        self._resume, self._delete = resume, delete_consumed
        self._progress, self._workspace, self._remembered = progress, workspace, remembered
        self._threads = threads
        self._beside = side_files(planned, storage)
        self._memory = MemorySamples()
        self._writing, self._reading = ExitStack(), ExitStack()

    def __enter__(self) -> Merging:
        planned = self._planned
        with ExitStack() as opened:
            self._writer = opened.enter_context(self._open_writer())
            self._resumed = self._left_out()
            self._fetches = Fetches(planned, self._storage, skip=self._resumed, delete=self._delete)
            self._fetches.check_disk(self._out, 0)
            self._stream = self._engine()
            self._reading.enter_context(self._stream)
            # ends first: the stream's end waits for reading, and reading for what is fetched
            self._reading.enter_context(self._fetches)
            self._writing = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._reading.close()
        finally:
            self._writing.__exit__(kind, error, trace)

    @property
    def identity(self) -> dict[str, Any]:
        """What is merged: an interrupted merge of anything else is not resumed."""
        return {**self._planned.fingerprint(), "side_files": fingerprint_of(self._beside)}

    def _open_writer(self) -> Writer:
        return Writer(self._out, self._planned.layout, self.identity, resume=self._resume)

    def _left_out(self) -> set[str]:
        """Tensors that are not to be merged: an earlier run finished them."""
        return set(self._writer.checksums)

    def _engine(self) -> Stream | DeviceStream:
        if self._planned.device_memory is None:
            return Stream(
                self._planned,
                self._storage,
                skip=self._resumed,
                workspace=self._workspace,
                remembered=self._remembered,
                threads=self._threads,
            )
        return DeviceStream(self._planned, self._storage, skip=self._resumed)

    def steps(self) -> Iterator[str]:
        """Merge: after each step, a tensor or a pool of them, its last tensor's name.

        The workspace is free then, and another thread may take the next step.
        """
        ends = _last_of_steps(self._planned, self._resumed)
        for block in quantised(self._planned, self._stream):
            ended = block.outcome is not None and block.name in ends
            self._writer.write(block)
            self._fetches.finished(self._writer.checksums)
            self._memory.look()
            if self._progress:
                self._progress(self._stream.ahead.read_bytes, self._stream.to_read_bytes)
            if ended:
                yield block.name

    def flush(self) -> None:
        """Return when all that was merged is durable. Nothing can be merged afterwards."""
        started = time.perf_counter()
        self._writer.flush()
        self._memory.take()
        self._fetches.finished(self._writer.checksums)
        self._stream.output_waited_seconds += time.perf_counter() - started

    def publish(self) -> Report:
        """Complete the folder and give it its name, once all tensors were merged.

        Raises CheckpointError where an input changed meanwhile.
        """
        self.flush()
        self._reading.close()
        refuse_changed(self._planned, self._storage, self._writer)
        report = self._report(name for step in self._planned.steps for name, _, _ in step.outputs)
        self._writer.publish({**self._beside, REPORT_NAME: report.to_json().encode()})
        _remember_rates(self._planned, report)
        return report

    def _report(self, names: Iterable[str]) -> Report:
        memory = {"planned": self._planned.memory.peak_bytes, **self._stream.memory_facts()}
        return report_of(
            self._planned,
            names,
            self._out,
            self._stream.ahead,
            self._writer,
            len(self._resumed),
            time.perf_counter() - self._started,
            memory,
            self._stream.output_waited_seconds,
            tuple(self._memory.samples),
        )


def report_of(
    planned: Plan,
    names: Iterable[str],
    out: str,
    ahead: ReadAhead,
    writer: Writer,
    resumed: int,
    wall_seconds: float,
    memory: Mapping[str, int],
    waited_for_output: float = 0.0,
    memory_samples: tuple[tuple[float, int], ...] = (),
) -> Report:
    """What a merge reports of the tensors `names`, once all of them are written."""
    return Report(
        out=out,
        recipe=planned.recipe.to_dict(),
        tensors=tuple(writer.outcomes[name] for name in names),
        checksums=writer.checksums,
        read_bytes=ahead.read_bytes,
        written_bytes=planned.layout.total_bytes,
        resumed_tensors=resumed,
        memory={"budget": planned.memory.budget_bytes, **memory},
        seconds=Seconds(
            wall=wall_seconds,
            waiting_for_input=ahead.waited_seconds,
            waiting_for_output=waited_for_output,
            reading=ahead.busy_seconds,
            writing=writer.busy_seconds,
        ),
        versions=versions(),
        experts=max((len(step.experts) for step in planned.steps), default=1),
        inputs=tuple(
            {"location": location, "files": weight_files(model)}
            for location, model in zip(planned.recipe.locations, planned.models, strict=True)
        ),
        max_shard_bytes=planned.max_shard_bytes,
        device=planned.device,
        memory_samples=memory_samples,
    )


def _last_of_steps(planned: Plan, done: Container[str]) -> set[str]:
    """Of each pool of tensors that are merged together, and of each other tensor, the last that is still to come."""
    last = {step.pool or step.name: step.name for step in planned.steps if step.name not in done}
    return set(last.values())


def refuse_changed(planned: Plan, storage: Storage, writer: Writer) -> None:
    """Publish nothing of files that were written to while they were read: some bytes may be old, some new."""
    changes = [line for model in planned.models for line in changed_files(storage, model)]
    if not changes:
        return
    writer.distrust()
    raise CheckpointError(
        f"inputs changed during the merge:{listed(changes)}",
        hint=f"Nothing was published. Restore the files as they were and pass `--resume`, which merges all again, "
        f"or delete {quoted(writer.partial)} and begin anew.",
    )


def versions() -> dict[str, str]:
    """What this runs on: part of a report."""
    found = {"python": platform.python_version()}
    for package in ("streammerge", "torch", "safetensors"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _remember_rates(planned: Plan, report: Report) -> None:
    seconds = report.seconds
    # a resumed or tiny merge says little about this machine
    if report.resumed_tensors or planned.read_bytes < _TELLING_BYTES:
        return
    by_matrix = {step.name for step in planned.steps if step.by_matrix and not step.thin}
    matrices = sum(outcome.seconds for outcome in report.tensors if outcome.name in by_matrix)
    rates = measured(planned.work, seconds.reading, seconds.writing, seconds.computing, matrices)
    for key in planned.rates_keys:
        save_rates(key, rates)
