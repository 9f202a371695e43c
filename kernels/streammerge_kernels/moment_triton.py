"""Triton twin of moment: split the float32 operand into float16 halves, sum both products at once."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from streammerge_kernels import moment
from streammerge_kernels.choice import choose
from streammerge_kernels.moment import check_product, largest_magnitude, powers
from streammerge_kernels.product_triton import Operand, add_product, operand, up

# of the kernel that splits; a row of it is read 16 bytes at a time
_ROWS, _COLUMNS = 32, 128


def add_moment_(out: Tensor, x: Tensor, gram: Tensor, *, left: bool = False) -> Tensor:
    """Add x · gram, or with `left` gram · x, to `out`. As moment.add_moment_; see add_product_."""
    return add_product_(out, gram, x) if left else add_product_(out, x, gram)


def add_product_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add left · right to `out` with the accuracy of float32 products.

    As moment.add_product_. Takes 4 bytes per element of the float32 operand. What has sizes or strides that are no
    multiples of 16 is copied first, and so is `out`. Three float32 or three float64 tensors are torch's.
    """
    check_product(out, left, right)
    if left.dtype == right.dtype:
        with choose("torch"):
            return moment.add_product_(out, left, right)
    if out.numel() == 0 or left.shape[-1] == 0:
        return out
    target, left, right = (x if x.ndim == 3 else x[None] for x in (out, left, right))
    wide = left if left.dtype == torch.float32 else right
    scale, inverse = powers(largest_magnitude(wide))
    halves = _split(wide, scale)
    if wide is left:
        add_product(target, halves, operand(right), halves=1, inverse=inverse)
    else:
        add_product(target, operand(left), halves, halves=2, inverse=inverse)
    return out


def _split(wide: Tensor, scale: Tensor) -> Operand:
    # rows of consecutive elements, if there are any, whichever way they lie
    transposed = wide.stride(2) != 1 and wide.stride(1) == 1
    source = wide.mT if transposed else wide
    batches, rows, columns = source.shape
    halves = torch.empty(2 * batches, up(rows), up(columns), dtype=torch.float16, device=wide.device)
    grid = (triton.cdiv(up(rows), _ROWS), triton.cdiv(up(columns), _COLUMNS), batches)
    with torch.cuda.device(wide.device) if wide.device.type == "cuda" else nullcontext():
        _split_halves[grid](
            source,
            scale,
            halves,
            rows,
            columns,
            *source.stride(),
            halves.shape[1],
            halves.shape[2],
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=4,
        )
    return Operand(halves, transposed)


@triton.jit
def _split_halves(
    wide,
    scale,
    halves,
    rows,
    columns,
    batch_stride,
    row_stride,
    column_stride,
    height,
    pitch,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    batch = tl.program_id(2)
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    c = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    source = wide + batch.to(tl.int64) * batch_stride + r.to(tl.int64) * row_stride + c.to(tl.int64) * column_stride
    scaled = tl.load(source, mask=(r < rows) & (c < columns), other=0.0) * tl.load(scale + batch)
    high = scaled.to(tl.float16)
    # beyond the edges both are 0: what pads the halves is read
    target = halves + (2 * batch.to(tl.int64) * height + r) * pitch + c
    inside = (r < height) & (c < pitch)
    tl.store(target, high, mask=inside)
    tl.store(target + height.to(tl.int64) * pitch, (scaled - high.to(tl.float32)).to(tl.float16), mask=inside)
