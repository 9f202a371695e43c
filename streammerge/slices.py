"""mergekit's `slices`: one slice over all layers of each model says what `models` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from streammerge.errors import RecipeError
from streammerge.located_yaml import Located
from streammerge.settings import required

NOT_WHOLE = "{} takes models apart in mergekit; streammerge merges whole models"
WHOLE_HINT = "List the models under `models`; one slice over all layers of each means the same."
MOST_LAYERS = 1_000_000

_RANGE = "`[0, N]` with N the layers of the model"
_SAME_RANGE_HINT = f"Give each source all of its layers: {_RANGE}."
_SLICE_KEYS = {
    key: (f"`{key}` is set for one slice, which is the whole merge", "Move it to the top of the recipe.")
    for key in ("parameters", "base_model")
}


def listed_models(fields: Mapping[str, Located], root: Located) -> tuple[Located, int | None]:
    """The recipe's list of models, and how many layers its slice says they have; None where it has no slice.

    A slice's sources come without their `layer_range`, as `models` would list them.
    """
    if "slices" not in fields:
        return required(fields, "models", root), None
    node = fields["slices"]
    if "models" in fields:
        raise node.error("`slices` and `models` say the same thing twice", "Keep one.")
    slices = node.items("a list of slices")
    if len(slices) != 1:
        raise node.error(NOT_WHOLE.format("`slices`"), WHOLE_HINT)
    sources = required(slices[0].fields(("sources",), _SLICE_KEYS), "sources", slices[0])
    models: list[Located] = []
    layers: int | None = None
    for source in sources.items("a list of models"):
        entries = source.mapping("a mapping with `model` and `layer_range`")
        node = required(entries, "layer_range", source)
        found = _layers(node)
        if found != (layers or found):
            raise _part(node)
        layers = found
        models.append(replace(source, value={key: entry for key, entry in entries.items() if key != "layer_range"}))
    return replace(sources, value=models), layers


def _layers(node: Located) -> int:
    ends = [end.whole() for end in node.items(_RANGE)]
    if len(ends) != 2 or not 0 <= ends[0] < ends[1] <= MOST_LAYERS:
        raise node.wrong(_RANGE)
    if ends[0] > 0:
        raise _part(node)
    return ends[1]


def _part(node: Located) -> RecipeError:
    return node.error(NOT_WHOLE.format("`layer_range`"), _SAME_RANGE_HINT)
