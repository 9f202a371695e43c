"""config.json of a model whose layers slices stacked: how many there are, and what it says of each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeGuard

from streammerge.checkpoint import Checkpoint
from streammerge.errors import PlanError, quoted
from streammerge.recipe import Recipe
from streammerge.stacking import BESIDE, Stack, origins

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# numbers that pick layers out by where they lie
PICKS = frozenset({
    "sliding_window_pattern", "_sliding_window_pattern", "max_window_layers", "full_attention_interval",
    "global_attn_every_n_layers", "no_rope_layer_interval", "first_k_dense_replace", "decoder_sparse_step",
    "moe_layer_freq", "moe_layer_start_index", "moe_layer_end_index", "interleave_moe_layer_step",
    "expert_layer_period", "expert_layer_offset", "attn_layer_period", "attn_layer_offset", "layer_group_size",
    "num_nextn_predict_layers", "num_kv_shared_layers",
})  # fmt: skip
_PER_LAYER = ("layer", "block", "pattern", "attention", "head", "ffn", "window", "expert", "types")
_WINDOWED, _FULL = "sliding_attention", "full_attention"
_SHOWN = 5


def stacked_config(recipe: Recipe, models: Sequence[Checkpoint], names: Sequence[str]) -> dict[str, Any]:
    """The content of config.json: the first model's, with the output's number of layers and each layer's own items.

    Such are lists of one item a layer (`layer_types`), of layers' numbers (`mlp_only_layers`), and text of one letter a
    layer. Raises PlanError where a model whose layers are taken does not have a list that the first model has.
    """
    return _Follower(recipe, models, names).part([])


def config_warnings(recipe: Recipe, models: Sequence[Checkpoint], names: Sequence[str]) -> list[str]:
    """What config.json says of layers by a number, and may no longer be true of them."""
    follower = _Follower(recipe, models, names)
    follower.part([])
    kept = [f"`{key}: {value}`" for key, value in follower.kept.items()]
    found = []
    if kept:
        shown = ", ".join(kept[:_SHOWN]) + (", …" if len(kept) > _SHOWN else "")
        found.append(f"config.json keeps {shown} although layers change places: see whether they hold for the output")
    if models[0].config and not follower.counted:
        had, has = follower.count, len(follower.origins)
        found.append(f"config.json does not say that there are {had} layers: say there that the output has {has}")
    return found


class _Follower:
    """Follows the layers through config.json. `kept` and `counted` say what was seen on the way."""

    def __init__(self, recipe: Recipe, models: Sequence[Checkpoint], names: Sequence[str]) -> None:
        self.models, self.names, self.origins = models, names, origins(recipe)
        self.count = Stack(models[0], names[0]).count
        self.deepest: dict[int, int] = {}
        for model, layer in self.origins:
            self.deepest[model] = max(layer, self.deepest.get(model, 0))
        # the first model as it is, or its first layers alone
        self.same_places = all(layer == place for place, (_, layer) in enumerate(self.origins))
        self.kept: dict[str, object] = {}
        self.counted = False

    def part(self, path: list[str]) -> dict[str, Any]:
        """A config, or one inside it, for the output."""
        found = _at(self.models[0].config, path)
        own = next((found[key] for key in COUNTS if _is_count(found.get(key))), self.count)
        if path and own != self.count:
            # of a part beside the language model
            return dict(found)
        written: dict[str, Any] = {}
        for key, value in found.items():
            if isinstance(value, Mapping):
                written[key] = dict(value) if BESIDE.search(key) else self.part([*path, key])
            elif key in COUNTS and _is_count(value):
                self.counted = True
                written[key] = len(self.origins)
            else:
                written[key] = self.value(path, key, value, own)
        if "attention_types" in found and isinstance(written.get("attention_layers"), list):
            # GPT-Neo says the same again, as what is repeated how often
            written["attention_types"] = [[written["attention_layers"], 1]]
        period = _window_period(found)
        if period and "layer_types" not in found and not self.same_places:
            written["layer_types"] = [_FULL if (layer + 1) % period == 0 else _WINDOWED for _, layer in self.origins]
            for key in ("sliding_window_pattern", "_sliding_window_pattern"):
                self.kept.pop(key, None)
        return written

    def value(self, path: list[str], key: str, value: object, layers: int) -> object:
        """What stands under a key that is no config, for the output."""
        if _is_numbers(key, value, layers):
            numbers = self.each(path, key, lambda other, _: frozenset(other) if _are_whole(other) else None)
            return [place for place, (model, layer) in enumerate(self.origins) if layer in numbers[model]]
        if isinstance(value, (list, str)) and len(value) == layers and _speaks_of_layers(key, value):
            kind = type(value)
            lists = self.each(
                path, key, lambda other, most: other if type(other) is kind and len(other) > most else None
            )
            items = [lists[model][layer] for model, layer in self.origins]
            return "".join(items) if isinstance(value, str) else items
        if key in PICKS and type(value) is int and value and not self.same_places:
            self.kept[key] = value
        return value

    def each(self, path: list[str], key: str, read: Callable[[Any, int], Any]) -> dict[int, Any]:
        """What the config of each model whose layers are taken says under a key, read as far as its last such layer."""
        found = {}
        for model, most in self.deepest.items():
            found[model] = read(_at(self.models[model].config, path).get(key), most)
            if found[model] is None:
                raise PlanError(
                    f"config.json of {quoted(self.names[0])} says {quoted(key)} of each layer, "
                    f"that of {quoted(self.names[model])} not of its layer {most}, which is taken",
                    hint=f"Write {quoted(key)} into the config.json of {quoted(self.names[model])}.",
                )
        return found


def _at(config: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    """The config inside a config; empty where it is not there."""
    for key in path:
        inner = config.get(key)
        config = inner if isinstance(inner, Mapping) else {}
    return config


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _are_whole(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _is_numbers(key: str, value: object, layers: int) -> bool:
    """Whether a list holds numbers of layers: each once, in order."""
    return (
        _are_whole(value)
        and bool(value)
        and ("layer" in key or key.endswith(("indices", "idx", "idxs")))
        and all(0 <= item < layers for item in value)
        and all(left < right for left, right in pairwise(value))
        # one switch for each of two layers, rather than their numbers
        and not (len(value) == layers == 2 and key == "no_rope_layers")
    )


def _speaks_of_layers(key: str, value: list[object] | str) -> bool:
    return "pattern" in key if isinstance(value, str) else any(word in key for word in _PER_LAYER)


def _window_period(config: Mapping[str, Any]) -> int | None:
    """Every how many layers one attends to all, as transformers reads Gemma 2, Gemma 3 and Cohere 2."""
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        if _is_count(config.get(key)):
            return int(config[key])
    return 2 if config.get("model_type") == "gemma2" else None
