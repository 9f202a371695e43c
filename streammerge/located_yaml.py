"""Untrusted YAML whose every value knows its line, so that an error can name it."""

from __future__ import annotations

import difflib
import math
import numbers
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from streammerge.errors import RecipeError, escaped, quoted

LARGEST_BYTES = 1 << 20
MOST_VALUES = 100_000
DEEPEST = 32
LONGEST_NUMBER = 400

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A value with the key it stands under and the place it was read from.

    `where` is "recipe.yaml:7" for text and "recipe.models[0].model" for a Python mapping. The reading
    methods return what the recipe needs or raise RecipeError with the place, what was found, and what
    was expected.
    """

    value: Scalar | list[Located] | dict[str, Located]
    key: str
    where: str

    def error(self, message: str, hint: str | None = None) -> RecipeError:
        """An error about this value, to be raised by the caller."""
        return RecipeError(f"{self.where}: {message}", hint=hint)

    def wrong(self, expected: str, hint: str | None = None) -> RecipeError:
        """The error for a value of another kind than `expected`."""
        return self.error(f"{quoted(self.key)} is {self._found()}, expected {expected}", hint)

    def _found(self) -> str:
        if self.value is None:
            return "empty"
        if isinstance(self.value, (dict, list)):
            return "a mapping" if isinstance(self.value, dict) else "a list"
        if isinstance(self.value, str):
            return f"the text {quoted(self.value)}"
        if isinstance(self.value, int) and self.value.bit_length() > 128:
            return "a number of more than 128 bits"
        return f"`{str(self.value).lower()}`"

    def plain(self) -> object:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value

    def mapping(self, expected: str = "a mapping") -> dict[str, Located]:
        if isinstance(self.value, dict):
            return self.value
        raise self.wrong(expected)

    def fields(
        self, known: Collection[str], foreign: Mapping[str, tuple[str, str]] | None = None
    ) -> dict[str, Located]:
        """The mapping's entries that are not empty; a key outside `known` is an error.

        `foreign` gives the message and hint for keys of other tools, which deserve better than a guess.
        """
        foreign = foreign or {}
        found = self.mapping(_with_keys(known))
        for key, entry in found.items():
            if key in foreign and entry.value is not None:
                raise entry.error(*foreign[key])
            if key not in known and key not in foreign:
                raise entry.error(f"unknown key {quoted(key)}", did_you_mean(key, known))
        return {key: entry for key, entry in found.items() if entry.value is not None}

    def items(self, expected: str = "a list") -> list[Located]:
        if isinstance(self.value, list):
            return self.value
        raise self.wrong(expected)

    def text(self, expected: str = "text") -> str:
        if isinstance(self.value, str):
            return self.value
        raise self.wrong(expected)

    def choice(self, options: Collection[str]) -> str:
        if isinstance(self.value, str) and self.value in options:
            return self.value
        raise self.wrong(_listed(options, "or"), nearest(self.value, options))

    def number(self) -> float:
        """A finite number; `true` is none, and `1e-5` is one although YAML 1.1 calls it text."""
        value = self.value
        if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong("a number")
        if (isinstance(value, int) and abs(value) > 2**1000) or not math.isfinite(value):
            raise self.wrong("a finite number")
        return float(value)

    def whole(self) -> int:
        """A whole number; `3.0` is one."""
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise self.wrong("a whole number")
        if isinstance(self.value, float) and not self.value.is_integer():
            raise self.wrong("a whole number")
        return int(self.value)

    def truth(self) -> bool:
        """True or false; mergekit writes them as 1.0 and 0.0 into the cards of its models."""
        if isinstance(self.value, (bool, int, float)) and self.value in (0, 1):
            return bool(self.value)
        raise self.wrong("`true` or `false`")


def nearest(word: object, options: Iterable[str]) -> str | None:
    """The hint that names the option closest in spelling to `word`, if one is close."""
    close = difflib.get_close_matches(word[:100], list(options), 1, 0.75) if isinstance(word, str) else []
    return f"Did you mean {quoted(close[0])}?" if close else None


def did_you_mean(word: object, options: Collection[str]) -> str:
    """`nearest`, or else all the options."""
    return nearest(word, options) or f"Known here: {_listed(options)}."


def _listed(options: Iterable[str], conjunction: str = "and") -> str:
    *most, last = (quoted(option) for option in options)
    return f"{', '.join(most)} {conjunction} {last}" if most else last


def _with_keys(keys: Collection[str]) -> str:
    if len(keys) > 5:
        return f"a mapping with keys such as {_listed(list(keys)[:3])}"
    return f"a mapping with {_listed(keys)}"


def parse(text: str, source: str) -> Located:
    """One YAML document as Located values. Tags that build objects are refused, aliases bounded."""
    if len(text) > LARGEST_BYTES:
        raise too_large(source)
    source = escaped(source)
    loader = _compose_safely(text, source)
    if loader.root is None:
        raise RecipeError(f"{source}:1: the recipe is empty", hint="A recipe starts with `merge_method` and `models`.")
    return _Builder(source, loader).value(loader.root, "recipe", _line(source, loader.root), 0)


def wrap(data: Mapping[str, object], source: str) -> Located:
    """A Python mapping as Located values; places are paths such as `recipe.models[0].model`."""
    return _Wrapper(source).value(data, source, source, 0)


class _Loader(yaml.SafeLoader):
    """PyYAML's composer, stopped before nesting or size can exhaust the interpreter."""

    root: yaml.Node | None
    depth = 0
    count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        self.count += 1
        if self.depth > DEEPEST or self.count > MOST_VALUES:
            raise _TooMuch
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _TooMuch(Exception):
    """More nesting or more values than any recipe has."""


def _compose_safely(text: str, source: str) -> _Loader:
    loader = None
    try:
        loader = _Loader(text)
        loader.root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        if error.context == "expected a single document in the stream":
            raise RecipeError(f"{source}:{line}: a second document starts here, expected one recipe") from error
        raise RecipeError(f"{source}:{line}: not valid YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = f"U+{int(error.character):04X}"
        raise RecipeError(f"{source}:{line}: the character {found} is not allowed in YAML") from error
    except _TooMuch:
        raise _too_much(f"{source}:{loader.line + 1 if loader else 1}") from None
    except (ValueError, OverflowError) as error:
        # PyYAML lets these escape for character codes and version numbers beyond all bounds
        line = loader.line + 1 if loader else 1
        raise RecipeError(f"{source}:{line}: not valid YAML: a number is out of range") from error
    return loader


def too_large(source: str) -> RecipeError:
    """The error for more than LARGEST_BYTES."""
    return RecipeError(f"{quoted(source)} is larger than 1 MiB, which no recipe is")


def _too_much(where: str) -> RecipeError:
    return RecipeError(f"{where}: more than {DEEPEST} levels or {MOST_VALUES} values, which no recipe has")


def _line(source: str, node: yaml.Node) -> str:
    return f"{source}:{node.start_mark.line + 1}"


_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    _TAG + "null": yaml.SafeLoader.construct_yaml_null,
    _TAG + "bool": yaml.SafeLoader.construct_yaml_bool,
    _TAG + "int": yaml.SafeLoader.construct_yaml_int,
    _TAG + "float": yaml.SafeLoader.construct_yaml_float,
}
_TEXTS = {_TAG + "str", _TAG + "timestamp", _TAG + "value", _TAG + "merge"}


class _Builder:
    """Turns composed nodes into Located values; aliases are copied, within MOST_VALUES."""

    def __init__(self, source: str, loader: _Loader) -> None:
        self.source, self.loader, self.count = source, loader, 0

    def value(self, node: yaml.Node, key: str, where: str, depth: int) -> Located:
        self.count += 1
        if depth > DEEPEST or self.count > MOST_VALUES:
            raise _too_much(where)
        value: Scalar | list[Located] | dict[str, Located]
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            value = self.mapping(node, depth)
        elif isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            value = [
                self.value(item, f"{key}[{index}]", _line(self.source, item), depth + 1)
                for index, item in enumerate(node.value)
            ]
        else:
            value = self.scalar(node, where)
        return Located(value=value, key=key, where=where)

    def mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Located]:
        own: dict[str, Located] = {}
        inherited: dict[str, Located] = {}
        for key, value in node.value:
            where = _line(self.source, key)
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{where}: a key is a list or a mapping, expected text")
            if key.tag == _TAG + "merge":
                inherited = self.merged(value, where, depth) | inherited
                continue
            if key.value in own:
                first = own[key.value].where.rpartition(":")[2]
                raise RecipeError(
                    f"{where}: {quoted(key.value)} appears twice, first on line {first}",
                    hint="Keep one of them.",
                )
            own[key.value] = self.value(value, key.value, where, depth + 1)
        return inherited | own

    def merged(self, node: yaml.Node, where: str, depth: int) -> dict[str, Located]:
        """What `<<` brings in: one mapping, or several of which the first wins."""
        found = self.value(node, "<<", where, depth + 1)
        merged: dict[str, Located] = {}
        for part in found.value if isinstance(found.value, list) else [found]:
            merged = part.mapping() | merged
        return merged

    def scalar(self, node: yaml.Node, where: str) -> Scalar:
        if isinstance(node, yaml.ScalarNode):
            if node.tag in _TEXTS:
                return self.text(node, where)
            if node.tag in _SCALARS:
                return self.constructed(node, where)
        tag = node.tag.replace(_TAG, "!!")
        raise RecipeError(
            f"{where}: the tag {quoted(tag)} is not allowed",
            hint="Write plain text, numbers, lists and mappings.",
        )

    def text(self, node: yaml.ScalarNode, where: str) -> str:
        value = str(node.value)
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise RecipeError(f"{where}: {quoted(value)} holds half of a character", hint="Write it as UTF-8.")
        return value

    def constructed(self, node: yaml.ScalarNode, where: str) -> Scalar:
        kind = node.tag.replace(_TAG, "")
        try:
            # the time to read digits in base 60 grows with the square of their number
            if len(node.value) > LONGEST_NUMBER:
                raise ValueError
            value: Scalar = _SCALARS[node.tag](self.loader, node)
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            raise RecipeError(f"{where}: {quoted(node.value)} is not a valid {kind}") from error
        return value


class _Wrapper:
    """Turns plain Python values into Located ones."""

    def __init__(self, source: str) -> None:
        self.source, self.count = source, 0

    def value(self, data: object, key: str, where: str, depth: int) -> Located:
        self.count += 1
        if depth > DEEPEST or self.count > MOST_VALUES:
            raise _too_much(self.source)
        value: Scalar | list[Located] | dict[str, Located]
        if isinstance(data, Mapping):
            value = {}
            for name, entry in data.items():
                if not isinstance(name, str):
                    raise RecipeError(f"{where}: the key {quoted(name)} is not text")
                value[name] = self.value(entry, name, f"{where}.{quoted(name)[1:-1]}", depth + 1)
        elif isinstance(data, (list, tuple)):
            value = [
                self.value(item, f"{key}[{index}]", f"{where}[{index}]", depth + 1) for index, item in enumerate(data)
            ]
        else:
            value = _plain(data, key, where)
        return Located(value=value, key=key, where=where)


def _plain(data: object, key: str, where: str) -> Scalar:
    if isinstance(data, (str, bool)) or data is None:
        return data
    if isinstance(data, os.PathLike):
        return os.fsdecode(data)
    if isinstance(data, numbers.Integral):
        return int(data)
    if isinstance(data, numbers.Real):
        return float(data)
    kind = type(data).__name__
    raise RecipeError(f"{where}: {quoted(key)} is of type {kind}, expected text, numbers, lists or mappings")
