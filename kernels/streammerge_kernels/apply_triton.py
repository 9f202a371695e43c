"""Triton twin of apply: one pass that adds, rounds, writes and measures."""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from streammerge_kernels.apply import Applied
from streammerge_kernels.bits_triton import (
    from_bfloat16_bits,
    random_halves,
    signed,
    to_bfloat16_bits,
    up_or_down_to_bfloat16_bits,
    up_or_down_to_float16,
    widened,
    words,
)
from streammerge_kernels.round import Rounding, key

BLOCK = 2048
WARPS = 4
_NARROW = (torch.bfloat16, torch.float16)


def apply_(
    base: Tensor,
    merged: Tensor,
    out: Tensor,
    *,
    rounding: Rounding,
    seed: int,
    name: str,
    first_index: int,
    measure: bool = True,
) -> Applied:
    """Write round(base + merged) to `out`, as the reference does; `merged` is left as it is.

    Squares are added up by blocks in merged's dtype and over blocks in float64.
    """
    elements, device = out.numel(), out.device
    stochastic = rounding == "stochastic" and out.dtype in _NARROW
    # blocks begin at multiples of 8 of the whole tensor's index, as the random words do
    first_count, skipped = divmod(first_index, 8) if stochastic else (0, 0)
    low, high = signed(key(seed, name)) if stochastic else (0, 0)
    blocks = triton.cdiv(elements + skipped, BLOCK) if elements else 0
    counts = torch.empty(2, blocks, dtype=torch.int32, device=device)  # changed, non-finite
    squares = torch.empty(2, blocks, dtype=merged.dtype, device=device)  # merged, lost
    if blocks:
        with torch.cuda.device_of(out):
            _apply_kernel[(blocks,)](
                words(base.contiguous()),
                merged.contiguous(),
                words(out),
                counts,
                squares,
                elements,
                blocks,
                low,
                high,
                first_count,
                skipped,
                STOCHASTIC=stochastic,
                MEASURE=measure,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    non_finite = counts[1].sum(dtype=torch.float64).view(1)
    if not measure:
        return Applied(torch.cat((non_finite.new_zeros(3), non_finite)))
    changed = counts[0].sum(dtype=torch.float64).view(1)
    return Applied(torch.cat((changed, squares.sum(1, dtype=torch.float64), non_finite)))


@triton.jit(do_not_specialize=["key_low", "key_high", "first_count"])
def _apply_kernel(
    base,
    merged,
    out,
    counts,  # [2, blocks]
    squares,  # [2, blocks]
    elements,
    blocks,
    key_low,
    key_high,
    first_count,
    skipped,
    STOCHASTIC: tl.constexpr,
    MEASURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK - skipped + tl.arange(0, BLOCK)
    inside = (at >= 0) & (at < elements)
    delta = tl.load(merged + at, mask=inside, other=0.0)
    origin = widened(tl.load(base + at, mask=inside, other=0))
    exact = (origin + delta).to(delta.dtype)
    # torch goes from float64 to the narrow dtypes by way of float32 too
    narrow = exact.to(tl.float32)
    if STOCHASTIC:
        draws = random_halves(first_count + block * (BLOCK // 8), key_low, key_high, BLOCK)
    if out.dtype.element_ty == tl.int16:
        rounded = up_or_down_to_bfloat16_bits(narrow, draws) if STOCHASTIC else to_bfloat16_bits(narrow)
        value = from_bfloat16_bits(rounded)
        before = from_bfloat16_bits(to_bfloat16_bits(origin.to(tl.float32)))
    elif out.dtype.element_ty == tl.float16:
        rounded = up_or_down_to_float16(narrow, draws) if STOCHASTIC else narrow.to(tl.float16)
        value = rounded.to(tl.float32)
        before = origin.to(tl.float32).to(tl.float16).to(tl.float32)
    else:
        rounded = exact.to(out.dtype.element_ty)
        value = rounded
        before = origin.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask=inside)
    # also true of NaN
    non_finite = (tl.abs(value) < float("inf")) == 0
    tl.store(counts + blocks + block, tl.sum(non_finite.to(tl.int32), 0))
    if MEASURE:
        tl.store(counts + block, tl.sum((value != before).to(tl.int32), 0))
        tl.store(squares + block, tl.sum(delta * delta, 0))
        lost = exact - value.to(exact.dtype)
        tl.store(squares + blocks + block, tl.sum(lost * lost, 0))
