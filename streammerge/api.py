"""The whole story in one short function: merge()."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge import devices
from streammerge.budget import available_memory_bytes, parse_bytes
from streammerge.checkpoint import Storage
from streammerge.errors import StreamMergeError, quoted
from streammerge.fetching import Fetches, pinned
from streammerge.inspection import Inspection, inspect_models
from streammerge.journal import refuse_taken, refuse_unready
from streammerge.plan import Plan, check_disk, make_plan
from streammerge.recipe import Recipe
from streammerge.storage.local import LocalStorage
from streammerge.storage.places import Fetching, Places
from streammerge.world import World

if TYPE_CHECKING:
    from streammerge.batching import Night, Outcome, Outline, Planner
    from streammerge.capturing import Captured
    from streammerge.diagnosis.result import Diagnosis
    from streammerge.extraction import Extraction
    from streammerge.report import Report
    from streammerge.verification import Verification

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
    device = devices.canonical(World.here().device(device))
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
    storage = storage or Places()
    planned = make_plan(
        pinned(loaded, storage),
        storage,
        memory_bytes=None if memory is None else parse_bytes(memory),
        max_shard_bytes=None if max_shard_size is None else parse_bytes(max_shard_size),
        device=device,
        device_memory_bytes=device_bytes,
    )
    from streammerge.folder import side_files

    # a tokenizer or a template that is not there is refused now, not when the merge begins
    side_files(planned, storage)
    return planned


def merge(
    recipe: RecipeSource,
    out: str | os.PathLike[str],
    *,
    memory: str | int | None = None,
    max_shard_size: str | int | None = None,
    device: str = "cpu",
    device_memory: str | int | None = None,
    as_adapter: bool = False,
    rank: int | None = None,
    resume: bool = False,
    delete_consumed: bool = False,
    progress: Progress | None = None,
    storage: Storage | None = None,
) -> Report:
    """Merge models into the new folder `out`, inside a memory budget, and say what happened.

    recipe, memory, max_shard_size, device, device_memory  as for `plan`
    as_adapter  write an adapter of the recipe's base, where all experts are such adapters
    rank      the most that each of its modules has; by default what all experts have together
    resume    continue an interrupted merge of the same recipe and inputs; the bytes are the same
    delete_consumed  delete each file that this merge fetched when all that is made of it is on the disk; never another
    progress  told the bytes read so far and in all, after each block

    `out` appears complete or not at all; until then `out.partial` holds what is done.
    Of several processes, as `torchrun` or `accelerate launch` starts them, each merges a share: all call this alike,
    and it returns when `out` is there, in the first with the whole report. `memory` is each one's, and `device="cuda"`
    gives each its own GPU.
    Raises StreamMergeError, before the first byte is written wherever that is possible.
    """
    storage = storage or Places()
    planned = plan(
        recipe,
        memory=memory,
        max_shard_size=max_shard_size,
        device=device,
        device_memory=device_memory,
        storage=storage,
    )
    if as_adapter:
        return run_as_adapter(planned, os.fspath(out), storage, rank=rank, resume=resume, progress=progress)
    if rank is not None:
        raise StreamMergeError("`rank` is an adapter's", hint="Set `as_adapter`, or leave it out.")
    return run(planned, os.fspath(out), storage, resume=resume, delete_consumed=delete_consumed, progress=progress)


def run(
    planned: Plan,
    out: str,
    storage: Storage,
    *,
    resume: bool = False,
    delete_consumed: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Carry out a plan. See `merge`."""
    world = World.here()
    if not world.is_alone:
        return _run_as_one_of(
            world, planned, out, storage, resume=resume, delete_consumed=delete_consumed, progress=progress
        )
    from streammerge.merging import Merging

    refuse_unready(planned, out, resume=resume)
    if not resume:
        Fetches(planned, storage, delete=delete_consumed).check_disk(out, planned.layout.total_bytes)
    devices.prepare_torch()
    # torch takes seconds to load, and everything above refuses without it
    with Merging(planned, out, storage, resume=resume, delete_consumed=delete_consumed, progress=progress) as merging:
        for _ in merging.steps():
            pass
        return merging.publish()


def _run_as_one_of(
    world: World,
    planned: Plan,
    out: str,
    storage: Storage,
    *,
    resume: bool,
    delete_consumed: bool,
    progress: Progress | None,
) -> Report:
    if delete_consumed:
        raise StreamMergeError(
            "`delete_consumed` is for one process: another may still need what one has read",
            hint="Leave it out, or merge in one process.",
        )
    if world.is_first:
        refuse_unready(planned, out, resume=resume)
        if not resume:
            Fetches(planned, storage).check_disk(out, planned.layout.total_bytes)
    else:
        devices.refuse_absent(planned.device)
    devices.prepare_torch()
    # torch takes seconds to load, and everything above refuses without it
    from streammerge.ranks.run import merge_as_one_of

    return merge_as_one_of(planned, out, storage, world, resume=resume, progress=progress)


def run_as_adapter(
    planned: Plan,
    out: str,
    storage: Storage,
    *,
    rank: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Carry out a plan on the factors of its experts. See `merge`."""
    started = time.perf_counter()
    if not World.here().is_alone:
        raise StreamMergeError("an adapter is written by one process", hint="Start it without a launcher.")
    if rank is not None and rank < 1:
        raise StreamMergeError(f"the rank is {rank}, expected 1 or more")
    refuse_taken(out, resume=resume)
    devices.prepare_torch()
    # torch takes seconds to load
    from streammerge import adapter_merge
    from streammerge.adapters import CONFIG_NAME
    from streammerge.card import model_card
    from streammerge.folder import REPORT_NAME
    from streammerge.licences import CARD_NAME
    from streammerge.merging import refuse_changed, report_of
    from streammerge.write import Writer

    adapter = adapter_merge.plan_adapter(planned, rank)
    written = replace(planned, layout=adapter.layout)
    check_disk(written, out)
    with Writer(out, adapter.layout, adapter_merge.identity(adapter), resume=resume) as writer:
        done = len(writer.checksums)
        steps = [step for step, _ in adapter_merge.left_to_do(adapter, writer)]
        with closing(adapter_merge.reading(adapter, storage, steps)) as ahead:
            adapter_merge.merge_adapter(adapter, ahead, writer, progress)
            writer.flush()
        refuse_changed(planned, storage, writer)
        memory, wall = {"planned": adapter.needed_bytes}, time.perf_counter() - started
        report = report_of(written, written.layout.placements, out, ahead, writer, done, wall, memory)
        beside = {CONFIG_NAME: adapter.config, CARD_NAME: model_card(planned, "peft").encode()}
        writer.publish({**beside, REPORT_NAME: report.to_json().encode()})
    return report


def inspect(*locations: str | os.PathLike[str], storage: Storage | None = None) -> Inspection:
    """What models hold and how they differ from the first, from headers alone."""
    return inspect_models(storage or Places(), *(os.fspath(location) for location in locations))


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
        storage or Places(),
        base=None if base is None else os.fspath(base),
        inputs=inputs,
        recompute=recompute,
        seed=seed,
        memory_bytes=None if memory is None else parse_bytes(memory),
    )


def evaluate(out: str | os.PathLike[str], asked: Mapping[str, object]) -> dict[str, dict[str, float]]:
    """Evaluate a model folder, write `results.json` into it, and return the numbers by task and metric.

    asked  what a batch file's `evaluate` says: `tasks` and more for the lm-evaluation-harness, or a `command`; entries
           that are None do not count

    See `streammerge.evaluation`. Raises RecipeError for what cannot be asked, EvaluationError where a harness fails.
    """
    from streammerge.evaluation import evaluate as evaluated
    from streammerge.evaluation import read_evaluation
    from streammerge.located_yaml import wrap

    given = {key: value for key, value in asked.items() if value is not None}
    folder = Path(os.path.abspath(out))
    if not folder.is_dir():
        raise StreamMergeError(f"{quoted(out)} is no folder", hint="Name the folder of a merged model.")
    return {
        task: dict(metrics) for task, metrics in evaluated(folder, read_evaluation(wrap(given, "evaluate"))).items()
    }


def batch(
    night: str | os.PathLike[str],
    *,
    memory: str | int | None = None,
    device: str = "cpu",
    device_memory: str | int | None = None,
    delete_consumed: bool = False,
    tell: Callable[[str, str], None] = lambda name, text: None,
    stopped: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
    storage: Storage | None = None,
) -> Outcome:
    """Run a batch file's merges in one process, and of them what is left when it is called again.

    memory    the budget of all that runs at the same time, as for `plan`; overrules the file's
    device, device_memory  as for `plan`; on an accelerator jobs run one by one
    delete_consumed  delete each file that this run fetched when no job of it needs it any more
    tell      told in words what became of a job, by its name, or why `report.html` could not be written, by its own
    stopped   asked after each tensor; once it says so all is left as it is, to be resumed
    progress  told the bytes read so far and in all, by the merges under way

    See `streammerge.batching`. Raises RecipeError for a file that cannot be read; jobs that fail are in the outcome.
    """
    from streammerge.batching import read_night, run_night

    read, storage = read_night(night), storage or Places()
    planner = _planner(read, memory, device, device_memory, storage)
    return run_night(
        read,
        planner,
        storage,
        delete_consumed=delete_consumed,
        tell=tell,
        stopped=stopped,
        progress=progress,
    )


def outline(
    night: str | os.PathLike[str],
    *,
    memory: str | int | None = None,
    device: str = "cpu",
    device_memory: str | int | None = None,
    storage: Storage | None = None,
) -> Outline:
    """What `batch` would do, from headers alone: which jobs run together, what that takes, why others cannot run."""
    from streammerge.batching import outline as outlined
    from streammerge.batching import read_night

    read, storage = read_night(night), storage or Places()
    return outlined(read, _planner(read, memory, device, device_memory, storage), storage)


def _planner(
    night: Night, memory: str | int | None, device: str, device_memory: str | int | None, storage: Storage
) -> Planner:
    from streammerge.batching import Planner

    chosen = night.memory if memory is None else memory
    return Planner(
        budget_bytes=available_memory_bytes() // 2 if chosen is None else parse_bytes(chosen),
        plan=lambda recipe, budget: plan(
            recipe, memory=budget, device=device, device_memory=device_memory, storage=storage
        ),
    )


def diagnose(
    recipe: RecipeSource,
    *,
    merged: Sequence[str | os.PathLike[str]] = (),
    memory: str | int | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    storage: Storage | None = None,
) -> Diagnosis:
    """Say where the experts of a recipe will conflict, in one pass over their weights, inside a memory budget.

    recipe, memory  as for `plan`; the recipe needs a base, and its method makes no difference
    merged          folders of finished merges of the same models, whose interference is measured too
    out             a folder for `diagnosis.json` and `diagnosis.html`

    No model is written. Raises StreamMergeError for what planning and reading refuse.
    """
    devices.prepare_torch()
    from streammerge.diagnosis.run import diagnose as look

    found = look(
        Recipe.load(recipe),
        storage or Places(),
        merged=tuple(os.fspath(folder) for folder in merged),
        memory_bytes=None if memory is None else parse_bytes(memory),
        progress=progress,
    )
    if out is not None:
        from streammerge.reporting.diagnosis_page import diagnosis_page
        from streammerge.reporting.write import write_pages

        write_pages(out, {"diagnosis.json": found.to_json(), "diagnosis.html": diagnosis_page(found)})
    return found


def report(*outs: str | os.PathLike[str], page: str | os.PathLike[str]) -> str:
    """Write a page about a merged folder, or one that compares several, to the file `page`, which is returned.

    It opens without a network and holds no script. Raises OutputError for a folder without a sound `streammerge.json`,
    for `results*.json` that are not what `streammerge.reporting.facts` describes, and where `page` cannot be written.
    """
    from streammerge.reporting.write import report_page, write_page

    write_page(report_page(outs), page)
    return os.fspath(page)


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
    storage: Fetching | None = None,
) -> Captured:
    """Run a model over a JSON Lines file and store what `regmean` and `fisher` need of it in the new folder `out`.

    A model on the hub is fetched into its cache first. See `streammerge.capturing.capture`, which says what the tensors
    are. Needs transformers.
    """
    # torch takes seconds to load, and this refuses without it
    refuse_taken(os.fspath(out), resume=resume)
    folder = (storage or Places()).downloaded(os.fspath(model))
    devices.prepare_torch()
    from streammerge.capturing import capture as run_capture

    return run_capture(
        folder,
        os.fspath(data),
        os.fspath(out),
        LocalStorage(),
        memory_bytes=None if memory is None else parse_bytes(memory),
        max_tokens=max_tokens,
        samples=samples,
        batch_size=batch_size,
        fisher=fisher,
        resume=resume,
        progress=progress,
    )


def extract(
    expert: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int,
    memory: str | int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    storage: Storage | None = None,
) -> Extraction:
    """Write what an expert changed of its base as a LoRA adapter in PEFT's format, in the new folder `out`.

    rank      of each linear layer's change: the nearest of that rank, and how far that is, is told for each
    resume    continue an interrupted extraction of the same inputs

    What changed beside the linear layers (embeddings, norms, biases) is kept whole. Raises StreamMergeError for models
    that do not fit together, and where something changed that an adapter cannot hold.
    """
    if rank < 1:
        raise StreamMergeError(f"the rank is {rank}, expected 1 or more")
    # torch takes seconds to load, and this refuses without it
    refuse_taken(os.fspath(out), resume=resume)
    devices.prepare_torch()
    from streammerge.extraction import extract as run_extract

    return run_extract(
        os.fspath(expert),
        os.fspath(base),
        os.fspath(out),
        storage or Places(),
        rank=rank,
        memory_bytes=None if memory is None else parse_bytes(memory),
        resume=resume,
        progress=progress,
    )
