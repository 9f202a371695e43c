"""One streaming pass that only looks: the models' bytes come as for a merge, within the same budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

import torch

from streammerge.budget import available_memory_bytes, format_bytes
from streammerge.checkpoint import Storage
from streammerge.diagnosis.advice import advice
from streammerge.diagnosis.measure import TensorMeasure, is_matrix
from streammerge.diagnosis.result import Diagnosis, Findings
from streammerge.diagnosis.sketch import SKETCH, RowSketches
from streammerge.errors import PlanError
from streammerge.memory import MemoryPlan, fit_memory
from streammerge.outcome import Norms, naming
from streammerge.plan import Plan, make_plan
from streammerge.readahead import ReadAhead
from streammerge.recipe import Expert, Recipe
from streammerge.schedule import Schedule
from streammerge.step import COPY, Step
from streammerge.streamed_deltas import ElementDeltas, StepReader
from streammerge.workspace import Workspace
from streammerge.world import thread_limit

# plans for the bytes alone: any method would do that reads a base and every float tensor
_PROBE = "task_arithmetic"
_UNBOUNDED_BYTES = 1 << 50
# beside the experts' changes: the base, the mean, and temporaries of rounding them
_BLOCK_BUFFERS = 7


def diagnose(
    recipe: Recipe,
    storage: Storage,
    *,
    merged: Sequence[str] = (),
    memory_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Look at the models that a recipe would merge, and at finished merges of them. Writes nothing.

    Raises what planning and reading raise, and PlanError for a recipe without a base.
    """
    if recipe.base is None:
        raise PlanError(
            "a diagnosis is of changes from a base, but the recipe has no `base_model`",
            hint="Add `base_model: DIR` to the recipe.",
        )
    started = time.perf_counter()
    budget = available_memory_bytes() // 2 if memory_bytes is None else memory_bytes
    planned, memory = _planned(recipe, storage, merged, budget)
    with ThreadPoolExecutor(thread_limit(), "streammerge-piece", torch.set_num_threads, (1,)) as workers:
        found, read_bytes = _findings(planned, memory, storage, len(merged), workers, progress)
    experts = planned.names[1 : len(planned.names) - len(merged)]
    return Diagnosis(
        base=planned.names[0],
        experts=experts,
        merged=planned.names[len(planned.names) - len(merged) :],
        tensors=found,
        left_out=len(planned.models[0].tensors) - len(found),
        sketch_columns=SKETCH,
        seed=recipe.seed,
        read_bytes=read_bytes,
        seconds=time.perf_counter() - started,
        budget_bytes=budget,
        advice=advice(found, experts),
    )


def _planned(recipe: Recipe, storage: Storage, merged: Sequence[str], budget: int) -> tuple[Plan, MemoryPlan]:
    """The plan of a merge by elements, less its output; its steps are all that is looked at."""
    models = [*(expert.location for expert in recipe.experts), *merged]
    experts = tuple(Expert(location=location) for location in models)
    probe = replace(recipe, method=_PROBE, parameters={}, rules=(), experts=experts)
    planned = make_plan(probe, storage, memory_bytes=_UNBOUNDED_BYTES)
    looked_at = [step for step in planned.steps if step.method != COPY and not _is_kept(recipe, step.name)]
    if not looked_at:
        raise PlanError("the recipe merges no tensor: all are integers, or kept", hint="Look at its `rules`.")
    steps = tuple(replace(step, block_buffers=len(models) + _BLOCK_BUFFERS) for step in looked_at)
    return replace(planned, steps=steps), _fitted(steps, budget)


def _is_kept(recipe: Recipe, name: str) -> bool:
    rule = recipe.rule_for(name)
    return rule is not None and rule.keep_base


def _fitted(steps: Sequence[Step], budget: int) -> MemoryPlan:
    sketches = max(
        (
            RowSketches.nbytes((step.shape[0], step.shape[1]), len(step.experts), step.compute_bytes)
            for step in steps
            if is_matrix(step)
        ),
        default=0,
    )
    try:
        return fit_memory(steps, budget - sketches)
    except PlanError as error:
        enough = 64 << 20
        while True:
            try:
                fit_memory(steps, enough - sketches)
                break
            except PlanError:
                enough += 32 << 20
        raise PlanError(
            f"a diagnosis of these models needs a budget of {format_bytes(enough)}, more than {format_bytes(budget)}",
            hint=f"Pass `--memory {enough >> 20}MiB` or more.",
        ) from error


def _findings(
    planned: Plan,
    memory: MemoryPlan,
    storage: Storage,
    merged: int,
    workers: Executor,
    progress: Callable[[int, int], None] | None,
) -> tuple[tuple[Findings, ...], int]:
    schedule = Schedule(replace(planned, memory=memory), ())
    ahead = ReadAhead(
        storage, planned.models, schedule.requests(), slots=memory.input_slots, slot_bytes=memory.slot_bytes
    )
    workspace = Workspace(memory.workspace_bytes)
    threads = torch.get_num_threads()
    # pieces of a block go to the workers; what is left must not compete with them
    torch.set_num_threads(1)
    found = []
    try:
        for step in schedule.steps:
            with naming(step):
                measure = TensorMeasure(step, merged=merged, seed=planned.recipe.seed)
                block = schedule.block_elements(step)
                reader = StepReader(ahead, schedule.sources(step), block)
                for number, first in enumerate(range(0, step.elements, block)):
                    taken = [reader.take(number * len(step.models) + model) for model in range(len(step.models))]
                    origin, *moving = (run for run, _ in taken)
                    deltas = ElementDeltas(
                        step, planned.names, origin, moving, first, workspace, Norms(len(step.experts)), workers
                    )
                    measure.add(deltas, workers)
                    workspace.reset()
                    for _, give_back in taken:
                        give_back()
                    if progress:
                        progress(ahead.read_bytes, schedule.read_bytes)
                reader.finish()
                found.append(measure.finish(workers))
    finally:
        torch.set_num_threads(threads)
        ahead.close()
    return tuple(found), ahead.read_bytes
