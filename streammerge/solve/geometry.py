"""Angles between weights or changes, and combinations of them, from inner products that a look took.

Weights are written W_t = W_0 + D_t and inner products taken of W_0 and the D_t: so an angle keeps its digits however
small it is, which neither the arc cosine nor inner products of the weights would allow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.solve.panels import GramSums, panel_sums, stacked_changes, total

# mergekit's: the cosine from which its slerp goes straight, and the sine below which its nuslerp does
NEARLY_PARALLEL, NO_ANGLE = 0.9995, 1e-8
# mergekit's: a norm below this it takes for zero, and a zero vector for orthogonal to all
_NO_NORM = 1e-8
# of inner products summed in float64, relative
_ROUNDING = 2.0**-46


class WeightGram:
    """Look at the inner products of W_0, D_1, …, D_T: `gram` [T + 1, T + 1] float64 in host memory."""

    gram: Tensor

    def __init__(self, deltas: Deltas, **arguments: object) -> None:
        self._name, self._sums = deltas.name, GramSums()

    def look(self, number: int, deltas: Deltas) -> None:
        self._sums.add([deltas.base(), *stacked_changes(deltas)])

    def finish(self, number: int) -> None:
        self.gram = self._sums.finish(self._name)


class ChangeGram:
    """Look, row by row, at the inner products of D_1, …, D_T: `gram` [T, T] float64 in host memory."""

    gram: Tensor

    def __init__(self, deltas: Deltas, **arguments: object) -> None:
        self._name, self._sums = deltas.name, GramSums(by_row=True)

    def look(self, number: int, deltas: Deltas) -> None:
        self._sums.add(list(stacked_changes(deltas)))

    def finish(self, number: int) -> None:
        self.gram = self._sums.finish(self._name)


class Norms:
    """Look at the Frobenius norms of D_1, …, D_T: `norms`, T numbers."""

    norms: list[float]

    def __init__(self, deltas: Deltas, **arguments: object) -> None:
        self._name = deltas.name
        self._squares: list[list[Tensor]] = [[] for _ in range(deltas.experts)]

    def look(self, number: int, deltas: Deltas) -> None:
        for delta in deltas:
            change = delta.dense()
            self._squares[delta.index].append(panel_sums(change, change))

    def finish(self, number: int) -> None:
        self.norms = [math.sqrt(total(blocks, self._name)) for blocks in self._squares]


def combined(deltas: Deltas, surplus: float, shares: Sequence[float]) -> Tensor:
    """surplus · W_0 + Σ shares_t D_t, [*shape]."""
    merged = deltas.weighted_sum(shares)
    if surplus != 0.0:
        merged.add_(deltas.base(), alpha=surplus)
    return merged


def wedge(left: Tensor, right: Tensor, product: Tensor) -> Tensor:
    """‖a‖² ‖b‖² - (a · b)², from ‖a‖², ‖b‖² and a · b; what may be rounding is 0, so that opposites stay opposites."""
    full = left * right
    found = full - product**2
    return torch.where(found > _ROUNDING * full, found, 0.0)


def arc(
    squares: tuple[Tensor, Tensor],
    product: Tensor,
    area: Tensor,
    t: float,
    *,
    nearly_parallel: float = 2.0,
    zeros_are_orthogonal: bool = False,
) -> tuple[Tensor, Tensor]:
    """The shares of a and b at fraction t of the arc between them, as (share of a + share of b - 1, share of b).

    squares          ‖a‖² and ‖b‖², float64 of any one shape
    product          a · b
    area             their `wedge`, or that of a and b - a, which is the same
    nearly_parallel  a |cosine| above which the straight line is taken; it is, too, where there is no angle

    The angle is atan2(√area, a · b), which is 2 atan2(‖u - v‖, ‖u + v‖) of the unit vectors. A zero vector has none:
    the line is straight there, or with `zeros_are_orthogonal` the angle is π/2.
    """
    norms = squares[0].sqrt() * squares[1].sqrt()
    sine = area.sqrt()
    straight = (sine <= NO_ANGLE * norms) | (product.abs() > nearly_parallel * norms)
    angle = torch.atan2(sine, product)
    if zeros_are_orthogonal:
        zero = (squares[0].sqrt() < _NO_NORM) | (squares[1].sqrt() < _NO_NORM)
        angle, straight = torch.where(zero, math.pi / 2, angle), straight & ~zero
    surplus = 2 * torch.sin((1 - t) * angle / 2) * torch.sin(t * angle / 2) / torch.cos(angle / 2)
    share = torch.sin(t * angle) / torch.sin(angle)
    return torch.where(straight, 0.0, surplus), torch.where(straight, t, share)


def weights_of(gram: Tensor) -> Tensor:
    """The weights W_0 + D_t as coefficients of W_0, D_1, …, D_T: [T, T + 1] float64."""
    count = len(gram) - 1
    return torch.cat([torch.ones(count, 1), torch.eye(count)], dim=1).double()


def changes_of(gram: Tensor) -> Tensor:
    """The changes D_t as coefficients of W_0, D_1, …, D_T: [T, T + 1] float64."""
    return weights_of(gram).index_fill_(1, torch.tensor([0]), 0.0)


def norms_of(vectors: Tensor, gram: Tensor) -> Tensor:
    """‖v‖ of vectors [..., n] of coefficients: [...] float64."""
    return ((vectors @ gram) * vectors).sum(-1).clamp(min=0.0).sqrt()


def unit_mean(vectors: Tensor, gram: Tensor, weights: Sequence[float], smallest: float) -> Tensor:
    """The mean of the vectors' directions, as long as the vectors are in the mean: coefficients [n].

    Vectors of length zero count for the length only. Where directions cancel, leaving less than `smallest` of them,
    it is the plain mean.
    """
    share = torch.tensor(weights, dtype=torch.float64)
    norms = norms_of(vectors, gram)
    units = torch.where(norms > 0.0, 1.0 / norms, 0.0)[:, None] * vectors
    mean = share @ units
    length = norms_of(mean, gram)
    if not length > smallest * share.abs().sum():
        return share @ vectors
    return mean * ((share @ norms) / length)


def karcher_mean(vectors: Tensor, gram: Tensor, max_iter: int, tol: float) -> Tensor:
    """The point of the sphere nearest to the vectors' directions, as long as they are on average: coefficients [n].

    Steps along the mean of the tangents to all of them, from the mean direction or, where directions cancel, the
    first one. Vectors of length zero count for the length only; opposite ones have no tangent.
    """
    norms = norms_of(vectors, gram)
    units = vectors[norms > 0.0] / norms[norms > 0.0, None]
    if len(units) == 0:
        return vectors.mean(0)
    mean = units.mean(0)
    point = mean if norms_of(mean, gram) > NO_ANGLE else units[0]
    point = point / norms_of(point, gram)
    for _ in range(max_iter):
        angles = 2 * torch.atan2(norms_of(point - units, gram), norms_of(point + units, gram))
        tangents = (angles / torch.sin(angles))[:, None] * (units - torch.cos(angles)[:, None] * point)
        counts = (angles >= tol) & (math.pi - angles > NO_ANGLE)
        step = torch.where(counts[:, None], tangents, 0.0).sum(0) / len(units)
        length = norms_of(step, gram)
        if length < tol:
            break
        point = torch.cos(length) * point + torch.sin(length) / length * step
        point = point / norms_of(point, gram)
    return point * norms.mean()
