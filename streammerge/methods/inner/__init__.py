"""The rule inside a method that wraps one: found, checked, run and priced. Loads no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from streammerge import methods
from streammerge.errors import MergeError, quoted
from streammerge.solve.cost import Cost
from streammerge.solve.cost_spectral import eigen_flops, spectral

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.delta import Deltas

# whether a rule looks at the whole model does not depend on the matrix
_ANY_SHAPE = (1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """A rule and its arguments, checked against its declaration."""

    method: methods.Method
    arguments: Mapping[str, Any]

    def merge(self, deltas: Deltas) -> Tensor:
        """Merge a whole matrix by the rule: the merged delta."""
        return self.method.merge(deltas, **self.arguments)

    def cost(self, shape: tuple[int, int], experts: int, itemsize: int) -> Cost:
        """Price of merging a whole matrix by the rule."""
        price = self.method.cost(shape, experts, self.arguments, itemsize)
        if self.method.streams_by == "matrix":
            return price
        block = price.block_buffers * shape[0] * shape[1] * itemsize
        # its looks read the matrix again, while that is merged
        return replace(price, workspace_bytes=block + price.workspace_bytes, passes=price.looks + price.passes, looks=0)


def inner(wrapper: str, rule: str, settings: Mapping[str, Any] | None) -> Inner:
    """The rule of that name with its parameters, as `wrapper` runs it.

    Raises MergeError for a rule that does not exist or cannot be wrapped, for an unknown parameter and
    for a value that is not of its type.
    """
    if rule not in methods.METHODS:
        near = difflib.get_close_matches(rule, methods.names(), n=1)
        meant = f"Did you mean `{near[0]}`? " if near else ""
        raise MergeError(
            f"unknown rule {quoted(rule)} for method `{wrapper}`", hint=f"{meant}`streammerge methods` lists them."
        )
    method = methods.describe(rule)
    if method.beside:
        raise MergeError(
            f"`{wrapper}` cannot wrap `{rule}`, which needs a {method.beside} beside each expert",
            hint=f"Use `{rule}` by itself, or another rule.",
        )
    arguments = {}
    for name, value in (settings or {}).items():
        parameter = method.parameters.get(name.rstrip("_"))
        if parameter is None:
            near = difflib.get_close_matches(name, method.parameters, n=1)
            meant = f"Did you mean `{near[0]}`? " if near else ""
            raise MergeError(
                f"unknown parameter {quoted(name)} for rule `{rule}` of method `{wrapper}`",
                hint=f"{meant}`streammerge methods {rule}` lists them.",
            )
        if not _fits(value, parameter):
            expected = " or ".join(f"`{c}`" for c in parameter.choices) or f"of type {parameter.type}"
            raise MergeError(
                f"`{name}` of rule `{rule}` is {quoted(value)}, expected {expected}",
                hint=f"`streammerge methods {rule}` explains it.",
            )
        arguments[parameter.keyword] = value
    if method.cost(_ANY_SHAPE, 1, arguments, 4).look_scope == "model":
        raise MergeError(
            f"`{wrapper}` cannot wrap `{rule}`, which looks at the whole model first",
            hint="Choose parameters that look at one tensor, or another rule.",
        )
    return Inner(method=method, arguments=arguments)


def _fits(value: object, parameter: methods.Parameter) -> bool:
    if parameter.choices:
        return value in parameter.choices
    if parameter.type == "settings":
        return value is None or isinstance(value, Mapping)
    if parameter.per_expert and isinstance(value, Sequence) and not isinstance(value, str):
        return all(_fits(each, parameter) and not isinstance(each, Sequence) for each in value)
    if isinstance(value, bool):
        return parameter.type == "bool"
    if parameter.type == "float":
        return isinstance(value, (int, float))
    return isinstance(value, int if parameter.type == "int" else str)


def _inner_of(wrapper: str, parameters: Mapping[str, Any]) -> Inner:
    return inner(wrapper, str(parameters.get("rule", "ties")), parameters.get("rule_parameters"))


def _together(own: Cost, within: Cost, passes: int) -> Cost:
    return Cost(
        workspace_bytes=own.workspace_bytes + within.workspace_bytes,
        flops=own.flops + within.flops,
        passes=passes,
        device_bytes=_device_bytes(own) + _device_bytes(within),
    )


def _device_bytes(price: Cost) -> int:
    return price.workspace_bytes if price.device_bytes is None else price.device_bytes


def knots_cost(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of KnOTS around a rule, which merges [min(out, T·in), in]."""
    rows, columns = shape
    rank = min(rows, experts * columns)
    within = _inner_of("knots", parameters).cost((rank, columns), experts, itemsize)
    # one expert's change, the basis twice over as it is reordered, and the product on its way
    elements = rows * columns + rows**2 + rank * rows + rank * columns
    parts = (experts + 1) * rank * columns + rows * columns
    flops = 2 * (experts + 1) * rows * columns * (rows + rank) + eigen_flops(rows)
    own = spectral(elements, rows, flops, passes=2, narrow_bytes=parts * itemsize)
    return _together(own, within, passes=2)


def svc_cost(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of singular value calibration after a rule."""
    rows, columns = shape
    size, matrix = min(shape), rows * columns
    within = _inner_of("svc", parameters).cost(shape, experts, itemsize)
    # the merged delta, one expert's; left directions, and both deltas along them
    elements = 2 * matrix + size**2 + size * (rows + 2 * columns)
    flops = 4 * matrix * size + eigen_flops(size) + 2 * (experts + 2) * matrix * size
    own = spectral(elements, size, flops, passes=1, narrow_bytes=matrix * itemsize)
    return _together(own, within, passes=within.passes + 1)


def larv_cost(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of LARV: a look at every matrix of the model, then a rule in the memory that the look took."""
    rows, columns = shape
    size, matrix = min(shape), rows * columns
    within = _inner_of("larv", parameters).cost(shape, experts, itemsize)
    # the base, in the stream's dtype first, and the experts' sum; three products of their shorter side
    flops = 6 * matrix * size + 4 * size**3 + experts * matrix
    own = spectral(2 * matrix + 3 * size**2, size, flops, passes=1, narrow_bytes=2 * matrix * itemsize)
    # scaled changes have no working format on a device: a rule that stacks them takes them as they are
    device_bytes = _device_bytes(within) + experts * matrix * itemsize
    return replace(
        within,
        workspace_bytes=max(own.workspace_bytes, within.workspace_bytes),
        device_bytes=max(_device_bytes(own), device_bytes),
        flops=own.flops + within.flops,
        looks=1,
        look_scope="model",
    )
