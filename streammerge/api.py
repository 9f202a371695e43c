"""The whole story in one short function: merge()."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge import devices
from streammerge.budget import parse_bytes
from streammerge.checkpoint import Storage, changed_files
from streammerge.errors import CheckpointError, StreamMergeError, listed, quoted
from streammerge.inspection import Inspection, inspect_models
from streammerge.journal import is_untidied, partial_folder, refuse_taken
from streammerge.plan import Plan, check_disk, make_plan, weight_files
from streammerge.rates import Rates, save_rates
from streammerge.recipe import Recipe
from streammerge.storage.local import LocalStorage

if TYPE_CHECKING:
    from streammerge.capturing import Captured
    from streammerge.device_stream import DeviceStream
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
    max_shard_size: str | int | None = None,
    device: str = "cpu",
    device_memory: str | int | None = None,
    storage: Storage | None = None,
) -> Plan:
    """Decide everything about a merge from headers alone, without loading torch.

    recipe          a path (a YAML file's, or that of a report, whose merge is done again), a dict with the same keys,
                    or a Recipe
    memory          the budget, in bytes or as "4GiB"; by default half of what is available
    max_shard_size  the most data one output file holds, in bytes or as "5GB"; by default 5 GB, or what the report says
    device          "cpu", "cuda" or "cuda:1"
    device_memory   the budget on that device; by default 80 % of what is free there. With it the device
                    itself is not asked for: a plan for another machine

    Raises StreamMergeError for everything that would keep the merge from ending well and that headers show.
    """
    device = devices.canonical(device)
    if device == "cpu" and device_memory is not None:
        raise StreamMergeError(
            "`device_memory` is set for `cpu`, whose memory is `memory`", hint="Set `device: cuda`, or `memory` alone."
        )
    loaded = Recipe.load(recipe)
    if device == "cpu":
        device_bytes = None
    elif device_memory is None:
        devices.refuse_absent(device)
        device_bytes = devices.free_memory_bytes(device)
    else:
        device_bytes = parse_bytes(device_memory)
    return make_plan(
        loaded,
        storage or LocalStorage(),
        memory_bytes=None if memory is None else parse_bytes(memory),
        max_shard_bytes=None if max_shard_size is None else parse_bytes(max_shard_size),
        device=device,
        device_memory_bytes=device_bytes,
    )


def merge(
    recipe: RecipeSource,
    out: str | os.PathLike[str],
    *,
    memory: str | int | None = None,
    max_shard_size: str | int | None = None,
    device: str = "cpu",
    device_memory: str | int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    storage: Storage | None = None,
) -> Report:
    """Merge models into the new folder `out`, inside a memory budget, and say what happened.

    recipe, memory, max_shard_size, device, device_memory  as for `plan`
    resume    continue an interrupted merge of the same recipe and inputs; the bytes are the same
    progress  told the bytes read so far and in all, after each block

    `out` appears complete or not at all; until then `out.partial` holds what is done.
    Raises StreamMergeError, before the first byte is written wherever that is possible.
    """
    storage = storage or LocalStorage()
    planned = plan(
        recipe,
        memory=memory,
        max_shard_size=max_shard_size,
        device=device,
        device_memory=device_memory,
        storage=storage,
    )
    return run(planned, os.fspath(out), storage, resume=resume, progress=progress)


def run(planned: Plan, out: str, storage: Storage, *, resume: bool = False, progress: Progress | None = None) -> Report:
    """Carry out a plan. See `merge`."""
    started = time.perf_counter()
    refuse_taken(out, resume=resume)
    folder = Path(os.path.abspath(out))
    if not (resume and (os.path.lexists(partial_folder(folder)) or is_untidied(folder))):
        check_disk(planned, out)
    devices.refuse_absent(planned.device)
    devices.prepare_torch()
    # torch takes seconds to load, and everything above refuses without it
    from streammerge.folder import REPORT_NAME, fingerprint_of, side_files
    from streammerge.write import Writer

    beside = side_files(planned, storage)
    identity = {**planned.fingerprint(), "side_files": fingerprint_of(beside)}
    with Writer(out, planned.layout, identity, resume=resume) as writer:
        done = set(writer.checksums)
        with _engine(planned)(planned, storage, skip=done) as stream:
            for block in stream:
                writer.write(block)
                if progress:
                    progress(stream.ahead.read_bytes, stream.to_read_bytes)
            flushing = time.perf_counter()
            writer.flush()
            stream.output_waited_seconds += time.perf_counter() - flushing
        _refuse_changed(planned, storage, writer)
        report = _report(planned, out, stream, writer, len(done), time.perf_counter() - started)
        writer.publish({**beside, REPORT_NAME: report.to_json().encode()})
    _remember_rates(planned, report)
    return report


def inspect(*locations: str | os.PathLike[str], storage: Storage | None = None) -> Inspection:
    """What models hold and how they differ from the first, from headers alone."""
    return inspect_models(storage or LocalStorage(), *(os.fspath(location) for location in locations))


def verify(
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    inputs: bool = False,
    recompute: int = 0,
    seed: int = 0,
    memory: str | int | None = None,
    storage: Storage | None = None,
) -> Verification:
    """Check a merged folder in bounded memory: its bytes against its report or, without one, what can be checked.

    base       a model whose names and shapes the folder's must be
    inputs     whether the models that were merged are still those of the report
    recompute  how many tensors to merge again in float64, sampled by `seed`; also checks the inputs. The plan and the
               methods are the merge's own: what is wrong in them does not show
    memory     the budget of that, as for `plan`

    See `streammerge.recompute` for what may differ. Raises CheckpointError for files that are not a sound model,
    OutputError for a report that cannot be read or does not say what is asked of it.
    """
    from streammerge.verification import verify as check

    return check(
        os.fspath(out),
        storage or LocalStorage(),
        base=None if base is None else os.fspath(base),
        inputs=inputs,
        recompute=recompute,
        seed=seed,
        memory_bytes=None if memory is None else parse_bytes(memory),
    )


def capture(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    memory: str | int | None = None,
    max_tokens: int = 512,
    samples: int | None = None,
    batch_size: int = 8,
    fisher: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    storage: Storage | None = None,
) -> Captured:
    """Run a model over a JSON Lines file and store what `regmean` and `fisher` need of it in the new folder `out`.

    See `streammerge.capturing.capture`, which says what the tensors are. Needs transformers.
    """
    # torch takes seconds to load, and this refuses without it
    refuse_taken(os.fspath(out), resume=resume)
    devices.prepare_torch()
    from streammerge.capturing import capture as run_capture

    return run_capture(
        os.fspath(model),
        os.fspath(data),
        os.fspath(out),
        storage or LocalStorage(),
        memory_bytes=None if memory is None else parse_bytes(memory),
        max_tokens=max_tokens,
        samples=samples,
        batch_size=batch_size,
        fisher=fisher,
        resume=resume,
        progress=progress,
    )


def _engine(planned: Plan) -> type[Stream] | type[DeviceStream]:
    if planned.device_memory is None:
        from streammerge.stream import Stream

        return Stream
    from streammerge.device_stream import DeviceStream

    return DeviceStream


def _refuse_changed(planned: Plan, storage: Storage, writer: Writer) -> None:
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


def _report(
    planned: Plan, out: str, stream: Stream | DeviceStream, writer: Writer, resumed: int, wall_seconds: float
) -> Report:
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
            **stream.memory_facts(),
        },
        seconds=Seconds(
            wall=wall_seconds,
            waiting_for_input=stream.ahead.waited_seconds,
            waiting_for_output=stream.output_waited_seconds,
            reading=stream.ahead.busy_seconds,
            writing=writer.busy_seconds,
        ),
        versions=_versions(),
        experts=len(planned.recipe.experts),
        inputs=tuple({"location": model.location, "files": weight_files(model)} for model in planned.models),
        max_shard_bytes=planned.max_shard_bytes,
        device=planned.device,
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
        planned.rates_key,
        Rates(
            report.read_bytes / max(seconds.reading, 1e-9),
            report.written_bytes / max(seconds.writing, 1e-9),
            planned.flops / max(seconds.computing, 1e-9),
        ),
    )
