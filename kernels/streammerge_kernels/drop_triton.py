"""Triton twin of drop: four elements to a Philox block, nothing read."""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from streammerge_kernels.bits_triton import random_words, signed
from streammerge_kernels.drop import drop_key, kept_below

BLOCK = 4096
WARPS = 4


def keep_mask(
    shape: Sequence[int],
    *,
    density: float,
    seed: int,
    name: str,
    expert: str,
    first_index: int = 0,
    device: torch.device | str = "cpu",
    out: Tensor | None = None,
) -> Tensor:
    """Draw which entries are kept, the same ones as the reference."""
    mask = torch.empty(tuple(shape), dtype=torch.bool, device=device) if out is None else out
    below = kept_below(density)
    if below == 0:
        return mask.zero_()
    first_count, skipped = divmod(first_index, 4)
    low, high = signed(drop_key(seed, name, expert))
    # the largest word that is kept, so that keeping all fits in 32 bits
    largest, _ = signed((below - 1, 0))
    if mask.numel():
        with torch.cuda.device_of(mask):
            _mask_kernel[(triton.cdiv(mask.numel() + skipped, BLOCK),)](
                mask.view(torch.uint8),
                mask.numel(),
                low,
                high,
                largest,
                first_count,
                skipped,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return mask


@triton.jit(do_not_specialize=["key_low", "key_high", "largest", "first_count"])
def _mask_kernel(mask, elements, key_low, key_high, largest, first_count, skipped, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK - skipped + tl.arange(0, BLOCK)
    drawn = tl.reshape(random_words(first_count + block * (BLOCK // 4), key_low, key_high, BLOCK // 4), [BLOCK])
    kept = drawn <= largest.to(tl.uint32)
    tl.store(mask + at, kept.to(tl.uint8), mask=(at >= 0) & (at < elements))
