"""mergekit's `slices`: an output whose layers come from ranges of its models' layers, one slice above the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from streammerge.errors import quoted
from streammerge.located_yaml import Located
from streammerge.settings import Setting, required

MOST_LAYERS = 100_000

_RANGE = "`[FIRST, END]` with END one more than the last layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Layers of one model that a slice merges.

    expert      which of the recipe's experts
    first       its first layer; how many there are, the slice says
    parameters  what is set for them
    where       the place in the recipe, for messages
    """

    expert: int
    first: int
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Layers of the output that stand one above the other.

    layers      how many each source has of them
    base        the slice's own base model; None for the recipe's
    base_first  the first of the base's layers that go with the sources'; None where there is no base, or none go
    parameters  what is set for the slice, before what is set for all
    """

    layers: int
    sources: tuple[Source, ...]
    base: str | None = None
    base_first: int | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenSource:
    """A source as written: the model, without its `layer_range`, and the range's beginning."""

    model: Located
    first: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenSlice:
    """A slice as written, its ranges checked as far as the recipe alone shows."""

    node: Located
    listing: Located
    sources: tuple[WrittenSource, ...]
    layers: int
    base: Located | None
    parameters: Located | None


def written_slices(node: Located) -> tuple[WrittenSlice, ...]:
    """Read a recipe's slices. Raises RecipeError for ranges that are none, or differ in length within a slice."""
    found = tuple(_slice(item) for item in node.items("a list of slices"))
    if not found:
        raise node.error("`slices` lists no slice", "List at least one, with its `sources`.")
    if (layers := sum(each.layers for each in found)) > MOST_LAYERS:
        raise node.error(f"`slices` stack {layers} layers, over the limit of {MOST_LAYERS}")
    return found


def first_of_base(
    written: WrittenSlice, listed: Sequence[int], others: Sequence[int], needed: str | None
) -> int | None:
    """The first of the base's layers that go with a slice: where the slice lists the base, or where all others begin.

    listed  the beginnings under which the slice lists its base
    others  those of the sources that are merged
    needed  the base, where the recipe's method works with it

    Raises RecipeError where it is needed and not known.
    """
    if needed is not None and len(listed) > 1:
        hint = "Keep one: its layers are what changes count from."
        raise written.listing.error("`sources` lists the base twice", hint)
    firsts = set(listed or others)
    if needed is not None and len(firsts) != 1:
        raise written.listing.error(
            f"`sources` does not say which layers of the base {quoted(needed)} the others' go with",
            "List the base too, with a `layer_range` as long as theirs.",
        )
    return firsts.pop() if len(firsts) == 1 else None


def _slice(node: Located) -> WrittenSlice:
    fields = node.fields(("sources", "base_model", "parameters"))
    listing = required(fields, "sources", node)
    sources: list[WrittenSource] = []
    layers = None
    for source in listing.items("a list of models"):
        entries = source.mapping("a mapping with `model` and `layer_range`")
        written = required(entries, "layer_range", source)
        first, end = _ends(written)
        if layers not in (None, end - first):
            raise written.error(
                f"`layer_range` takes {end - first} layers, the slice's first source {layers}",
                "The sources of a slice are merged layer by layer: give each as many.",
            )
        layers = end - first
        model = replace(source, value={key: entry for key, entry in entries.items() if key != "layer_range"})
        sources.append(WrittenSource(model=model, first=first))
    if layers is None:
        raise listing.error("`sources` lists no model", "List at least one model to merge.")
    base, parameters = fields.get("base_model"), fields.get("parameters")
    return WrittenSlice(
        node=node, listing=listing, sources=tuple(sources), layers=layers, base=base, parameters=parameters
    )


def _ends(node: Located) -> tuple[int, int]:
    ends = [end.whole() for end in node.items(_RANGE)]
    if len(ends) != 2 or ends[0] < 0:
        raise node.wrong(_RANGE)
    first, end = ends
    if max(ends) > MOST_LAYERS:
        raise node.error(f"`layer_range` goes beyond the {MOST_LAYERS} layers that a model may have")
    if first >= end:
        raise node.error(
            f"`layer_range: [{first}, {end}]` holds no layer", f"Write {_RANGE}: `[{first}, {first + 1}]` is one layer."
        )
    return first, end
