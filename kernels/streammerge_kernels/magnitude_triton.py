"""Triton twin of magnitude: histograms by integer atomics, and trimming in two passes."""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from streammerge_kernels.magnitude import HIGH_BINS, LOW_BINS, Cut, MagnitudeSelect, find_bin

__all__ = ["HIGH_BINS", "LOW_BINS", "Cut", "MagnitudeSelect", "count_magnitudes_", "find_bin", "trim_"]

BLOCK = 2048
WARPS = 4
# blocks count into one of so many histograms: the magnitudes of a tensor crowd in few bins
COPIES = 16


def count_magnitudes_(counts: Tensor, values: Tensor, *, prefix: Tensor | None = None) -> Tensor:
    """Add the histogram of the bits of |values| to `counts`, as the reference does.

    Scratch: 16 histograms of int32, 2 MiB or, with a prefix, 4 MiB.
    """
    elements, bins = values.numel(), counts.numel()
    if elements:
        copies = torch.zeros(COPIES, bins, dtype=torch.int32, device=values.device)
        with torch.cuda.device_of(values):
            _count_kernel[(triton.cdiv(elements, BLOCK),)](
                values.contiguous().view(torch.int32),
                copies,
                copies if prefix is None else prefix,
                elements,
                LOW=prefix is not None,
                BINS=bins,
                COPIES=COPIES,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
        counts += copies.sum(0)
    return counts


def trim_(values: Tensor, cut: Cut) -> Tensor:
    """Set the entries that are not among the largest to zero, in place, the same ones as the reference."""
    elements = values.numel()
    if elements:
        pattern = values.view(torch.int32)
        equal = torch.empty(triton.cdiv(elements, BLOCK), dtype=torch.int32, device=values.device)
        with torch.cuda.device_of(values):
            _ties_kernel[(len(equal),)](pattern, cut.pattern, equal, elements, BLOCK=BLOCK, num_warps=WARPS)
        upto = equal.cumsum(0)
        # how many ties are left to each block
        left = cut.ties - (upto - equal)
        with torch.cuda.device_of(values):
            _trim_kernel[(len(equal),)](pattern, cut.pattern, left, elements, BLOCK=BLOCK, num_warps=WARPS)
        cut.ties.sub_(upto[-1]).clamp_(min=0)
    return values


@triton.jit
def _count_kernel(
    pattern,
    copies,  # [COPIES, BINS]
    prefix,
    elements,
    LOW: tl.constexpr,
    BINS: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wanted = at < elements
    bits = tl.load(pattern + at, mask=wanted, other=0) & 0x7FFFFFFF
    if LOW:
        wanted = wanted & ((bits >> 16) == tl.load(prefix).to(tl.int32))
        bins = bits & 0xFFFF
    else:
        bins = bits >> 16
    histogram = copies + (block % COPIES) * BINS
    # bin 0 is counted here: unchanged entries are zeros, and deltas of narrow weights have few mantissa bits
    first = wanted & (bins == 0)
    tl.atomic_add(histogram, tl.sum(first.to(tl.int32), 0), sem="relaxed")
    tl.atomic_add(histogram + bins, tl.full([BLOCK], 1, tl.int32), mask=wanted & (bins != 0), sem="relaxed")


@triton.jit
def _ties_kernel(pattern, threshold, equal, elements, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    bits = tl.load(pattern + at, mask=inside, other=0) & 0x7FFFFFFF
    tl.store(equal + block, tl.sum((inside & (bits == tl.load(threshold))).to(tl.int32), 0))


@triton.jit
def _trim_kernel(pattern, threshold, left, elements, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    loaded = tl.load(pattern + at, mask=inside, other=0)
    bits = loaded & 0x7FFFFFFF
    limit = tl.load(threshold)
    equal = bits == limit
    ranks = tl.cumsum(equal.to(tl.int32), 0)
    kept = (bits > limit) | (equal & (ranks <= tl.load(left + block)))
    tl.store(pattern + at, tl.where(kept, loaded, 0), mask=inside)
