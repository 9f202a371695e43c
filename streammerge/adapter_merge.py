"""Merge adapters of one base into an adapter: their factors alone are read, and factors are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streammerge import methods
from streammerge.adapter_folder import Target, adapter_config, adapter_layout
from streammerge.adapters import CONFIG_NAME, LowRank, expert_factors, module_of, same_folder
from streammerge.budget import format_bytes
from streammerge.checkpoint import Storage, TensorEntry
from streammerge.derived import DerivedEntry
from streammerge.errors import PlanError, RecipeError, quoted
from streammerge.layout import Layout
from streammerge.memory import MATRIX_RESERVE_BYTES, RESERVE_BYTES
from streammerge.outcome import Tally
from streammerge.plan import Plan
from streammerge.readahead import ReadAhead, cut
from streammerge.solve.cost_thin import factors_bytes, has_thin_form
from streammerge.solve.thin import Factors, shortened
from streammerge.step import COPY, Step
from streammerge.stream import threads_for
from streammerge.thin_steps import factors_of, merge_thin
from streammerge.torch_dtypes import TORCH_DTYPES
from streammerge.write import Writer

_SLOT_BYTES, _SLOTS = 1 << 20, 8


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What becomes of each adapted tensor: its step, and the module that is written."""

    plan: Plan
    steps: tuple[Step, ...]
    targets: tuple[Target, ...]
    layout: Layout
    config: bytes

    @property
    def read_bytes(self) -> int:
        """Bytes of all factors."""
        return sum(entry.nbytes for step in self.steps for entry in step.factors)

    @property
    def needed_bytes(self) -> int:
        """What the largest step takes, and what every merge does."""
        largest = max(factors_bytes(step.shape, _ranks(step)) for step in self.steps)
        return RESERVE_BYTES + MATRIX_RESERVE_BYTES + _SLOTS * _SLOT_BYTES + largest


def plan_adapter(plan: Plan, rank: int | None) -> AdapterPlan:
    """Decide what is written. `rank` is the most that a module's change keeps; all of it when None.

    Raises PlanError where an expert is more than low-rank changes of the recipe's base, for methods without a form
    for factors, and for a budget too small for the largest step.
    """
    if plan.recipe.base is None:
        raise PlanError("an adapter is a change of a base, and the recipe has none", hint="Add `base_model`.")
    for key in ("slices", "quantize"):
        if getattr(plan.recipe, key):
            raise PlanError(
                f"`{key}` makes a model of other tensors than the base's, and an adapter changes the base's own",
                hint=f"Leave out `{key}`, or `--as-adapter`.",
            )
    base = plan.models[0]
    experts = range(1, 1 + len(plan.recipe.experts))
    full, found = [], []
    for step in plan.steps:
        entry = base.tensors[step.name]
        entries = [plan.models[number].tensors[step.name] for number in experts]
        factors = expert_factors(entries, entry)
        if factors is None or not all(same_folder(plan.models[number], base) for number in experts):
            full.append(step.name)
        elif any(factors) and step.method != COPY:
            # as if the base were read, which it is not: its shape is all that is asked of it
            found.append(replace(step, base=entry, models=(0, *experts), experts=tuple(entries), thin=True))
    if full:
        raise PlanError(
            f"{len(full)} tensor(s) such as {quoted(full[0])} are changed by more than a low-rank product of "
            f"{quoted(plan.recipe.base)}: as an adapter only adapters of that base can be merged",
            hint="Leave out `--as-adapter`; `streammerge extract` makes an adapter of a full model.",
        )
    for step in found:
        method = methods.describe(step.method)
        if method.thin_path is None or step.pool or not has_thin_form(step.arguments):
            able = [name for name in methods.names() if methods.describe(name).thin_path]
            raise PlanError(
                f"{quoted(step.name)} by {quoted(step.method)}, as it is set, does not come out as factors",
                hint=f"With their usual settings these do: {', '.join(able)}.",
            )
        shape = (step.shape[0], step.shape[1])
        if refused := method.thin_complaint(shape, len(step.experts), step.arguments):
            where = plan.recipe.place_of(method, str(refused.parameter), plan.recipe.rule_for(step.name))
            raise RecipeError(f"{where}{quoted(step.name)}: {refused.message}", hint=refused.hint)
    if not found:
        raise PlanError("no adapter changes anything", hint="Look at the rules: do they keep the base everywhere?")
    dtype = plan.recipe.output_dtype or "F32"
    steps = tuple(replace(step, dtype=dtype) for step in found)
    targets = tuple(_target(step, rank) for step in steps)
    told = [beside.config for number in experts for beside in plan.models[number].besides]
    task = next((each["task_type"] for each in told if isinstance(each.get("task_type"), str)), None)
    fan = any(_low_rank(step)[1].transposed and not t.embedding for step, t in zip(steps, targets, strict=True))
    planned = AdapterPlan(
        plan,
        steps,
        targets,
        adapter_layout(targets, dtype, ()),
        adapter_config(targets, plan.recipe.base, task_type=task, fan_in_fan_out=fan),
    )
    if planned.needed_bytes > plan.memory.budget_bytes:
        raise PlanError(
            f"the largest step needs {format_bytes(planned.needed_bytes)}, more than the budget of "
            f"{format_bytes(plan.memory.budget_bytes)}",
            hint="Pass a larger `--memory`.",
        )
    return planned


def merge_adapter(
    planned: AdapterPlan, ahead: ReadAhead, writer: Writer, progress: Callable[[int, int], None] | None = None
) -> None:
    """Merge every tensor that the writer has not, and hand it over."""
    threads = torch.get_num_threads()
    try:
        for step, target in left_to_do(planned, writer):
            torch.set_num_threads(threads_for(step))
            tally = Tally(step)
            merged = merge_thin(step, planned.plan.names, _taking(ahead), tally)
            if _low_rank(step)[1].transposed != step.role.transposed:
                merged = Factors(merged.right.mT, merged.left.mT)
            short, error = shortened(merged, target.rank)
            facts = {**tally.outcome.facts, "rank": target.rank, "truncation_error": error}
            for block in target.blocks(short, step.dtype, step.method, facts, skip=set(writer.checksums)):
                writer.write(block)
            if progress:
                progress(ahead.read_bytes, planned.read_bytes)
    finally:
        torch.set_num_threads(threads)


def left_to_do(planned: AdapterPlan, writer: Writer) -> Iterator[tuple[Step, Target]]:
    """Steps of which some factor is not written yet."""
    for step, target in zip(planned.steps, planned.targets, strict=True):
        if not set(target.keys) <= writer.checksums.keys():
            yield step, target


def reading(planned: AdapterPlan, storage: Storage, steps: Sequence[Step]) -> ReadAhead:
    """Read the factors of these steps ahead."""
    requests = (
        request
        for step in steps
        for model, entry in factors_of(step)
        for request in cut(model, entry, _elements(entry), last=True)
    )
    return ReadAhead(storage, planned.plan.models, requests, slots=_SLOTS, slot_bytes=_SLOT_BYTES)


def identity(planned: AdapterPlan) -> dict[str, object]:
    """What must not change between an interrupted merge and its resumption."""
    return {**planned.plan.fingerprint(), "shards": {}, "adapter": planned.config.decode(), "file": CONFIG_NAME}


def _taking(ahead: ReadAhead) -> Callable[[int, TensorEntry], Tensor]:
    def take(model: int, entry: TensorEntry) -> Tensor:
        runs = []
        for request in cut(model, entry, _elements(entry), last=True):
            slot = ahead.take()
            assert slot.request == request, f"read-ahead gave {slot.request}, the step wants {request}"
            runs.append(slot.data.clone())
            ahead.give_back(slot)
        return torch.cat(runs).view(TORCH_DTYPES[entry.dtype])

    return take


def _elements(entry: TensorEntry) -> int:
    return _SLOT_BYTES // TORCH_DTYPES[entry.dtype].itemsize


def _low_rank(step: Step) -> tuple[DerivedEntry, LowRank]:
    """The first expert that changed the tensor."""
    for entry in step.experts:
        if isinstance(entry, DerivedEntry) and isinstance(entry.derivation, LowRank):
            return entry, entry.derivation
    raise AssertionError(f"no expert changed {step.name}")


def _ranks(step: Step) -> list[int]:
    return [entry.parts[1].shape[0] for entry in step.experts if isinstance(entry, DerivedEntry)]


def _target(step: Step, rank: int | None) -> Target:
    entry, derivation = _low_rank(step)
    module, embedding = module_of(entry)
    out, into = reversed(step.shape) if derivation.transposed else step.shape
    total = sum(_ranks(step))
    most = min(total if rank is None else min(rank, total), out, into)
    return Target(module=module, out=out, into=into, rank=most, embedding=embedding)
