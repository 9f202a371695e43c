"""The whole story in one short function: merge()."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.budget import parse_bytes
from streammerge.checkpoint import Storage
from streammerge.errors import StreamMergeError, quoted
from streammerge.inspection import Inspection, inspect_models
from streammerge.journal import partial_folder, refuse_taken
from streammerge.plan import DEFAULT_SHARD_BYTES, Plan, check_disk, make_plan
from streammerge.rates import Rates, save_rates
from streammerge.recipe import Recipe
from streammerge.storage.local import LocalStorage

if TYPE_CHECKING:
    from streammerge.report import Report
    from streammerge.stream import Stream
    from streammerge.verification import Verification
    from streammerge.write import Writer

RecipeSource = str | os.PathLike[str] | Mapping[str, object] | Recipe
Progress = Callable[[int, int], None]
"""Called with bytes read so far and bytes to read in all."""


def plan(
    recipe: RecipeSource,
    *,
    memory: str | int | None = None,
    max_shard_size: str | int = DEFAULT_SHARD_BYTES,
    storage: Storage | None = None,
) -> Plan:
    """Decide everything about a merge from headers alone, without loading torch.

    recipe          a YAML file's path, a dict with the same keys, or a Recipe
    memory          the budget, in bytes or as "4GiB"; by default half of what is available
    max_shard_size  the most data one output file holds, in bytes or as "5GB"

    Raises StreamMergeError for everything that would keep the merge from ending well and that headers show.
    """
    return make_plan(
        Recipe.load(recipe),
        storage or LocalStorage(),
        memory_bytes=None if memory is None else parse_bytes(memory),
        max_shard_bytes=parse_bytes(max_shard_size),
    )


def merge(
    recipe: RecipeSource,
    out: str | os.PathLike[str],
    *,
    memory: str | int | None = None,
    max_shard_size: str | int = DEFAULT_SHARD_BYTES,
    device: str = "cpu",
    resume: bool = False,
    progress: Progress | None = None,
    storage: Storage | None = None,
) -> Report:
    """Merge models into the new folder `out`, inside a memory budget, and say what happened.

    recipe, memory, max_shard_size  as for `plan`
    resume    continue an interrupted merge of the same recipe and inputs; the bytes are the same
    progress  told the bytes read so far and in all, after each block

    `out` appears complete or not at all; until then `out.partial` holds what is done.
    Raises StreamMergeError, before the first byte is written wherever that is possible.
    """
    refuse_device(device)
    storage = storage or LocalStorage()
    planned = plan(recipe, memory=memory, max_shard_size=max_shard_size, storage=storage)
    return run(planned, os.fspath(out), storage, resume=resume, progress=progress)


def run(planned: Plan, out: str, storage: Storage, *, resume: bool = False, progress: Progress | None = None) -> Report:
    """Carry out a plan. See `merge`."""
    started = time.perf_counter()
    refuse_taken(out, resume=resume)
    if not (resume and partial_folder(Path(os.path.abspath(out))).exists()):
        check_disk(planned, out)
    _let_threads_sleep()
    # torch takes seconds to load, and everything above refuses without it
    from streammerge.folder import REPORT_NAME, side_files
    from streammerge.stream import Stream
    from streammerge.write import Writer

    beside = side_files(planned, storage)
    with Writer(out, planned.layout, planned.fingerprint(), resume=resume) as writer:
        done = set(writer.checksums)
        with Stream(planned, storage, skip=done) as stream:
            for block in stream:
                writer.write(block)
                if progress:
                    progress(stream.ahead.read_bytes, stream.to_read_bytes)
            flushing = time.perf_counter()
            writer.flush()
            stream.output_waited_seconds += time.perf_counter() - flushing
        report = _report(planned, out, stream, writer, len(done), time.perf_counter() - started)
        writer.publish({**beside, REPORT_NAME: report.to_json().encode()})
    _remember_rates(planned, report)
    return report


def inspect(*locations: str | os.PathLike[str], storage: Storage | None = None) -> Inspection:
    """What models hold and how they differ from the first, from headers alone."""
    return inspect_models(storage or LocalStorage(), *(os.fspath(location) for location in locations))


def verify(out: str | os.PathLike[str], *, storage: Storage | None = None) -> Verification:
    """Check a merged folder's bytes against its report, in bounded memory."""
    from streammerge.verification import verify as check

    return check(os.fspath(out), storage or LocalStorage())


def refuse_device(device: str) -> None:
    """Raise StreamMergeError for a device that this version does not merge on."""
    if device != "cpu":
        raise StreamMergeError(
            f"{quoted(device)} is not a device to merge on: found {quoted(device)}, expected `cpu`",
            hint="This version merges on the CPU.",
        )


def _let_threads_sleep() -> None:
    # OpenMP's threads spin while they wait, on cores that reading, writing or other programs need: on busy
    # cores a merge takes many times as long. Read once, as torch is loaded
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _report(planned: Plan, out: str, stream: Stream, writer: Writer, resumed: int, wall_seconds: float) -> Report:
    from streammerge.report import Report, Seconds

    return Report(
        out=out,
        recipe=planned.recipe.to_dict(),
        tensors=tuple(writer.outcomes[step.name] for step in planned.steps),
        checksums=writer.checksums,
        read_bytes=stream.ahead.read_bytes,
        written_bytes=planned.layout.total_bytes,
        resumed_tensors=resumed,
        memory={
            "budget": planned.memory.budget_bytes,
            "planned": planned.memory.peak_bytes,
            "workspace_planned": planned.memory.workspace_bytes,
            "workspace_used": stream.workspace.peak_bytes,
            "workspace_overdraft": stream.workspace.overdraft_bytes,
        },
        seconds=Seconds(
            wall=wall_seconds,
            waiting_for_input=stream.ahead.waited_seconds,
            waiting_for_output=stream.output_waited_seconds,
            reading=stream.ahead.busy_seconds,
            writing=writer.busy_seconds,
        ),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("streammerge", "torch", "safetensors"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _remember_rates(planned: Plan, report: Report) -> None:
    seconds = report.seconds
    # a resumed or tiny merge says little about this machine
    if report.resumed_tensors or seconds.wall < 2:
        return
    save_rates(
        planned.kind,
        Rates(
            report.read_bytes / max(seconds.reading, 1e-9),
            report.written_bytes / max(seconds.writing, 1e-9),
            planned.flops / max(seconds.computing, 1e-9),
        ),
    )
