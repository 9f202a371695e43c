"""A method parameter's value in a recipe: one for all tensors, by depth, or by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from streammerge.errors import RecipeError
from streammerge.located_yaml import Located
from streammerge.methods import Parameter
from streammerge.scalars import read_method

Value = float | int | bool | str | Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A parameter's value by tensor: the first case whose filter is None or part of the name counts.

    A case's value is a scalar, or a tuple of numbers: a curve over depth, straight between its points.
    `where` is the place that it was read from.
    """

    cases: tuple[tuple[str | None, Value | tuple[float, ...]], ...]
    where: str = field(default="", compare=False)

    def value(self, name: str, position: float) -> Value | None:
        """The value for a tensor at a depth in [0, 1], or None where no case speaks of it."""
        for part, value in self.cases:
            if part is None or part in name:
                return _interpolate(value, position) if isinstance(value, tuple) else value
        return None

    def to_plain(self) -> object:
        """The setting as YAML would write it."""
        plain = [(part, list(value) if isinstance(value, tuple) else value) for part, value in self.cases]
        if len(plain) == 1 and plain[0][0] is None:
            return plain[0][1]
        return [{"value": value} if part is None else {"filter": part, "value": value} for part, value in plain]


def _interpolate(points: tuple[float, ...], position: float) -> float:
    assert 0 <= position <= 1, f"position {position} is outside [0, 1]"
    place = position * (len(points) - 1)
    left = int(place)
    right = min(left + 1, len(points) - 1)
    return points[left] * (1 - (place - left)) + points[right] * (place - left)


def required(fields: Mapping[str, Located], key: str, owner: Located) -> Located:
    """A field that must be there."""
    if key in fields:
        return fields[key]
    raise owner.error(f"`{key}` is missing")


def read_setting(node: Located, parameter: Parameter) -> Setting:
    """A parameter's value as written: a scalar, a curve over depth, or cases by tensor name."""
    try:
        return _setting(node, parameter)
    except RecipeError as error:
        explained = f"`streammerge methods {parameter.method}` explains `{parameter.name}`."
        raise RecipeError(error.message, hint=error.hint or explained) from None


def _setting(node: Located, parameter: Parameter) -> Setting:
    items = node.value if isinstance(node.value, list) else None
    if items and all(isinstance(item.value, dict) for item in items):
        return Setting(cases=tuple(_case(item, parameter) for item in items), where=node.where)
    if isinstance(node.value, dict):
        raise node.wrong("a value or a list of `filter` and `value`")
    return Setting(cases=((None, _value(node, parameter)),), where=node.where)


def _case(node: Located, parameter: Parameter) -> tuple[str | None, Value | tuple[float, ...]]:
    fields = node.fields(("filter", "value"))
    part = fields["filter"].text() if "filter" in fields else "*"
    return None if part == "*" else part, _value(required(fields, "value", node), parameter)


def _value(node: Located, parameter: Parameter) -> Value | tuple[float, ...]:
    kind = parameter.type.removesuffix(" | None")
    if isinstance(node.value, list) and node.value and kind in ("float", "int"):
        # between two numbers of an interval there is none outside of it
        return tuple(_inside(parameter, item, item.number()) for item in node.value)
    if parameter.choices:
        return node.choice(parameter.choices)
    value = _READ[kind](node)
    return _inside(parameter, node, value) if isinstance(value, (int, float)) else value


def _inside(parameter: Parameter, node: Located, number: float) -> float:
    if parameter.interval is not None and number not in parameter.interval:
        raise node.wrong(str(parameter.interval))
    return number


_READ: Mapping[str, Callable[[Located], Value]] = {
    "float": Located.number,
    "int": Located.whole,
    "bool": Located.truth,
    "str": Located.text,
    "method": lambda node: read_method(node).name,
}
