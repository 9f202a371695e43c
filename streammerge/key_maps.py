"""Names that differ and mean the same: prefixes of wrappers, transformers' own renames, and what a recipe's map says.

A model's names are mapped to those of the first model. A tensor with the same name stays. The others are compared
without what training scripts and versions of transformers put around them; a name is mapped where exactly one is left
on either side that agrees. Layers are mapped all alike, so models may have different numbers of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from streammerge import patterns
from streammerge.checkpoint import Checkpoint, TensorEntry
from streammerge.errors import PlanError, quoted
from streammerge.rules import layer_parts

LONGEST_NAME = 4096

# put around modules by torch, wherever they stand
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# what a bare model's names lack before them that a model with a head has, or a part of several that a bare one is
_PREFIXES = frozenset({
    "module", "model", "transformer", "backbone", "base_model", "language_model", "text_model", "gpt_neox", "llm",
    "thinker",
    "bert", "roberta", "distilbert", "electra", "albert", "deberta", "camembert", "xlm_roberta", "mpnet",
})  # fmt: skip
_VISION = (("vision_tower", "vision_model"), ("vision_tower",), ("vision_model",), ("visual",))
# TensorFlow's names of a norm's weights, which old BERTs kept
_ENDINGS = {"gamma": "weight", "beta": "bias"}
_LAYER = "\0"

# computed anew by every model that has them
_BUFFER = re.compile(r"(?:^|\.)(?:rotary_(?:pos_)?emb\.inv_freq|position_ids|masked_bias)$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$")
_SHOWN = 3

Rules = Sequence[tuple[str, str]]
"""A recipe's map: a regular expression, and what a name's matching part is replaced by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyMap:
    """How a model's names become those of the first model.

    renamed  each name that changes, and the name it gets
    """

    renamed: Mapping[str, str]

    def summary(self) -> str:
        """What is replaced by what, and in how many names."""
        counts = Counter(_change(old, new) for old, new in self.renamed.items())
        changes = [f"{quoted(old)} → {quoted(new)} ({count})" for (old, new), count in counts.most_common(_SHOWN)]
        return ", ".join(changes) + (", …" if len(counts) > _SHOWN else "")

    def applied(self, model: Checkpoint) -> Checkpoint:
        """The model under its new names."""
        if not self.renamed:
            return model
        tensors = {}
        for name, entry in model.tensors.items():
            new = self.renamed.get(name, name)
            tensors[new] = entry if new == name else replace(entry, name=new)
        return replace(model, tensors=tensors)


def find_map(reference: Iterable[str], names: Iterable[str], label: str = "the model") -> KeyMap:
    """The map from a model's names to the reference's; a name that nothing corresponds to stays as it is.

    label  what messages call the model

    Raises PlanError where several names correspond to one, or one to several.
    """
    reference, names = list(reference), list(names)
    if set(reference) == set(names):
        return KeyMap(renamed={})
    forms, own = {_form(name) for name in reference}, {name: _form(name) for name in names}
    free: dict[str, list[str]] = {}
    for form in forms.difference(own.values()):
        free.setdefault(_bare(form), []).append(form)
    new: dict[str, str] = {}
    taken: dict[str, str] = {}
    for form in sorted(set(own.values()) - forms) if free else ():
        found = free.get(_bare(form), [])
        if not found:
            continue
        rivals = [*found, *([taken[found[0]]] if found[0] in taken else [])]
        if len(rivals) > 1:
            spelled = " and ".join(quoted(each.replace(_LAYER, "0")) for each in sorted(rivals))
            raise PlanError(
                f"the names of {quoted(label)} are ambiguous: {quoted(form.replace(_LAYER, '0'))} is like {spelled}",
                hint="Say in the recipe which is which: `key_map: {PATTERN: REPLACEMENT}` under the model.",
            )
        new[form], taken[found[0]] = found[0], form
    renamed = {}
    for name, form in own.items():
        if form in new:
            parts = layer_parts(name)
            renamed[name] = new[form].replace(_LAYER, str(parts[1])) if parts and _LAYER in form else new[form]
    return KeyMap(renamed=renamed)


def given_map(names: Iterable[str], rules: Rules, label: str) -> tuple[KeyMap, tuple[str, ...]]:
    """The map that a recipe gives: the first rule that matches a name replaces what it matches there.

    Returns it with the patterns that match no name. Raises PlanError for names that become one, or too long.
    """
    renamed: dict[str, str] = {}
    used: set[str] = set()
    result: dict[str, str] = {}
    for name in names:
        new = name
        for pattern, replacement in rules:
            try:
                if patterns.compiled(pattern).is_in(name):
                    used.add(pattern)
                    new = patterns.compiled(pattern).replaced(name, replacement)
                    break
            except patterns.PatternError as error:
                raise PlanError(f"a `key_map`'s {error}", hint="Write it with fewer repetitions.") from error
        if not new or len(new) > LONGEST_NAME:
            found = f"{len(new)} characters, over the limit of {LONGEST_NAME}" if new else "nothing"
            raise PlanError(f"`key_map` makes {found} of {quoted(name)} in {quoted(label)}")
        if new in result:
            raise PlanError(
                f"`key_map` makes {quoted(new)} of both {quoted(result[new])} and {quoted(name)} in {quoted(label)}",
                hint="Narrow its patterns: each name is one tensor.",
            )
        result[new] = name
        if new != name:
            renamed[name] = new
    return KeyMap(renamed=renamed), tuple(pattern for pattern, _ in rules if pattern not in used)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    """Models under the first one's names.

    models  in the order given
    maps    what became of each one's names
    notes   what to tell of it: renamed, left out
    """

    models: tuple[Checkpoint, ...]
    maps: tuple[KeyMap, ...]
    notes: tuple[str, ...]


def map_names(models: Sequence[Checkpoint], names: Sequence[str], given: Mapping[int, Rules] | None = None) -> Mapped:
    """Map each model's names to the first's.

    names  what messages call the models
    given  a recipe's maps, by the number of the model; such a model is not mapped any further

    Raises PlanError for ambiguous names and maps that make two tensors one.
    """
    notes: list[str] = []
    maps: list[KeyMap] = []
    mapped: list[Checkpoint] = []
    for number, (model, name) in enumerate(zip(models, names, strict=True)):
        rules = (given or {}).get(number)
        if rules:
            found, unused = given_map(model.tensors, rules, name)
            notes += [f"`key_map` of {quoted(name)}: {quoted(pattern)} matches none of its names" for pattern in unused]
        else:
            found = KeyMap(renamed={}) if number == 0 else find_map(mapped[0].tensors, model.tensors, name)
        if found.renamed:
            notes.append(f"names of {quoted(name)} are mapped: {found.summary()}")
        maps.append(found)
        mapped.append(found.applied(model))
    return Mapped(models=tuple(mapped), maps=tuple(maps), notes=tuple(notes))


def without_dispensable(models: Sequence[Checkpoint], names: Sequence[str]) -> tuple[tuple[Checkpoint, ...], list[str]]:
    """The models without buffers and tied heads that not all of them hold, and notes of what is left out.

    names  what messages call the models
    """
    forms = [{_form(name): entry for name, entry in model.tensors.items()} for model in models]
    dropped: dict[str, str] = {}
    everywhere = set(forms[0]).intersection(*forms) if forms else set()
    for form in set().union(*forms) - everywhere:
        entry = next(own[form] for own in forms if form in own)
        lacking = next(name for name, own in zip(names, forms, strict=True) if form not in own)
        if _is_computed(entry):
            dropped[form] = f"left out, as {quoted(lacking)} does not hold it and models compute it anew"
        elif _HEAD.search(form) and all(_ties(model.config) for model in models):
            dropped[form] = f"left out, as {quoted(lacking)} does not hold it and config.json ties it to the embeddings"
    if not dropped:
        return tuple(models), []
    left = tuple(
        replace(model, tensors={name: entry for name, entry in model.tensors.items() if _form(name) not in dropped})
        for model in models
    )
    return left, [f"{quoted(form.replace(_LAYER, '*'))} is {why}" for form, why in sorted(dropped.items())]


def _is_computed(entry: TensorEntry) -> bool:
    # the causal mask of old GPTs
    mask = entry.name.endswith((".attn.bias", ".attention.bias")) and len(entry.shape) == 4
    return mask or _BUFFER.search(entry.name) is not None


def _ties(config: Mapping[str, Any]) -> bool:
    text = config.get("text_config")
    return config.get("tie_word_embeddings") is True or (isinstance(text, Mapping) and _ties(text))


def _form(name: str) -> str:
    """A name with one sign for its layer's number."""
    parts = layer_parts(name)
    # a number that is not written as we would write it is a name
    if parts is None or name != f"{parts[0]}{parts[1]}{parts[2]}":
        return name
    return f"{parts[0]}{_LAYER}{parts[2]}"


def _bare(form: str) -> str:
    """What is left of a name without wrappers, prefixes and renames."""
    parts = [part for part in form.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _PREFIXES:
        parts.pop(0)
    for tower in _VISION:
        if tuple(parts[: len(tower)]) == tower:
            parts[: len(tower)] = ["vision"]
            break
    return ".".join([*parts[:-1], _ENDINGS.get(parts[-1], parts[-1])]) if parts else form


def _change(old: str, new: str) -> tuple[str, str]:
    """What is replaced by what: the parts of two names between their equal beginnings and ends."""
    left, right = old.split("."), new.split(".")
    while left and right and left[-1] == right[-1]:
        left.pop()
        right.pop()
    end = "." if len(left) < old.count(".") + 1 else ""
    while left and right and left[0] == right[0]:
        left.pop(0)
        right.pop(0)
    return tuple(".".join(parts) + (end if parts else "") for parts in (left, right))  # type: ignore[return-value]
