"""The rule inside a method that wraps one: found, run and priced. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from streammerge import methods
from streammerge.solve.cost import Cost
from streammerge.solve.cost_spectral import eigen_flops, spectral

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.delta import Deltas


@dataclass(frozen=True, slots=True)
class Inner:
    """A rule and its arguments."""

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


def inner(wrapper: str, parameters: Mapping[str, Any]) -> Inner:
    """The rule that `wrapper` runs by its own parameters, with its arguments; `Method.complaint` says which can be."""
    wrapped = methods.describe(wrapper).wrapped(parameters)
    assert wrapped is not None, f"{wrapper} wraps no method"
    return Inner(*wrapped)


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
    within = inner("knots", parameters).cost((rank, columns), experts, itemsize)
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
    within = inner("svc", parameters).cost(shape, experts, itemsize)
    # the merged delta, one expert's; left directions, and both deltas along them
    elements = 2 * matrix + size**2 + size * (rows + 2 * columns)
    flops = 4 * matrix * size + eigen_flops(size) + 2 * (experts + 2) * matrix * size
    own = spectral(elements, size, flops, passes=1, narrow_bytes=matrix * itemsize)
    return _together(own, within, passes=within.passes + 1)


def larv_cost(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of LARV: a look at every matrix of the model, then a rule in the memory that the look took."""
    rows, columns = shape
    size, matrix = min(shape), rows * columns
    within = inner("larv", parameters).cost(shape, experts, itemsize)
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
