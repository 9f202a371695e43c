"""TIES' vote on signs and the merge of what agrees. https://arxiv.org/abs/2306.01708"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from streammerge_kernels.choice import twin

Majority = Literal["mass", "count"]

# elements voted on at a time: of fewer, threads wait for Python; a GPU wants few launches
_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 25


def elect(
    deltas: Tensor | Sequence[Tensor],
    weights: Sequence[float],
    *,
    majority: Majority = "mass",
    zero: float | Tensor = 1.0,
    normalize: bool = True,
) -> Tensor:
    """Merge, entry by entry, the weighted deltas whose sign is the elected one.

    deltas     [T, *shape] float32, or a sequence of T tensors [*shape]; trimmed before, if at all
    weights    T numbers; with p_t = w_t D_t rounded to float32 everything below is about p_t
    majority   "mass": the vote is Σ p_t, "count": Σ sign(p_t)
    zero       the sign where the vote is exactly 0: 1, -1 or 0, which elects none there and gives 0.
               A 0-d tensor if it is known on the device only: the sign of `vote_balance`
    normalize  divide the sum of the agreeing p_t by that of their weights, where it is not 0

    Entries that are 0 agree with neither sign. Products are rounded before they are added, in order,
    so that opposite changes cancel exactly. An entry with a NaN becomes NaN, and so does one with an
    infinity that does not agree. Which options are which method:

    TIES, Yadav et al.    mass, the sign of the whole model's balance, normalize, weights 1
    TIES, mergekit        mass or count, 1, normalize
    TIES, ACTMat's code   mass, 0, normalize, weights 1
    DARE-TIES, mergekit   mass or count, 1, not normalized

    Tensors that are not contiguous are copied, one at a time. Returns [*shape] float32, a new tensor.
    """
    first = _check(deltas, weights)
    if (faster := twin("elect", first, first.numel())) is not None:
        result: Tensor = faster.elect(deltas, weights, majority=majority, zero=zero, normalize=normalize)
        return result
    merged = torch.empty(first.shape, dtype=torch.float32, device=first.device)
    tie = zero.float() if isinstance(zero, Tensor) else zero
    shares = [_as_float32(weight) for weight in weights]
    for total, parts in _chunks(merged, deltas):
        elected = _sign(_vote(parts, shares, majority), tie)
        divisor = torch.zeros_like(elected)
        total.zero_()
        for share, part in zip(shares, parts, strict=True):
            product = _weighted(part, share)
            # by arithmetic, which on CPUs is many times faster than choosing with masks; by 0 or 1, so that a sum is
            # the same whether or not its product is rounded first
            agrees = (product * elected).sign_().clamp_(min=0.0)
            total.addcmul_(product, agrees)
            divisor.add_(agrees, alpha=share)
        if normalize:
            total.div_(_without_zeros(divisor, shares))
    return merged


def vote_balance(deltas: Tensor | Sequence[Tensor], weights: Sequence[float], *, majority: Majority = "mass") -> Tensor:
    """How many more entries the vote makes positive than negative: 0-d int64, operands as in `elect`.

    Add it up over blocks and tensors; its sign is what Yadav et al. elect where a vote is 0. (If it is
    itself 0 their code takes what is negative there, where `zero=balance.sign()` takes nothing.)
    """
    first = _check(deltas, weights)
    if (faster := twin("elect", first, first.numel())) is not None:
        result: Tensor = faster.vote_balance(deltas, weights, majority=majority)
        return result
    balance = torch.zeros((), dtype=torch.int64, device=first.device)
    shares = [_as_float32(weight) for weight in weights]
    for _, parts in _chunks(None, deltas):
        vote = _vote(parts, shares, majority)
        balance += torch.count_nonzero(vote > 0) - torch.count_nonzero(vote < 0)
    return balance


def _check(deltas: Tensor | Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    assert len(deltas) == len(weights) > 0, f"{len(weights)} weights for {len(deltas)} deltas"
    assert all(delta.dtype is torch.float32 for delta in deltas), "deltas must be float32"
    assert all(delta.shape == deltas[0].shape for delta in deltas), "deltas differ in shape"
    return deltas[0]


def _as_float32(weight: float) -> float:
    return torch.tensor(weight, dtype=torch.float32).item()


def _chunks(merged: Tensor | None, deltas: Tensor | Sequence[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    flat = [delta.contiguous().view(-1) for delta in deltas]
    total = flat[0] if merged is None else merged.view(-1)
    size = _CHUNK if total.device.type == "cpu" else _DEVICE_CHUNK
    for first in range(0, total.numel(), size):
        part = slice(first, first + size)
        yield total[part], [delta[part] for delta in flat]


def _weighted(part: Tensor, share: float) -> Tensor:
    return part if share == 1.0 else part * share


def _without_zeros(divisor: Tensor, shares: list[float]) -> Tensor:
    """The divisor, with another number for each 0: where nothing agrees, and where weights cancel."""
    if min(shares) > 0.0:
        # where anything agrees it is no less, and else what is divided is 0
        return divisor.clamp_(min=min(shares))
    return divisor.add_(divisor.sign().abs_().neg_().add_(1.0))


def _sign(values: Tensor, of_zero: float | Tensor) -> Tensor:
    """1, -1 or, where a value is zero or NaN, `of_zero`."""
    return values.sign_().add_(of_zero / 2).sign_()


def _vote(parts: list[Tensor], shares: list[float], majority: Majority) -> Tensor:
    counted = majority == "count"
    vote = parts[0] * shares[0]
    if counted:
        vote.sign_()
    for share, part in zip(shares[1:], parts[1:], strict=True):
        # in two steps: a fused product would leave a remainder where opposite changes cancel
        product = _weighted(part, share)
        vote.add_(product.sign() if counted else product)
    return vote
