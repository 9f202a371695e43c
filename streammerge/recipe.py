"""What to merge and how: a YAML recipe, a superset of mergekit's config."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import yaml

from streammerge import located_yaml, methods, patterns
from streammerge.errors import RecipeError, quoted
from streammerge.located_yaml import Located, did_you_mean, nearest
from streammerge.locations import same_model, short_names
from streammerge.methods import Method, Parameter
from streammerge.recipe_files import DAMAGED_REPORT, Past, contents, past_of, read_report
from streammerge.scalars import (
    DTYPES,
    NonFinite,
    Rounding,
    read_dtype,
    read_key_map,
    read_method,
    read_non_finite,
    read_regex,
    read_rounding,
    read_seed,
)
from streammerge.settings import Setting, read_setting, required
from streammerge.slices import Slice, Source, WrittenSlice, first_of_base, written_slices
from streammerge.token_rules import UNION, TokenRule, read_multiple, read_token_rules

Read = TypeVar("Read")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """A model to merge: a folder, a file or a hub name, its own settings, and the data its method needs beside it.

    key_map  patterns in the names of its tensors, and what they are replaced by to give the first model's names
    """

    location: str
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    beside: str | None = None
    key_map: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What happens to the tensors whose name `match` finds: another method, or the base unchanged."""

    match: str
    method: str | None = None
    keep_base: bool = False
    parameters: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A recipe that was read and checked. Two are equal when they ask for the same merge.

    slices  where the recipe stacks layers: which of its models each layer comes from; `experts` then lists all models
            beside the base, and what is set for them lies in the slices
    non_finite  refuse: a NaN or an infinity ends the merge; pass: methods that merge each element by itself let those
            of the inputs through, and all methods what the output's dtype cannot hold
    tokens, pad_to_multiple_of  of the vocabulary that `tokenizer_source` names: rows of single tokens, rows in all
    quantize  base: weights that the base stores in 8-bit floats are stored so again, with scales of their own
    past    of a recipe that was read from a report: the merge that it reproduces
    """

    method: str
    base: str | None
    experts: tuple[Expert, ...]
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    dtype: str | None = None
    out_dtype: str | None = None
    rounding: Rounding = "nearest"
    non_finite: NonFinite = "refuse"
    seed: int = 0
    quantize: str | None = None
    tokenizer_source: str | None = None
    tokens: tuple[TokenRule, ...] = ()
    pad_to_multiple_of: int | None = None
    chat_template: str | None = None
    name: str | None = None
    slices: tuple[Slice, ...] = ()
    warnings: tuple[str, ...] = field(default=(), compare=False)
    written: str | None = field(default=None, compare=False, repr=False)
    past: Past | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def load(source: str | os.PathLike[str] | Mapping[str, object] | Recipe) -> Recipe:
        """A recipe from a path (a YAML file's or a report's), a mapping, or YAML itself: text of more than one line."""
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return Recipe.from_dict(source)
        if isinstance(source, str) and "\n" in source:
            return Recipe.from_yaml(source)
        return Recipe.from_file(source)

    @staticmethod
    def from_yaml(text: str, source: str = "recipe.yaml") -> Recipe:
        """Read YAML; `source` is its name in messages. Relative paths start at the current folder."""
        return _Reader(located_yaml.parse(text, source), None).recipe(text)

    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> Recipe:
        """Read a file, YAML or a report. Relative paths start at the current folder or else at the file's."""
        if os.fspath(path).endswith(".json") and (report := read_report(Path(path))) is not None:
            return Recipe.from_report(report, str(path), os.path.dirname(path))
        text = contents(Path(path))
        return _Reader(located_yaml.parse(text, str(path)), os.path.dirname(path)).recipe(text)

    @staticmethod
    def from_report(report: Mapping[str, object], source: str, folder: str | None = None) -> Recipe:
        """The recipe in a report, `streammerge.json` read as JSON, with what reproduces its merge.

        source  the report's name in messages
        folder  where relative paths start that do not exist at the current folder
        """
        recipe = report.get("recipe")
        if not isinstance(recipe, dict):
            raise RecipeError(f"{quoted(source)} holds no `recipe`", hint=DAMAGED_REPORT)
        found = _Reader(located_yaml.wrap(recipe, f"{source}: recipe"), folder).recipe(None)
        return replace(found, past=past_of(report, source, len(found.locations)))

    @staticmethod
    def from_located(node: Located, folder: str | None = None) -> Recipe:
        """Read a recipe inside another file; relative paths start at the current folder or else at `folder`."""
        return _Reader(node, folder).recipe(None)

    @staticmethod
    def from_dict(mapping: Mapping[str, object]) -> Recipe:
        """Read a mapping with the keys that YAML would have."""
        return _Reader(located_yaml.wrap(mapping, "recipe"), None).recipe(None)

    @property
    def text(self) -> str:
        """The YAML as it was written, or as it would be."""
        if self.written is not None:
            return self.written
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def output_dtype(self) -> str | None:
        """The safetensors code ("BF16") to write, or None to keep what the models have."""
        dtype = self.out_dtype or self.dtype
        return DTYPES[dtype] if dtype else None

    def to_dict(self) -> dict[str, object]:
        """Plain values without empty or default ones; loading them gives an equal recipe."""
        models = [self._plain_expert(expert, expert.parameters) for expert in self.experts]
        plain: dict[str, object] = {
            "name": self.name,
            "merge_method": self.method,
            "base_model": self.base,
            "models": None if self.slices else models,
            "slices": [self._plain_slice(part) for part in self.slices],
            "parameters": _plain_settings(self.parameters),
            "rules": [_plain_rule(rule) for rule in self.rules],
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
            "rounding": None if self.rounding == "nearest" else self.rounding,
            "non_finite": None if self.non_finite == "refuse" else self.non_finite,
            "seed": self.seed or None,
            "quantize": self.quantize,
            **self._plain_tokenizer(),
            "chat_template": self.chat_template,
        }
        return _plain(**plain)

    def _plain_tokenizer(self) -> dict[str, object]:
        if not self.tokens and self.pad_to_multiple_of is None:
            return {"tokenizer_source": self.tokenizer_source}
        tokens = {rule.token: rule.to_plain() for rule in self.tokens}
        multiple = self.pad_to_multiple_of
        return {"tokenizer": _plain(source=self.tokenizer_source, tokens=tokens, pad_to_multiple_of=multiple)}

    def _plain_expert(self, expert: Expert, parameters: Mapping[str, Setting], *layers: int) -> dict[str, object]:
        beside = {str(methods.describe(self.method).beside): expert.beside}
        plain = _plain_settings(parameters)
        keys = dict(expert.key_map)
        return _plain(model=expert.location, layer_range=list(layers), key_map=keys, parameters=plain, **beside)

    def _plain_slice(self, part: Slice) -> dict[str, object]:
        method, base = methods.describe(self.method), part.base or self.base
        sources = [
            self._plain_expert(self.experts[each.expert], each.parameters, each.first, each.first + part.layers)
            for each in part.sources
        ]
        if base is not None and part.base_first is not None and (method.needs_base or method.takes_base):
            layers = [part.base_first, part.base_first + part.layers]
            sources.insert(0, {"model": base, "layer_range": layers})
        return _plain(sources=sources, base_model=part.base, parameters=_plain_settings(part.parameters))

    def rule_for(self, name: str) -> Rule | None:
        """The first rule that matches a tensor's name."""
        try:
            return next((rule for rule in self.rules if patterns.compiled(rule.match).is_in(name)), None)
        except patterns.PatternError as error:
            raise RecipeError(f"a rule's {error}", hint="Write its `match` with fewer repetitions.") from error

    def resolve(
        self,
        method: Method,
        tensor: str,
        position: float,
        rule: Rule | None = None,
        part: Slice | None = None,
        stored: Sequence[str] = (),
    ) -> dict[str, object]:
        """The keyword arguments of a method's function for one tensor at a depth in [0, 1].

        part    the slice that the tensor belongs to, where the recipe has any
        stored  of a slice's tensor: its name in each of the experts, by which filters for experts go

        Per-expert parameters come as one float per expert. The recipe's own settings belong to its own
        method; any other method gets its declared defaults and what the rule that names it sets.
        """
        assert rule is None or rule.method == method.name, f"a rule for {rule.method} cannot set {method.name}"
        first: list[Mapping[str, Setting]] = [rule.parameters] if rule else []
        own = method.name == self.method
        last = [*([part.parameters] if part else []), self.parameters] if own else []
        experts = [each.parameters for each in (part.sources if part else self.experts)]
        arguments: dict[str, object] = {}
        for parameter in method.parameters.values():
            value = partial(_first_value, parameter, position)
            if parameter.per_expert:
                arguments[parameter.keyword] = tuple(
                    cast(float, value(name, [*first, *([settings] if own else []), *last]))
                    for settings, name in zip(experts, stored or [tensor] * len(experts), strict=True)
                )
            else:
                arguments[parameter.keyword] = value(tensor, [*first, *last])
        return arguments

    def place_of(self, method: Method, parameter: str, rule: Rule | None = None, part: Slice | None = None) -> str:
        """Where a parameter was set, the narrowest place first: `recipe.yaml:7: `; empty where it has its default."""
        own = method.name == self.method
        sources = [*(part.sources if part else self.experts)] if own else []
        last = [*([part.parameters] if part else []), self.parameters] if own else []
        for settings in (*([rule.parameters] if rule else []), *(each.parameters for each in sources), *last):
            if parameter in settings:
                return f"{settings[parameter].where}: "
        return ""

    @property
    def locations(self) -> tuple[str, ...]:
        """Every folder that is read: the base, if there is one, the experts, then what lies beside them."""
        besides = (each.beside for each in self.experts if each.beside)
        return (*([self.base] if self.base else []), *(each.location for each in self.experts), *besides)

    def relocated(self, new: Mapping[str, str]) -> Recipe:
        """The same recipe with other words for some of its `locations`."""

        def moved(location: str | None) -> str | None:
            return new.get(location, location) if location else location

        experts = tuple(
            replace(each, location=new.get(each.location, each.location), beside=moved(each.beside))
            for each in self.experts
        )
        return replace(
            self,
            base=moved(self.base),
            experts=experts,
            slices=tuple(replace(each, base=moved(each.base)) for each in self.slices),
            tokenizer_source=moved(self.tokenizer_source),
            tokens=tuple(replace(each, model=moved(each.model)) for each in self.tokens),
            chat_template=moved(self.chat_template),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Short names for messages, each different: the base's, if there is one, then the experts'."""
        return short_names([*([self.base] if self.base else []), *(each.location for each in self.experts)])


def _first_value(parameter: Parameter, position: float, tensor: str, settings: list[Mapping[str, Setting]]) -> object:
    for mapping in settings:
        value = mapping[parameter.name].value(tensor, position) if parameter.name in mapping else None
        if value is not None:
            return round(value) if parameter.type == "int" and isinstance(value, float) else value
    return float(cast(float, parameter.default)) if parameter.per_expert else parameter.default


def _plain(**entries: object) -> dict[str, object]:
    return {key: value for key, value in entries.items() if value not in (None, [], {})}


def _plain_settings(settings: Mapping[str, Setting]) -> dict[str, object]:
    return {name: setting.to_plain() for name, setting in settings.items()}


def _plain_rule(rule: Rule) -> dict[str, object]:
    return _plain(
        match=rule.match,
        merge_method=rule.method,
        keep="base" if rule.keep_base else None,
        parameters=_plain_settings(rule.parameters),
    )


_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "rules",
    "dtype",
    "out_dtype",
    "rounding",
    "non_finite",
    "seed",
    "quantize",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
)
_MERGEKIT_KEYS = {
    "modules": (
        "`modules` merges a model's parts by recipes of their own in mergekit; streammerge has one for all",
        "List the models under `models`, or their layers under `slices`; `rules` treat tensors differently by name.",
    )
}
_MERGEKIT_MODEL_KEYS = {
    "layer_range": (
        "`layer_range` stands beside a `model` that is not a source of a slice",
        "Remove it to merge all layers, or list the model in a slice's `sources`.",
    ),
}
_MERGEKIT_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
# parameters that mergekit takes and that change no result: of every method, and of some
_IGNORED = {"int8_mask": "it saves memory in mergekit and changes no result"}
_IGNORED_BY = {
    "task_arithmetic": dict.fromkeys(("density", "rescale"), "`task_arithmetic` drops no entries, nor does mergekit's"),
}


class _Reader:
    """Reads one recipe, and knows what its fields need to know of each other."""

    def __init__(self, root: Located, folder: str | None) -> None:
        self.root, self.folder = root, folder
        self.warnings: list[str] = []
        self.fields = root.fields(_KEYS, _MERGEKIT_KEYS)
        self.method = read_method(required(self.fields, "merge_method", root))
        self.base = self.optional("base_model", self.location)
        self.slices: tuple[Slice, ...] = ()
        if "slices" in self.fields:
            if "models" in self.fields:
                raise self.fields["slices"].error("`slices` and `models` say the same thing twice", "Keep one.")
            self.experts, self.slices = self.read_slices(self.fields["slices"])
        else:
            self.needs_base(self.method, self.fields["merge_method"])
            self.experts = self.read_experts(required(self.fields, "models", root))
        self.models = [*([self.base] if self.base else []), *(expert.location for expert in self.experts)]

    def recipe(self, written: str | None) -> Recipe:
        parameters = self.parameters(self.fields.get("parameters"), self.method)
        tokenizer_source, tokens, multiple = self.tokenizer()
        self.warn_of_unmerged_base(parameters)
        return Recipe(
            method=self.method.name,
            base=self.base,
            experts=self.experts,
            parameters=parameters,
            rules=tuple(self.rule(item) for item in self.optional("rules", Located.items) or ()),
            dtype=self.optional("dtype", read_dtype),
            out_dtype=self.optional("out_dtype", read_dtype),
            rounding=self.optional("rounding", read_rounding) or "nearest",
            non_finite=self.optional("non_finite", read_non_finite) or "refuse",
            seed=self.optional("seed", read_seed) or 0,
            quantize=self.optional("quantize", lambda node: node.choice(("base",))),
            tokenizer_source=tokenizer_source,
            tokens=tokens,
            pad_to_multiple_of=multiple,
            chat_template=self.optional("chat_template", self.chat_template),
            name=self.optional("name", Located.text),
            slices=self.slices,
            warnings=tuple(self.warnings),
            written=written,
        )

    def optional(self, key: str, read: Callable[[Located], Read]) -> Read | None:
        return read(self.fields[key]) if key in self.fields else None

    def needs_base(self, method: Method, node: Located) -> None:
        if not method.needs_base:
            return
        bases = [part.base or self.base for part in self.slices] or [self.base]
        if None in bases:
            hint = "Add `base_model` with the model that the experts were trained from."
            raise node.error(f"method `{method.name}` needs a base model", hint)
        self.needs_base_layers(node)

    def needs_base_layers(self, node: Located) -> None:
        for number, part in enumerate(self.slices):
            if part.base_first is None:
                found = f"no layers of the base go with those of `slices[{number}]`"
                raise node.error(found, "List the base as a source of the slice, with a `layer_range` as long.")

    def read_experts(self, node: Located) -> tuple[Expert, ...]:
        # configs often list the base too; to a method of changes it has nothing to add
        skips_base = self.method.needs_base or self.method.takes_base
        read = (self.expert(item, self.base if skips_base else None) for item in node.items("a list of models"))
        experts = tuple(expert for expert in read if expert)
        if not experts:
            raise _no_expert(node)
        return experts

    def expert(self, node: Located, base: str | None) -> Expert | None:
        """A model with what is set for it; None for the base."""
        beside = self.method.beside
        known = ("model", "lora", "parameters", "key_map", *([beside] if beside else []))
        fields = node.fields(known, _MERGEKIT_MODEL_KEYS)
        location = self.adapted(self.location(required(fields, "model", node)), fields)
        if same_model(location, base):
            if "key_map" in fields:
                raise fields["key_map"].error(
                    "`key_map` of the base, whose names all others are mapped to", "Remove it."
                )
            return None
        parameters = self.parameters(fields.get("parameters"), self.method, of_expert=True)
        data = self.found(required(fields, beside, node).text("a folder")) if beside else None
        key_map = read_key_map(fields["key_map"]) if "key_map" in fields else ()
        return Expert(location=location, parameters=parameters, beside=data, key_map=key_map)

    def read_slices(self, node: Located) -> tuple[tuple[Expert, ...], tuple[Slice, ...]]:
        """Every model that the slices name beside the base, each once, and the slices."""
        experts: list[Expert] = []
        slices = tuple(self.slice(written, experts) for written in written_slices(node))
        return tuple(experts), slices

    def slice(self, written: WrittenSlice, experts: list[Expert]) -> Slice:
        """One slice; models that it is the first to name are added to `experts`."""
        own_base = self.location(written.base) if written.base else None
        base, method = own_base or self.base, self.method
        if method.needs_base and base is None:
            hint = "Add `base_model` with the model that the experts were trained from."
            raise written.node.error(f"method `{method.name}` needs a base model", hint)
        skips_base = method.needs_base or method.takes_base
        read = [(source, self.expert(source.model, base if skips_base else None)) for source in written.sources]
        sources = [
            Source(
                expert=_place(experts, replace(expert, parameters={})),
                first=source.first,
                parameters=expert.parameters,
                where=source.model.where,
            )
            for source, expert in read
            if expert
        ]
        if not sources:
            raise _no_expert(written.listing)
        of_base = [each.first for each, expert in read if expert is None or same_model(expert.location, base)]
        needed = base if skips_base else None
        first = None if base is None else first_of_base(written, of_base, [each.first for each in sources], needed)
        if own_base is not None:
            known = next(
                (each for each in (self.base, *(e.location for e in experts)) if same_model(own_base, each)), None
            )
            own_base = known or experts[_place(experts, Expert(location=own_base))].location
        return Slice(
            layers=written.layers,
            sources=tuple(sources),
            base=own_base,
            base_first=first,
            parameters=self.parameters(written.parameters, method),
            where=written.node.where,
        )

    def location(self, node: Located) -> str:
        """A model as text, or in mergekit's long form {model: {path: PATH, revision: REVISION}, lora: …}."""
        fields: Mapping[str, Located] = {}
        if isinstance(node.value, dict):
            fields = node.fields(("model", "lora", "override_architecture"), _MERGEKIT_MODEL_KEYS)
            if "override_architecture" in fields:
                self.warn(fields["override_architecture"], "tensors are matched by name, whatever the architecture")
            node = required(fields, "model", node)
        return self.adapted(self.place(node, "the folder, file or hub name of a model"), fields)

    def place(self, node: Located, expected: str) -> str:
        revision = ""
        if isinstance(node.value, dict):
            fields = node.fields(("path", "revision"))
            node = required(fields, "path", node)
            revision = "@" + fields["revision"].text() if "revision" in fields else ""
        found = self.both_found(node.text(expected))
        if not found:
            raise node.wrong(expected)
        return found + revision

    def adapted(self, model: str, fields: Mapping[str, Located]) -> str:
        """The model with the adapter that `lora` names, as BASE+ADAPTER."""
        lora = fields.get("lora")
        return (
            model if lora is None or lora.value is None else f"{model}+{self.place(lora, 'the folder of an adapter')}"
        )

    def both_found(self, path: str) -> str:
        """`found`, also of both sides of BASE+ADAPTER."""
        base, plus, adapter = path.rpartition("+")
        whole = self.found(path)
        return f"{self.both_found(base)}+{self.found(adapter)}" if plus and not os.path.exists(whole) else whole

    def found(self, path: str) -> str:
        beside = os.path.join(self.folder or "", path)
        return beside if os.path.exists(beside) and not os.path.exists(path) else path

    def warn(self, node: Located, reason: str) -> None:
        self.warnings.append(f"{node.where}: `{node.key}` is ignored: {reason}")

    def warn_of_unmerged_base(self, parameters: Mapping[str, Setting]) -> None:
        # mergekit adds an unlisted base to `models`, where it has the settings that each model needs
        per_expert = {each.name for each in self.method.parameters.values() if each.per_expert}
        added = "models" in self.fields and (not per_expert or not per_expert.isdisjoint(parameters))
        listed = any(same_model(expert.location, self.base) for expert in self.experts)
        if self.base and added and not listed and not (self.method.needs_base or self.method.takes_base):
            reason = f"`{self.method.name}` merges what `models` lists, where mergekit would add the base"
            self.warn(self.fields["base_model"], reason)

    def parameters(self, node: Located | None, method: Method, of_expert: bool = False) -> dict[str, Setting]:
        known = method.parameters
        ignored = _IGNORED | _IGNORED_BY.get(method.name, {})
        settings = {}
        for name, value in node.mapping().items() if node and node.value is not None else ():
            if name in ignored:
                self.warn(value, ignored[name])
                continue
            if name not in known:
                listing = f"`streammerge methods {method.name}` lists "
                near = nearest(name, known)
                hint = f"{near} {listing}them." if near else f"{listing}its parameters."
                raise value.error(f"unknown parameter {quoted(name)} for method `{method.name}`", hint)
            parameter = known[name]
            if of_expert and not parameter.per_expert:
                hint = "Move it to `parameters` at the top of the recipe."
                raise value.error(f"`{name}` is one value for the whole merge, found under a model", hint)
            settings[name] = (
                self.inner(node, value, method) if parameter.type == "settings" else read_setting(value, parameter)
            )
        return settings

    def inner(self, node: Located | None, value: Located, method: Method) -> Setting:
        """The parameters of the method that another one wraps, checked against that method: one value each."""
        wrapped = value.key.removesuffix("_parameters")
        given = node.mapping().get(wrapped) if node else None
        rule = read_method(given) if given else methods.describe(str(method.parameters[wrapped].default))
        if value.value is not None and not isinstance(value.value, dict):
            raise value.wrong(
                f"a mapping of parameters of `{rule.name}`", f"`streammerge methods {rule.name}` lists them."
            )
        found = self.parameters(value, rule)
        plain = {name: setting.value("", 0.0) for name, setting in found.items()}
        if any(setting.to_plain() != plain[name] for name, setting in found.items()):
            raise value.error(f"`{value.key}` has one value for each parameter, found a list", "Write a single value.")
        return Setting(cases=((None, plain),), where=value.where)

    def rule(self, node: Located) -> Rule:
        fields = node.fields(("match", "merge_method", "keep", "parameters"))
        match = read_regex(required(fields, "match", node))
        if ("merge_method" in fields) == ("keep" in fields):
            found = "both" if "keep" in fields else "neither"
            raise node.error(f"a rule has `merge_method` or `keep`, found {found}")
        if "merge_method" in fields:
            method = read_method(fields["merge_method"])
            self.needs_base(method, fields["merge_method"])
            if method.beside not in (None, self.method.beside):
                needs = f"method `{method.name}` needs a {method.beside} beside each expert"
                own = f"Make it the recipe's `merge_method`, with a `{method.beside}` for each model."
                raise fields["merge_method"].error(f"{needs}, which those of `{self.method.name}` have not", own)
            parameters = self.parameters(fields.get("parameters"), method)
            return Rule(match=match, method=method.name, parameters=parameters)
        fields["keep"].choice(("base",))
        if self.base is None and not (self.slices and all(part.base for part in self.slices)):
            raise fields["keep"].error("`keep: base` without a base model", "Add `base_model`.")
        self.needs_base_layers(fields["keep"])
        if "parameters" in fields:
            raise fields["parameters"].error("`parameters` beside `keep`, which has none", "Remove them.")
        return Rule(match=match, keep_base=True)

    def tokenizer(self) -> tuple[str | None, tuple[TokenRule, ...], int | None]:
        """Whose vocabulary the output has, the rules for single tokens, and what its rows are a multiple of."""
        node = self.fields.get("tokenizer_source")
        if "tokenizer" not in self.fields:
            return None if node is None else self.vocabulary_of(node), (), None
        tokenizer = self.fields["tokenizer"]
        if node:
            raise tokenizer.error("`tokenizer` and `tokenizer_source` say the same thing twice", "Keep one.")
        fields = tokenizer.fields(("source", "tokens", "pad_to_multiple_of"))
        source = self.vocabulary_of(fields["source"]) if "source" in fields else UNION
        tokens = read_token_rules(fields["tokens"], self.token_model) if "tokens" in fields else ()
        multiple = read_multiple(fields["pad_to_multiple_of"]) if "pad_to_multiple_of" in fields else None
        return source, tokens, multiple

    def vocabulary_of(self, node: Located) -> str:
        if node.value == UNION:
            return UNION
        return self.model(node, "`base`, `union` or a model of this recipe", ("base", UNION))

    def token_model(self, node: Located) -> str:
        found = self.model(node, "a model of this recipe", ("base",))
        return str(self.base) if found == "base" else found

    def chat_template(self, node: Located) -> str:
        text = node.text("text")
        if text == "auto" or "{{" in text or "{%" in text:
            return text
        expected = "`auto`, `base`, a model of this recipe, or a template with `{{` or `{%`"
        if text in _MERGEKIT_TEMPLATES:
            raise node.wrong(expected, "mergekit bundles this template; write its text here.")
        return self.model(node, expected, ("auto", "base"))

    def model(self, node: Located, expected: str, keywords: tuple[str, ...]) -> str:
        """The base or an expert, in the spelling that `base_model` or `models` has."""
        if node.value == "base":
            if self.base is None:
                raise node.error(f"`{node.key}: base` without a base model", "Add `base_model`.")
            return "base"
        location = self.location(node)
        for model in self.models:
            if same_model(location, model):
                return model
        raise node.wrong(expected, did_you_mean(node.value, [*keywords, *self.models]))


def _no_expert(node: Located) -> RecipeError:
    found = "only the base model" if node.value else "no model"
    return node.error(f"{quoted(node.key)} lists {found}", "List at least one model to merge.")


def _place(experts: list[Expert], expert: Expert) -> int:
    """Where an expert stands in a list, at its end if it is not there yet."""
    if expert not in experts:
        experts.append(expert)
    return experts.index(expert)
