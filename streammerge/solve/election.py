"""Sums of the changes that a rule thins out: of all, or of those that agree with TIES' vote.

https://arxiv.org/abs/2306.01708
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from streammerge.delta import Delta, Deltas
from streammerge.solve.shares import normalized
from streammerge_kernels.elect import elect, vote_balance

Thin = Callable[[Delta, Tensor], Tensor]
"""Sets entries of a piece of an expert's change to zero, in place, and may rescale the others; returns it."""


def thinned(deltas: Deltas, thin: Thin) -> list[Tensor]:
    """Each expert's change, thinned, in buffers of the workspace."""
    return deltas.each(thin)[0]


def added(deltas: Deltas, thin: Thin, weights: Sequence[float], *, normalize: bool, factor: float) -> Tensor:
    """factor · Σ w_t D_t of the thinned changes: [*shape]."""
    weights = normalized(weights) if normalize else weights
    merged = deltas.zeros(*deltas.shape)
    for change, weight in zip(thinned(deltas, thin), weights, strict=True):
        merged.add_(change, alpha=weight * factor)
    return merged


def elected(
    deltas: Deltas, thin: Thin, weights: Sequence[float], *, zero: float, normalize: bool, factor: float
) -> Tensor:
    """Merge, entry by entry, the weighted, thinned changes whose sign is that of their sum.

    zero       the sign where the sum is 0: 1, -1 or 0, which gives 0 there
    normalize  divide by the sum of the agreeing changes' weights
    factor     of the result

    Returns [*shape] in the changes' dtype, see `streammerge_kernels.elect`.
    """
    rule = elect if deltas.dtype == torch.float32 else _elected
    return rule(thinned(deltas, thin), weights, zero=zero, normalize=normalize).mul_(factor)


def _elected(changes: Sequence[Tensor], weights: Sequence[float], *, zero: float, normalize: bool) -> Tensor:
    """`elect` of changes in float64."""
    sign = _vote(changes, weights).sign_()
    sign.add_(sign.abs().neg_().add_(1.0), alpha=zero)
    merged, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for change, weight in zip(changes, weights, strict=True):
        product = change * weight
        agrees = (product * sign).sign_().clamp_(min=0.0)
        merged.add_(product.mul_(agrees))
        divisor.add_(agrees, alpha=weight)
    if normalize:
        merged.div_(divisor.masked_fill_(divisor == 0.0, 1.0))
    return merged


def balance(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """How many more entries have a positive sum than a negative one: 0-d int64."""
    if changes[0].dtype == torch.float32:
        return vote_balance(changes, weights)
    return _vote(changes, weights).sign_().to(torch.int64).sum()


def _vote(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    vote = torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        # in two steps: a fused product would leave a remainder where opposite changes cancel
        vote.add_(change * weight)
    return vote
