"""Recipe and headers to Plan: every step, its bytes, arithmetic and memory, before torch is loaded."""

from __future__ import annotations

import hashlib
import math
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from streammerge import methods
from streammerge.adapters import expert_factors, same_folder
from streammerge.alike import made_alike
from streammerge.budget import available_memory_bytes, format_bytes
from streammerge.checkpoint import DTYPE_BYTES, INTEGER_DTYPES, Checkpoint, Storage, TensorEntry
from streammerge.compare import differences
from streammerge.device_memory import DeviceMemoryPlan, fit_device_memory, step_device_bytes
from streammerge.errors import PlanError, RecipeError, escaped, listed, quoted
from streammerge.key_maps import map_names, without_dispensable
from streammerge.layout import Layout, lay_out
from streammerge.licences import Licence, licence_warnings, licences_of
from streammerge.memory import MemoryPlan, fit_memory, step_workspace_bytes
from streammerge.mixtures import in_layout_of
from streammerge.models import open_model
from streammerge.owners import roles_from_model
from streammerge.pools import input_of
from streammerge.rates import Work, load_rates
from streammerge.recipe import Recipe, Rule
from streammerge.recipe_files import Past
from streammerge.rules import Role, TensorClass, role_by_name, roles
from streammerge.stacked_config import config_warnings
from streammerge.stacking import Inputs, stacked_layers, stacking_warnings, whole_models
from streammerge.step import COPY, Step, as_stored, stacked
from streammerge.vocabulary import VOCABULARIES_HINT, Vocabulary, differ_by_vocabulary, united
from streammerge.work import work_of
from streammerge.world import World

FALLBACK = "linear"
DEFAULT_SHARD_BYTES = 5_000_000_000
_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that will happen, in order.

    models  the base, if the recipe names one, then the experts, then what lies beside them
    names   what messages call them
    vocabulary  the output's, where that is not what all models have
    licences    what the cards of the merged models say of theirs
    device, device_memory  where the arithmetic runs; None where that is in host memory, as part of `memory`
    """

    recipe: Recipe
    models: tuple[Checkpoint, ...]
    names: tuple[str, ...]
    steps: tuple[Step, ...]
    layout: Layout
    memory: MemoryPlan
    warnings: tuple[str, ...]
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    device: str = "cpu"
    device_memory: DeviceMemoryPlan | None = None
    vocabulary: Vocabulary | None = None
    licences: tuple[Licence, ...] = ()

    @property
    def read_bytes(self) -> int:
        """Bytes to read, each once."""
        return sum(step.read_bytes for step in self.steps)

    @property
    def flops(self) -> int:
        """Arithmetic of all steps."""
        return sum(step.flops for step in self.steps)

    def workspace_bytes(self, step: Step) -> int:
        """What a step takes beside the slots: of host memory, or of the device's."""
        if self.device_memory:
            return step_device_bytes(step, self.memory.slot_bytes)
        return step_workspace_bytes(step, self.memory.slot_bytes)

    @property
    def work(self) -> Work:
        """What its time depends on."""
        return work_of(self.steps, self.memory, self.layout.total_bytes, resident=self.device_memory is not None)

    @property
    def rates_keys(self) -> tuple[str, str]:
        """Which earlier merges tell how fast this one goes, on its device: by its method, or as its method streams."""
        kind = "matrix" if methods.describe(self.recipe.method).streams_by == "matrix" else "element"
        device = f" on {self.device}" if self.device_memory else ""
        return f"{self.recipe.method}{device}", f"{kind}{device}"

    @property
    def predicted_seconds(self) -> float | None:
        """Wall time at the rates of earlier merges on this machine; None before the first."""
        rates = load_rates(*self.rates_keys)
        return rates.seconds(self.work) if rates else None

    def fingerprint(self) -> dict[str, Any]:
        """What must not change between an interrupted merge and its resumption."""
        return {
            "recipe": self.recipe.to_dict(),
            # another kind of device rounds otherwise
            "device": self.device.partition(":")[0],
            "models": {name: weight_files(model) for name, model in zip(self.names, self.models, strict=True)},
            **({"vocabulary": self.vocabulary.digest} if self.vocabulary else {}),
            "shards": {shard.file: hashlib.sha256(shard.header).hexdigest() for shard in self.layout.shards},
        }


def weight_files(model: Checkpoint) -> dict[str, dict[str, Any]]:
    """What tells whether a model's weights are still the same without reading them: size, time, header of each file."""
    own = {file: {**asdict(model.files[file]), "header_sha256": digest} for file, digest in model.header_sha256.items()}
    besides = (
        (f"{beside.location}/{file}", facts) for beside in model.besides for file, facts in weight_files(beside).items()
    )
    return {**own, **dict(besides)}


def changed_files(
    before: Mapping[str, Mapping[str, object]], model: Checkpoint
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """How a model's weight files differ from what a report says, and which are the same but for their time."""
    now, label = weight_files(model), quoted(model.location)
    changed = [f"{quoted(file)} is gone from {label}" for file in before.keys() - now.keys()]
    changed += [f"{quoted(file)} in {label} is new since the merge" for file in now.keys() - before.keys()]
    touched = []
    for file in sorted(before.keys() & now.keys()):
        then, facts = before[file], now[file]
        if then.get("size") != facts["size"]:
            changed.append(f"{quoted(file)} in {label} has {facts['size']} bytes, had {quoted(then.get('size'))}")
        elif then.get("header_sha256") != facts["header_sha256"]:
            changed.append(f"{quoted(file)} in {label} has another header than when it was merged")
        elif then.get("modified_ns") != facts["modified_ns"]:
            touched.append(f"{quoted(file)} in {label} was written again since the merge; size and header are the same")
    return tuple(sorted(changed)), tuple(touched)


def make_plan(
    recipe: Recipe,
    storage: Storage,
    *,
    memory_bytes: int | None = None,
    max_shard_bytes: int | None = None,
    device: str = "cpu",
    device_memory_bytes: int | None = None,
) -> Plan:
    """Read the models' headers and decide everything.

    memory_bytes         the budget; when None half of what is available, divided among the processes on this host
    max_shard_bytes      the most data one output file holds; by default what the recipe's report says, or 5 GB
    device               torch's name of where the arithmetic runs
    device_memory_bytes  the budget there; None keeps the arithmetic in host memory

    Raises CheckpointError for unsound files, PlanError for models that do not fit together or a budget
    too small for the largest step. Nothing is written.
    """
    names = recipe.names
    first, *others = (open_model(storage, location, recipe.base) for location in recipe.locations[: len(names)])
    models = (first, *(in_layout_of(first, other) for other in others))
    refuse_quantised(models, names)
    _refuse_to_quantise(recipe, models[0], names[0])
    offset = 1 if recipe.base else 0
    mapped = map_names(models, names, {offset + n: each.key_map for n, each in enumerate(recipe.experts)})
    first, *others = mapped.models
    models = (first, *(in_layout_of(first, other) for other in others))
    # of models of several depths, one has no buffers for another's layers
    models, notes = without_dispensable(models, names) if recipe.slices else made_alike(models, names)
    models, vocabulary, remarks = united(recipe, models, names, storage)
    if not recipe.slices:
        _refuse_differences(models, names)
    besides = recipe.locations[len(names) :]
    # what was captured of a model has that model's names
    maps = [mapped.maps[offset + n] for n, each in enumerate(recipe.experts) if each.beside]
    models += tuple(keys.applied(open_model(storage, each)) for keys, each in zip(maps, besides, strict=True))
    names += besides
    licences = licences_of(storage, models[: len(recipe.names)])
    steps = _steps(recipe, models, names, thin=device_memory_bytes is None)
    _refuse_various_settings(recipe, steps)
    _refuse_missing_data(steps, names, recipe)
    budget = available_memory_bytes() // (2 * World.here().local_size) if memory_bytes is None else memory_bytes
    memory = fit_memory(steps, budget, staged=device_memory_bytes is not None)
    past = recipe.past or Past()
    max_shard_bytes = max_shard_bytes or past.max_shard_bytes or DEFAULT_SHARD_BYTES
    return Plan(
        recipe=recipe,
        models=models,
        names=names,
        steps=steps,
        layout=lay_out((output for step in steps for output in step.outputs), max_shard_bytes),
        memory=memory,
        warnings=(
            *recipe.warnings,
            *mapped.notes,
            *notes,
            *remarks,
            *_warnings(recipe, models, names, steps),
            *licence_warnings(licences),
        ),
        max_shard_bytes=max_shard_bytes,
        device=device,
        device_memory=None
        if device_memory_bytes is None
        else fit_device_memory(steps, device_memory_bytes, memory.slot_bytes),
        vocabulary=vocabulary,
        licences=licences,
    )


def check_disk(plan: Plan, out: str) -> tuple[int, int]:
    """Bytes the output needs and bytes free where it would lie. Raises PlanError when they do not fit."""
    needed, free = plan.layout.total_bytes, free_bytes(out)
    if needed > free:
        raise PlanError(
            f"{quoted(out)} needs {format_bytes(needed)} of disk but {format_bytes(free)} are free",
            hint="Free some space, choose another folder, or set a narrower `out_dtype`.",
        )
    return needed, free


def free_bytes(out: str) -> int:
    """Bytes free on the disk that a folder lies on, or would."""
    folder = Path(os.path.abspath(out))
    while not os.path.exists(folder):
        folder = folder.parent
    return shutil.disk_usage(folder).free


def refuse_quantised(models: Sequence[Checkpoint], names: Sequence[str]) -> None:
    """Raise PlanError for weights whose numbers are not what they stand for; `names` are what messages call them."""
    for model, name in zip(models, names, strict=True):
        config = model.config.get("quantization_config")
        if config:
            method = config.get("quant_method") if isinstance(config, Mapping) else None
            by_method = f" by {quoted(method)}" if method else ""
            raise PlanError(
                f"{quoted(name)} is quantised{by_method}: its config.json has a `quantization_config`",
                hint="Dequantise it to bfloat16 first, with the tool that quantised it: of quantised models only those "
                "in 8-bit floats with scales are read as they are.",
            )


def _refuse_to_quantise(recipe: Recipe, model: Checkpoint, name: str) -> None:
    if recipe.quantize and model.quantization is None:
        raise PlanError(
            f"`quantize: {recipe.quantize}` asks for the 8-bit floats of {quoted(name)}, which has none, "
            "or also scales of activations",
            hint="Leave it out, and quantise the output with a tool that can measure activations.",
        )
    if recipe.quantize and recipe.slices:
        raise PlanError(
            f"`quantize: {recipe.quantize}` and `slices` exclude each other",
            hint="Stack the layers first, then quantise the output with another tool.",
        )
    if recipe.quantize and recipe.non_finite == "pass":
        raise PlanError(
            f"`quantize: {recipe.quantize}` and `non_finite: pass` exclude each other",
            hint="A block with an infinity has no scale. Leave out one of them.",
        )


def _refuse_differences(models: Sequence[Checkpoint], names: Sequence[str]) -> None:
    found = [
        line
        for model, name in zip(models[1:], names[1:], strict=True)
        for line in differences(models[0], model, names[0], name)
    ]
    if found:
        raise PlanError(
            f"the models do not fit together: {len(found)} difference{'s' if len(found) > 1 else ''}{listed(found)}",
            hint=VOCABULARIES_HINT
            if differ_by_vocabulary(models)
            else "The models must share an architecture and a vocabulary. "
            f"`{escaped(shlex.join(['streammerge', 'inspect', *(m.location for m in models)]))}` "
            "shows them side by side; `key_map` under a model renames its tensors.",
        )


def _steps(recipe: Recipe, models: Sequence[Checkpoint], names: Sequence[str], *, thin: bool) -> tuple[Step, ...]:
    """`thin`: matrices are merged by their experts' factors where there are such, and their method can."""

    @cache
    def roles_of(model: int) -> dict[str, Role]:
        entries, config = models[model].tensors, models[model].config
        return roles({name: (entry.shape, entry.dtype) for name, entry in entries.items()}, config, roles_from_model)

    merged = models[: len(recipe.names)]
    inputs = (
        stacked_layers(recipe, merged, names, roles_of) if recipe.slices else whole_models(recipe, merged, roles_of)
    )
    steps = [(_step(recipe, models, each), each.reference[1]) for each in inputs]
    if recipe.slices:
        _refuse_looks_at_several_models([step for step, _ in steps])
    if all(same_folder(model, models[0]) for model in merged[1:]):
        steps = [(_of_adapters(step, thin=thin and not recipe.slices), entry) for step, entry in steps]
    if recipe.quantize:
        return _pooled([each for step, entry in steps for each in as_stored(step, entry)])
    return _pooled([step for step, _ in steps])


def _of_adapters(step: Step, *, thin: bool) -> Step:
    """The step with what its method asks for where all experts are low-rank changes of the base, if they are.

    `thin`: and by their factors, where the method can.
    """
    experts = expert_factors(step.experts, step.base) if step.base and step.by_matrix else None
    if experts is None:
        return step
    ranks = [0 if entry is None else entry.parts[1].shape[0] for entry in experts]
    shape, method = _matrix_shape(step.experts[0], step.role), methods.describe(step.method)
    if any(ranks):
        step = replace(step, arguments=dict(method.for_adapters(step.arguments, shape, ranks)))
    cost = method.thin_cost(shape, ranks, step.arguments, step.compute_bytes) if thin else None
    if cost is None:
        return step
    return replace(step, thin=True, passes=1, flops=cost.flops, workspace_bytes=cost.workspace_bytes)


def _refuse_looks_at_several_models(steps: Sequence[Step]) -> None:
    """What a method sees of an expert's whole model is about one model: the same in every slice."""
    first: dict[str, Step] = {}
    for step in steps:
        if step.looks_at_model and step.models != first.setdefault(step.method, step).models:
            raise PlanError(
                f"{quoted(step.method)} looks at whole models, and those of {quoted(step.name)} are others than "
                f"those of {quoted(first[step.method].name)}",
                hint="Give every slice the same sources in the same order, or let it look at single tensors.",
            )


def _refuse_various_settings(recipe: Recipe, steps: Sequence[Step]) -> None:
    """What a method sees of the whole model is seen by one value of some settings."""
    first: dict[str, Step] = {}
    for step in steps:
        if not step.looks_at_model:
            continue
        known, method = first.setdefault(step.method, step), methods.describe(step.method)
        for name in method.one_for_all:
            keyword = method.parameters[name].keyword
            if step.arguments[keyword] != known.arguments[keyword]:
                where = recipe.place_of(method, name, recipe.rule_for(step.name))
                raise RecipeError(
                    f"{where}{quoted(step.name)} has another `{name}` than {quoted(known.name)}, expected one for all "
                    f"tensors: {quoted(method.name)} looks at the whole model",
                    hint=f"Set the same `{name}` for all tensors, or let it look at single tensors.",
                )


def _refuse_missing_data(steps: Sequence[Step], names: Sequence[str], recipe: Recipe) -> None:
    lacking = [
        f"{quoted(step.name)} of {quoted(names[step.models[step.base is not None :][number]])}"
        for step in steps
        if step.arguments.get("missing") == "error"
        for number, beside in enumerate(step.beside)
        if beside is None
    ]
    if lacking:
        kind = methods.describe(recipe.method).beside
        raise PlanError(
            f"{len(lacking)} tensor(s) have no {kind} beside them:{listed(lacking)}",
            hint=f"Collect the {kind} of all of them, or set `missing: mean` to average such tensors.",
        )


def _pooled(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps, with those side by side that a `pool: inputs` merges as one matrix, stacked by rows."""
    pools: dict[str, list[Step]] = {}
    for step in steps:
        pools.setdefault(_pool_of(step) or step.name, []).append(step)
    return tuple(
        step if len(members) == 1 else _member(step, key, members) for key, members in pools.items() for step in members
    )


def _pool_of(step: Step) -> str | None:
    if not step.by_matrix or step.arguments.get("pool") != "inputs" or step.role.transposed or len(step.shape) != 2:
        return None
    shared = input_of(step.name)
    # what is stacked must agree in all but the number of rows
    dtypes = [entry.dtype for entry in (*step.experts, *([step.base] if step.base else []))]
    alike = step.method, step.shape[1], step.dtype, dtypes, sorted(step.arguments.items(), key=str), bool(step.beside)
    return f"pool {shared} {alike}" if shared else None


def _member(step: Step, pool: str, members: Sequence[Step]) -> Step:
    """A step priced as its pool is: every member names what the stacked matrix takes."""
    whole = stacked(members)
    method = methods.describe(step.method)
    cost = method.cost((whole.shape[0], whole.shape[1]), len(step.experts), step.arguments, whole.compute_bytes)
    others = whole.read_bytes + whole.write_bytes - step.read_bytes - step.write_bytes
    kept = sum(each.base.nbytes for each in members if each.base and each is not step)
    device_bytes = cost.workspace_bytes if cost.device_bytes is None else cost.device_bytes
    return replace(
        step,
        pool=pool,
        passes=cost.passes,
        looks=cost.looks,
        flops=cost.flops if step is members[0] else 0,
        workspace_bytes=cost.workspace_bytes + kept,
        device_bytes=device_bytes + others,
    )


def _step(recipe: Recipe, models: Sequence[Checkpoint], inputs: Inputs) -> Step:
    name, role, (place, reference) = inputs.name, inputs.role, inputs.reference
    entries = tuple(entry for _, entry in inputs.experts)
    rule = recipe.rule_for(name)
    method = _method_for(recipe, rule, role, reference, models[place].config)
    dtype = (recipe.output_dtype or reference.output_dtype) if reference.is_float else reference.dtype
    passes_non_finite = recipe.non_finite == "pass"
    if method is None:
        return Step(
            name=name, role=role, method=COPY, arguments={}, base=None, experts=(reference,), models=(place,),
            dtype=dtype, by_matrix=False, passes=1, flops=0, workspace_bytes=0, passes_non_finite=passes_non_finite,
        )  # fmt: skip
    base = inputs.base
    if method.needs_base and base is None:
        raise PlanError(
            "a rule's method works on changes from a base, but the recipe has no `base_model`",
            hint="Add `base_model: DIR` to the recipe.",
        )
    stored = [entry.name for entry in entries] if inputs.part else ()
    arguments = recipe.resolve(method, name, inputs.position, rule, inputs.part, stored)
    by_matrix, by_row = method.streams_by == "matrix", method.streams_by == "row"
    shape = _matrix_shape(reference, role) if by_matrix else (1, reference.elements)
    if by_row and reference.shape:
        shape = reference.elements // reference.shape[-1], reference.shape[-1]
    _refuse_settings(recipe, method, inputs, rule, shape, arguments)
    widest = max(DTYPE_BYTES[e.dtype] for e in (*entries, reference))
    cost = method.cost(shape, len(entries), arguments, 8 if max(widest, DTYPE_BYTES[dtype]) == 8 else 4)
    assert not by_matrix or not cost.looks or cost.look_scope == "model", f"{method.name} looks at one matrix"
    matrices = math.prod(reference.shape[:-2]) if by_matrix else 1
    beside = _beside(method, recipe, models, inputs, shape if by_matrix else None)
    # one of them is in memory at a time
    read_beside = max((entry.nbytes for _, entry in filter(None, beside)), default=0) // matrices if by_matrix else 0
    return Step(
        name=name,
        role=role,
        method=method.name,
        arguments=arguments,
        base=base[1] if base else None,
        experts=entries,
        models=(*((base[0],) if base else ()), *(model for model, _ in inputs.experts)),
        dtype=dtype,
        by_matrix=by_matrix,
        passes=cost.passes,
        looks=cost.looks,
        flops=cost.flops * matrices,
        workspace_bytes=cost.workspace_bytes + read_beside,
        device_bytes=(cost.workspace_bytes if cost.device_bytes is None else cost.device_bytes) + read_beside,
        by_row=by_row,
        block_buffers=cost.block_buffers,
        kept_bytes=cost.kept_bytes,
        passes_non_finite=passes_non_finite,
        looks_at_model=cost.looks > 0 and cost.look_scope == "model",
        beside=beside,
    )


def _refuse_settings(
    recipe: Recipe,
    method: methods.Method,
    inputs: Inputs,
    rule: Rule | None,
    shape: tuple[int, int],
    arguments: Mapping[str, Any],
) -> None:
    found = method.complaint(shape, len(inputs.experts), arguments)
    if found is None:
        return
    if found.parameter is None:
        raise PlanError(f"{quoted(inputs.name)}: {found.message}", hint=found.hint)
    where = recipe.place_of(method, found.parameter, rule, inputs.part)
    raise RecipeError(f"{where}{quoted(inputs.name)}: {found.message}", hint=found.hint)


def _beside(
    method: methods.Method,
    recipe: Recipe,
    models: Sequence[Checkpoint],
    inputs: Inputs,
    matrix: tuple[int, int] | None,
) -> tuple[tuple[int, TensorEntry] | None, ...]:
    """What lies beside each expert for one tensor: [..., in, in] for matrices, else the tensor's own shape."""
    if method.beside is None or len(models) == len(recipe.names):
        return ()
    shape = inputs.reference[1].shape
    expected = shape if matrix is None else (*shape[:-2], matrix[1], matrix[1])
    # they follow the merged models, of those experts that have any
    with_data = [number for number, expert in enumerate(recipe.experts) if expert.beside]
    found = []
    for number, (_, stored) in zip(inputs.besides, inputs.experts, strict=True):
        model = len(recipe.names) + with_data.index(number)
        entry = models[model].tensors.get(stored.name)
        if entry is not None and (entry.shape != expected or not entry.is_float):
            raise PlanError(
                f"{quoted(stored.name)} is {entry.dtype} {list(entry.shape)} in {quoted(models[model].location)}, "
                f"expected floats {list(expected)}: the {method.beside} of its inputs",
                hint="`streammerge capture` makes such a folder from the model and a text file.",
            )
        found.append(None if entry is None else (model, entry))
    return tuple(found)


# what an integer under such a name stands for is not itself
_OF_FLOATS = (TensorClass.MATRIX, TensorClass.EMBEDDING, TensorClass.STACK, TensorClass.ROUTER)


def _method_for(
    recipe: Recipe, rule: Rule | None, role: Role, reference: TensorEntry, config: Mapping[str, Any]
) -> methods.Method | None:
    """The method a tensor gets; None means it is copied."""
    if rule and rule.keep_base:
        return None
    if not reference.is_float:
        if reference.dtype.startswith("F8"):
            raise PlanError(
                f"{quoted(reference.name)} is {reference.dtype}, which needs its scales to be merged",
                hint="Convert the models to bfloat16 first.",
            )
        if reference.dtype not in INTEGER_DTYPES:
            raise PlanError(
                f"{quoted(reference.name)} is {reference.dtype}, which no method merges",
                hint="Convert the models to float32 first.",
            )
        as_floats = role_by_name(reference.name, reference.shape, "F32", config)
        if as_floats and as_floats.kind in _OF_FLOATS:
            raise PlanError(
                f"{quoted(reference.name)} is {reference.dtype}, and a layer's weights are floats: it is quantised",
                hint="Dequantise the models to bfloat16 first, or keep it by a rule: `match: NAME`, `keep: base`.",
            )
        return None
    if reference.elements == 0 or role.kind is TensorClass.BUFFER:
        return None
    if rule and rule.method:
        method = methods.describe(rule.method)
        if method.streams_by == "matrix" and not _holds_matrices(reference, role):
            raise PlanError(
                f"rule {quoted(rule.match)} sends {quoted(reference.name)} to {quoted(method.name)}, "
                f"but its shape {list(reference.shape)} is not a matrix",
                hint="Narrow the rule's `match`.",
            )
        return method
    method = methods.describe(recipe.method)
    is_linear = role.kind in (TensorClass.MATRIX, TensorClass.ROUTER, TensorClass.STACK)
    if method.streams_by != "matrix" or (is_linear and _holds_matrices(reference, role)):
        return method
    return methods.describe(FALLBACK)


def _holds_matrices(entry: TensorEntry, role: Role) -> bool:
    return len(entry.shape) == (3 if role.kind is TensorClass.STACK else 2)


def _matrix_shape(entry: TensorEntry, role: Role) -> tuple[int, int]:
    rows, columns = entry.shape[-2:]
    return (columns, rows) if role.transposed else (rows, columns)


def _warnings(
    recipe: Recipe, models: Sequence[Checkpoint], names: Sequence[str], steps: Sequence[Step]
) -> tuple[str, ...]:
    found = [note for model in models for note in model.notes]
    if recipe.slices:
        found += [*stacking_warnings(recipe, models, names), *config_warnings(recipe, models, names)]
    if recipe.past and recipe.past.inputs is not None:
        pairs = zip(recipe.past.inputs, models, strict=True)
        changed = [line for before, model in pairs for line in changed_files(before, model)[0]]
        if changed:
            found.append(f"the inputs are not those of the report, so the output will differ: {'; '.join(changed[:3])}")
    # to a method of elements all tensors are alike
    by_guess = [step.name for step in steps if step.role.source == "shape" and step.method != COPY]
    if by_guess and methods.describe(recipe.method).streams_by == "matrix":
        found.append(
            f"{len(by_guess)} tensor(s) such as {quoted(by_guess[0])} of unknown name have the class "
            "that their shape suggests: a rule can say otherwise"
        )
    if recipe.chat_template is None and recipe.tokenizer_source in (None, "base", "union"):
        with_template = [n for m, n in zip(models, names, strict=True) if "chat_template.jinja" in m.files]
        if with_template and names[0] not in with_template:
            found.append(
                f"{quoted(names[0])} has no chat template but {quoted(with_template[0])} has: "
                "set `chat_template` to say which the output gets"
            )
    return tuple(found)
