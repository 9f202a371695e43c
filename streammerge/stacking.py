"""Which tensors each tensor of the output is merged from: equal names of whole models, or layers that slices stack.

The layers of a slice's sources are merged pairwise and numbered anew. What lies below the layers, such as embeddings,
comes from the first slice's sources, and what lies above them, the final norm and the head, from the last slice's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from streammerge import methods
from streammerge.checkpoint import Checkpoint, TensorEntry
from streammerge.compare import differences
from streammerge.errors import PlanError, quoted
from streammerge.recipe import Recipe
from streammerge.rules import Role, layer_count, layer_parts, layer_position, position_of
from streammerge.slices import Slice

Stored = tuple[int, TensorEntry]
"""Which of the plan's models a tensor lies in, and where."""
Layer = Mapping[str, TensorEntry]
"""A layer's tensors by what follows its number."""
RolesOf = Callable[[int], Mapping[str, Role]]
"""What each tensor of one of the plan's models is."""

_SHOWN = 20
# in parts of a model beside its language model, which stay whole
BESIDE = re.compile(
    r"vision|visual|image|audio|speech|video|perceiver|resampler|connector|projector|qformer|(^|[._])mtp([._]|$)|eagle"
)
_BELOW = re.compile(r"embed(?!_out|ding_norm)|(?:^|\.)(?:wte|wpe)(?:\.|$)|rotary|position|inv_freq")
_ABOVE = re.compile(
    r"(?:^|\.)(?:norm|final_norm|final_layernorm|final_layer_norm|norm_f|ln_f|ln_out|embedding_norm|lm_head|embed_out"
    r"|head|score|classifier|qa_outputs|output|output_layer|cls|pooler)(?:\.|$)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """One tensor of the output and what it is merged from.

    position   where it lies on a curve over depth
    reference  whose shape and dtype it has: the base's tensor, or the first expert's
    base       None where no method works with one
    experts    every expert's tensor, in the order of the recipe, or of its slice
    besides    which of the recipe's experts each of them is
    part       the slice that it belongs to
    """

    name: str
    role: Role
    position: float
    reference: Stored
    base: Stored | None
    experts: tuple[Stored, ...]
    besides: tuple[int, ...]
    part: Slice | None = None


def reads_base(recipe: Recipe) -> bool:
    """Whether a method of the recipe or of its rules works with the base where there is one."""
    used = [methods.describe(name) for name in (recipe.method, *(rule.method for rule in recipe.rules)) if name]
    return any(method.needs_base or method.takes_base for method in used)


def whole_models(recipe: Recipe, models: Sequence[Checkpoint], roles_of: RolesOf) -> Iterator[Inputs]:
    """Tensors of equal names, in the order of the first model's bytes; `models` are the base, if any, and experts."""
    reference, kinds = models[0].tensors, roles_of(0)
    layers, first = layer_count(reference), 1 if recipe.base else 0
    based = recipe.base is not None and reads_base(recipe)
    # input and output files are passed through once
    for entry in sorted(reference.values(), key=_place):
        yield Inputs(
            name=entry.name,
            role=kinds[entry.name],
            position=layer_position(entry.name, layers),
            reference=(0, entry),
            base=(0, entry) if based else None,
            experts=tuple((i, models[i].tensors[entry.name]) for i in range(first, len(models))),
            besides=tuple(range(len(models) - first)),
        )


def stacked_layers(
    recipe: Recipe, models: Sequence[Checkpoint], names: Sequence[str], roles_of: RolesOf
) -> Iterator[Inputs]:
    """The tensors of a recipe's slices, slice by slice, each in the order of its first model's bytes.

    Raises PlanError for a model whose layers cannot be told from its names, for layers that a model does not have, and
    for layers or surroundings that do not fit together.
    """
    used = sorted({member.model for part in recipe.slices for member in members(recipe, part)} | {0})
    stacks = {model: Stack(models[model], names[model]) for model in used}
    _refuse_absent_layers(recipe, stacks)
    _refuse_misfits(recipe, stacks)
    return _stacked(recipe, stacks, roles_of)


def _stacked(recipe: Recipe, stacks: Mapping[int, Stack], roles_of: RolesOf) -> Iterator[Inputs]:
    prefix, done = stacks[0].prefix, 0
    for number, part in enumerate(recipe.slices):
        found = members(recipe, part)
        last = number == len(recipe.slices) - 1
        around = (n for n in stacks[found[0].model].outside if (last if is_above(n) else number == 0))
        named = [(name, 0.0, [(m.model, stacks[m.model].outside[name]) for m in found]) for name in around]
        for offset in range(part.layers):
            layers = [(m.model, stacks[m.model].layers[m.first + offset]) for m in found]
            for rest in layers[0][1]:
                name, position = f"{prefix}{done + offset}{rest}", position_of(offset, part.layers)
                named.append((name, position, [(model, layer[rest]) for model, layer in layers]))
        for name, position, stored in sorted(named, key=lambda each: _place(each[2][0][1])):
            yield _inputs(recipe, part, name, position, stored, roles_of)
        done += part.layers


def _inputs(
    recipe: Recipe, part: Slice, name: str, position: float, stored: Sequence[Stored], roles_of: RolesOf
) -> Inputs:
    model, entry = stored[0]
    has_base = len(stored) > len(part.sources)
    return Inputs(
        name=name,
        role=roles_of(model)[entry.name],
        position=position,
        reference=stored[0],
        base=stored[0] if has_base and reads_base(recipe) else None,
        experts=tuple(stored[1:] if has_base else stored),
        besides=tuple(source.expert for source in part.sources),
        part=part,
    )


@dataclass(frozen=True, slots=True)
class Member:
    """Layers of one of the plan's models that go into a slice."""

    model: int
    first: int
    where: str


def members(recipe: Recipe, part: Slice) -> list[Member]:
    """A slice's base, if a method or rule has a use for it, then its sources."""
    offset = 1 if recipe.base else 0
    found = [Member(offset + each.expert, each.first, each.where) for each in part.sources]
    first = _base_first(recipe, part)
    if first is None:
        return found
    own = part.base not in (None, recipe.base)
    number = offset + [expert.location for expert in recipe.experts].index(str(part.base)) if own else 0
    return [Member(number, first, part.where), *found]


def origins(recipe: Recipe) -> list[tuple[int, int]]:
    """For each layer of the output the model and the layer there that it is called after: its base's, or the first."""
    firsts = [(members(recipe, part)[0], part.layers) for part in recipe.slices]
    return [(member.model, member.first + offset) for member, layers in firsts for offset in range(layers)]


def described(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """A line for each slice: layers of the output, and whose they are."""
    lines, done = [], 0
    for part in recipe.slices:
        sources = (f"{names[m.model]}[{m.first}:{m.first + part.layers}]" for m in members(recipe, part))
        lines.append(f"[{done}:{done + part.layers}] of {', '.join(sources)}")
        done += part.layers
    return lines


def is_above(name: str) -> bool:
    """Whether a tensor outside of the layers lies above them, as the final norm and the head do."""
    return _ABOVE.search(name) is not None and not (BESIDE.search(name) or _BELOW.search(name))


class Stack:
    """A model's layers, and what lies around them. Raises PlanError where names do not tell which layers are meant.

    prefix   what stands before a layer's number
    layers   each layer's tensors
    count    one more than the last layer's number
    outside  all other tensors by name
    """

    def __init__(self, model: Checkpoint, label: str) -> None:
        self.model, self.label = model, label
        layers: dict[str, dict[int, dict[str, TensorEntry]]] = {}
        for name, entry in model.tensors.items():
            # a number that is not written as we would write it is a name
            if (parts := layer_parts(name)) and name == f"{parts[0]}{parts[1]}{parts[2]}":
                layers.setdefault(parts[0], {}).setdefault(parts[1], {})[parts[2]] = entry
        self.prefix = self._own(layers)
        self.layers: Mapping[int, Layer] = layers[self.prefix]
        self.count = max(self.layers) + 1
        inside = {entry.name for layer in self.layers.values() for entry in layer.values()}
        self.outside = {name: entry for name, entry in model.tensors.items() if name not in inside}

    def _own(self, layers: Mapping[str, Mapping[int, Layer]]) -> str:
        """Of several stacks that of the language model."""
        found = [prefix for prefix in layers if not BESIDE.search(prefix)]
        if self.model.config.get("is_encoder_decoder"):
            raise PlanError(
                f"{quoted(self.label)} has an encoder and a decoder, and `layer_range` does not say whose layers",
                hint="List the models under `models`, which merges all layers.",
            )
        if len(found) != 1:
            listing = ", ".join(f"{quoted(prefix)} ({len(layers[prefix])})" for prefix in found[:_SHOWN])
            several = f"several stacks of layers, {listing}" if found else "no stack of layers of a language model"
            raise PlanError(
                f"{quoted(self.label)} has {several}, and slices take layers of one",
                hint="List the models under `models`, which merges all layers.",
            )
        return found[0]

    def part(self, first: int, layers: int, at: int) -> Checkpoint:
        """Some layers alone, renumbered from `at` on."""
        tensors = {
            f"{self.prefix}{at + offset}{rest}": entry
            for offset in range(layers)
            for rest, entry in self.layers.get(first + offset, {}).items()
        }
        return replace(self.model, tensors=tensors)


def _base_first(recipe: Recipe, part: Slice) -> int | None:
    used = reads_base(recipe) or any(rule.keep_base for rule in recipe.rules)
    return part.base_first if used else None


def _place(entry: TensorEntry) -> tuple[str, int]:
    return entry.file, entry.offset


def _refuse_absent_layers(recipe: Recipe, stacks: Mapping[int, Stack]) -> None:
    for part in recipe.slices:
        for member in members(recipe, part):
            stack, end = stacks[member.model], member.first + part.layers
            if end > stack.count:
                raise PlanError(
                    f"{member.where}: `layer_range: [{member.first}, {end}]` goes beyond the {stack.count} layers of "
                    f"{quoted(stack.label)}",
                    hint=f"Its last layer is {stack.count - 1}; `[0, {stack.count}]` takes all of them.",
                )


def _refuse_misfits(recipe: Recipe, stacks: Mapping[int, Stack]) -> None:
    """Compare a slice's sources, its layers with those of the model that gives config.json, and what lies around."""
    own = stacks[0]
    signatures = {_signature(layer) for layer in own.layers.values()}
    lines: list[tuple[str, list[str]]] = []
    done = 0
    for number, part in enumerate(recipe.slices):
        found = members(recipe, part)
        first, end = found[0].first, found[0].first + part.layers
        stack = stacks[found[0].model]
        reference, label = stack.part(first, part.layers, done), f"{stack.label}[{first}:{end}]"
        for member in found[1:]:
            other, end = stacks[member.model], member.first + part.layers
            layers = other.part(member.first, part.layers, done)
            lines.append((member.where, differences(reference, layers, label, f"{other.label}[{member.first}:{end}]")))
        for offset in range(part.layers):
            layer = stack.layers.get(first + offset, {})
            if _signature(layer) not in signatures:
                place = min(first + offset, max(own.layers))
                mine = own.part(place, 1, done + offset)
                theirs = stack.part(first + offset, 1, done + offset)
                names = f"{own.label}[{place}:{place + 1}]", f"{stack.label}[{first + offset}:{first + offset + 1}]"
                lines.append((found[0].where, differences(mine, theirs, *names)))
                break
        if number in (0, len(recipe.slices) - 1):
            for member in found:
                around = stacks[member.model]
                pair = replace(own.model, tensors=own.outside), replace(around.model, tensors=around.outside)
                lines.append((member.where, differences(*pair, own.label, around.label)))
        done += part.layers
    told = list(dict.fromkeys(f"{where}: {line}" for where, found_lines in lines for line in found_lines))
    if told:
        more = [f"… and {len(told) - _SHOWN} more"] if len(told) > _SHOWN else []
        raise PlanError(
            f"the layers do not fit together: {len(told)} difference{'s' if len(told) > 1 else ''}\n  "
            + "\n  ".join([*told[:_SHOWN], *more]),
            hint="Layers must come from models of one architecture and width. Names are those of the output; "
            "`key_map` under a source renames its tensors.",
        )


def _signature(layer: Layer) -> frozenset[tuple[str, tuple[int, ...]]]:
    return frozenset((rest, entry.shape) for rest, entry in layer.items())


def stacking_warnings(recipe: Recipe, models: Sequence[Checkpoint], names: Sequence[str]) -> list[str]:
    """What of a stack is decided by names that say little, or changes places that config.json may count."""
    found = []
    stacks = {model: Stack(models[model], names[model]) for model in {0, *(model for model, _ in origins(recipe))}}
    ends = [{m.model for m in members(recipe, recipe.slices[number])} for number in (0, -1)]
    unknown = [name for name in stacks[0].outside if not (_is_known(name) or BESIDE.search(name))]
    if unknown and ends[0] != ends[1]:
        found.append(
            f"{len(unknown)} tensor(s) outside of the layers, such as {quoted(unknown[0])}, are taken from the first "
            "slice: their names do not say whether they lie below the layers or above them"
        )
    own = {number: _signature(layer) for number, layer in stacks[0].layers.items()}
    kinds = set(own.values())
    if len(kinds) > 1:
        placed = (_signature(stacks[model].layers[layer]) for model, layer in origins(recipe))
        moved = sum(own.get(place) != kind for place, kind in enumerate(placed))
        if moved:
            found.append(
                f"layers of {len(kinds)} kinds, such as dense and sparse ones, change places: {moved} lie where "
                f"{quoted(names[0])} has another kind or no layer. See what config.json says of them by number"
            )
    return found


def _is_known(name: str) -> bool:
    return bool(_ABOVE.search(name) or _BELOW.search(name))
