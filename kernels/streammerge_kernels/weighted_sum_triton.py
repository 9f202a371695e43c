"""Triton twin of weighted_sum: the base is read once for all stacked experts."""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from streammerge_kernels.bits_triton import widened, words
from streammerge_kernels.staging import on_device
from streammerge_kernels.weighted_sum import result_dtype

BLOCK = 1024
WARPS = 4
# experts of one launch: its loop over them is unrolled
TOGETHER = 8


def weighted_sum(
    base: Tensor, experts: Tensor | Sequence[Tensor], weights: Sequence[float], *, out: Tensor | None = None
) -> Tensor:
    """Compute Σ w_t (W_t - W_0), as the reference does.

    Stacked experts are read eight to a launch; of a sequence each has a launch of its own, which reads
    the base and the sum again. A stack whose experts are not contiguous is copied.
    """
    dtype = result_dtype(base, experts)
    out = torch.empty(base.shape, dtype=dtype, device=base.device) if out is None else out
    if base.numel() == 0:
        return out
    if len(experts) == 0:
        return out.zero_()
    base, shares = base.contiguous(), on_device(weights, dtype, base.device)
    if isinstance(experts, Tensor):
        experts = experts if experts[0].is_contiguous() else experts.contiguous()
        stacks = [experts[first : first + TOGETHER] for first in range(0, len(experts), TOGETHER)]
    else:
        stacks = [expert.contiguous().unsqueeze(0) for expert in experts]
    done = 0
    for stack in stacks:
        with torch.cuda.device_of(base):
            _sum_kernel[(triton.cdiv(base.numel(), BLOCK),)](
                words(base),
                words(stack),
                shares,
                out,
                base.numel(),
                stack.stride(0),
                done,
                EXPERTS=len(stack),
                ADD=done > 0,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
        done += len(stack)
    return out


@triton.jit
def _sum_kernel(
    base,
    experts,
    shares,
    out,
    elements,
    expert_stride,
    first,
    EXPERTS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype = out.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    origin = widened(tl.load(base + at, mask=inside, other=0)).to(dtype)
    total = tl.load(out + at, mask=inside, other=0.0) if ADD else tl.zeros([BLOCK], dtype)
    for t in tl.static_range(EXPERTS):
        change = widened(tl.load(experts + at, mask=inside, other=0)).to(dtype) - origin
        total = tl.fma(change, tl.load(shares + first + t), total)
        # the pointer moves on: an expert's number times its stride would leave int32
        experts += expert_stride
    tl.store(out + at, total, mask=inside)
