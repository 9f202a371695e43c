"""Triton twin of elect: the deltas are read once, their votes and their sums kept in registers."""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from streammerge_kernels.elect import Majority
from streammerge_kernels.staging import on_device

BLOCK = 1024
WARPS = 4
# experts whose loads are in flight together
UNROLL = tl.constexpr(4)


def elect(
    deltas: Tensor | Sequence[Tensor],
    weights: Sequence[float],
    *,
    majority: Majority = "mass",
    zero: float | Tensor = 1.0,
    normalize: bool = True,
) -> Tensor:
    """Merge, entry by entry, the weighted deltas whose sign is the elected one, as the reference does.

    A sequence is stacked: a copy of all deltas. The deltas are read twice, the second time from cache.
    """
    stack = _stacked(deltas)
    merged = torch.empty(stack.shape[1:], dtype=torch.float32, device=stack.device)
    elements = merged.numel()
    if elements:
        shares = on_device(weights, torch.float32, stack.device)
        tie = torch.full((), zero, device=stack.device) if not isinstance(zero, Tensor) else zero
        with torch.cuda.device_of(stack):
            _elect_kernel[(triton.cdiv(elements, BLOCK),)](
                stack,
                shares,
                tie.to(torch.float32),
                merged,
                elements,
                stack.stride(0),
                EXPERTS=len(stack),
                COUNT=majority == "count",
                NORMALIZE=normalize,
                BLOCK=BLOCK,
                num_warps=WARPS,
                # products are rounded before they are added
                enable_fp_fusion=False,
            )
    return merged


def vote_balance(deltas: Tensor | Sequence[Tensor], weights: Sequence[float], *, majority: Majority = "mass") -> Tensor:
    """How many more entries the vote makes positive than negative: 0-d int64, as the reference counts."""
    stack = _stacked(deltas)
    elements = stack[0].numel()
    balances = torch.empty(triton.cdiv(elements, BLOCK), dtype=torch.int32, device=stack.device)
    if elements:
        shares = on_device(weights, torch.float32, stack.device)
        with torch.cuda.device_of(stack):
            _balance_kernel[(len(balances),)](
                stack,
                shares,
                balances,
                elements,
                stack.stride(0),
                EXPERTS=len(stack),
                COUNT=majority == "count",
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return balances.sum()


def _stacked(deltas: Tensor | Sequence[Tensor]) -> Tensor:
    if not isinstance(deltas, Tensor):
        return torch.stack(list(deltas))
    return deltas if deltas[0].is_contiguous() else deltas.contiguous()


@triton.jit
def _vote(deltas, shares, at, inside, stride, EXPERTS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    vote = tl.zeros([BLOCK], tl.float32)
    for t in tl.range(0, EXPERTS, loop_unroll_factor=UNROLL):
        product = tl.load(deltas + at, mask=inside, other=0.0) * tl.load(shares + t)
        if COUNT:
            product = (product > 0).to(tl.float32) - (product < 0).to(tl.float32)
        vote += product
        # the pointer moves on: an expert's number times its stride would leave int32
        deltas += stride
    return vote


@triton.jit
def _elect_kernel(
    deltas,
    shares,
    tie,
    merged,
    elements,
    stride,
    EXPERTS: tl.constexpr,
    COUNT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    vote = _vote(deltas, shares, at, inside, stride, EXPERTS, COUNT, BLOCK)
    elected = tl.where(vote > 0, 1.0, tl.where(vote < 0, -1.0, tl.load(tie)))
    total = tl.zeros([BLOCK], tl.float32)
    divisor = tl.zeros([BLOCK], tl.float32)
    for t in tl.range(0, EXPERTS, loop_unroll_factor=UNROLL):
        share = tl.load(shares + t)
        product = tl.load(deltas + at, mask=inside, other=0.0) * share
        # not chosen but multiplied: NaN stays NaN
        agrees = tl.where(product * elected > 0, 1.0, 0.0)
        total += product * agrees
        divisor += share * agrees
        deltas += stride
    if NORMALIZE:
        total = tl.div_rn(total, tl.where(divisor == 0, 1.0, divisor))
    tl.store(merged + at, total, mask=inside)


@triton.jit
def _balance_kernel(
    deltas, shares, balances, elements, stride, EXPERTS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    vote = _vote(deltas, shares, at, at < elements, stride, EXPERTS, COUNT, BLOCK)
    tl.store(balances + block, tl.sum((vote > 0).to(tl.int32) - (vote < 0).to(tl.int32), 0))
