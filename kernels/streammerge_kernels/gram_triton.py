"""Triton twin of gram: only tiles that reach the diagonal or lie below it, batches in one launch."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from streammerge_kernels import gram
from streammerge_kernels.choice import choose
from streammerge_kernels.product_triton import Operand, add_product, lower_tile, operand

_MIRRORED = 64


def add_gram_(out: Tensor, x: Tensor) -> Tensor:
    """Add XᵀX to `out` on and below the diagonal; mirror_ fills the rest.

    As gram.add_gram_. float16 runs here, from either of X's and Xᵀ's layouts; what has sizes or strides that are
    no multiples of 16 is copied first, and so is `out`. float32 and float64 are torch's.
    """
    if x.dtype != torch.float16:
        with choose("torch"):
            return gram.add_gram_(out, x)
    n = x.shape[-1]
    assert out.shape == (*x.shape[:-2], n, n), f"out is {tuple(out.shape)} for x {tuple(x.shape)}"
    assert out.dtype == torch.float32, f"out is {out.dtype} for float16"
    if x.numel() == 0:
        return out
    right = operand(_batched(x))
    left = Operand(right.stored, not right.transposed)
    add_product(_batched(out), left, right, triangle=True)
    return out


def mirror_(out: Tensor) -> Tensor:
    """Copy the lower triangle of `out` [n, n] or [B, n, n] onto the upper one, in place; exactly symmetric after."""
    if out.numel() == 0:
        return out
    matrices = _batched(out)
    batches, n, _ = matrices.shape
    side = triton.cdiv(n, _MIRRORED)
    with torch.cuda.device(out.device) if out.device.type == "cuda" else nullcontext():
        _mirror[(side * (side + 1) // 2 * batches,)](
            matrices, n, side * (side + 1) // 2, *matrices.stride(), SIDE=_MIRRORED, num_warps=4
        )
    return out


def _batched(x: Tensor) -> Tensor:
    return x if x.ndim == 3 else x[None]


@triton.jit
def _mirror(matrices, n, tiles_each, batch, row, column, SIDE: tl.constexpr):
    tile = tl.program_id(0)
    i, j = lower_tile(tile % tiles_each, 1)
    matrix = matrices + (tile // tiles_each).to(tl.int64) * batch
    rows = i * SIDE + tl.arange(0, SIDE)
    columns = j * SIDE + tl.arange(0, SIDE)
    below = (rows[:, None] < n) & (columns[None, :] < rows[:, None])
    lower = matrix + rows[:, None].to(tl.int64) * row + columns[None, :].to(tl.int64) * column
    upper = matrix + columns[:, None].to(tl.int64) * row + rows[None, :].to(tl.int64) * column
    tl.store(upper, tl.load(lower, mask=below).T, mask=below.T)
