"""Triton twin of delta_pack: one pass; the base's tile is read once and stays in registers for all experts."""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from streammerge_kernels.delta_pack import SCALE, Packed

# a thread holds 16 elements of each operand: two runs of 8 along the columns, 16 bytes of bfloat16 each. With 4
# warps it would hold 32 and, as with the experts unrolled, spill registers in some compilations
ROWS = 32
COLUMNS = 128
WARPS = 8


def delta_pack(base: Tensor, experts: Tensor, *, out: Tensor | None = None) -> Packed:
    """Subtract the base from T experts and pack the differences; see `streammerge_kernels.delta_pack`.

    Operands whose columns are not adjacent are copied first. Until torch has summed them, the facts of
    each expert take 4 bytes per 32 entries of a column and 16 per tile of 32 x 128.
    """
    count, rows, columns = experts.shape
    values = torch.empty(experts.shape, dtype=torch.float16, device=experts.device) if out is None else out
    base = base if base.stride(1) == 1 else base.contiguous()
    experts = experts if experts.stride(2) == 1 else experts.contiguous()
    row_blocks, column_blocks = triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)
    blocks = row_blocks * column_blocks
    squares = experts.new_empty(count, row_blocks, columns, dtype=torch.float32)
    # changed and inexact entries of each tile, and the bits of its greatest |D|
    facts = experts.new_empty(3, count, blocks, dtype=torch.int32)
    lost = experts.new_empty(count, blocks, dtype=torch.float32)
    if values.numel() > 0:
        with torch.cuda.device_of(experts):
            _pack[(blocks,)](
                base,
                experts,
                values,
                squares,
                facts,
                lost,
                rows,
                columns,
                base.stride(0),
                experts.stride(0),
                experts.stride(1),
                values.stride(0),
                values.stride(1),
                squares.stride(0),
                facts.stride(0),
                column_blocks,
                blocks,
                count,
                scale=SCALE,
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                num_warps=WARPS,
            )
    else:
        facts = facts.new_zeros(3, count, 1)
    counted = facts[:2].sum(2)
    return Packed(
        values=values,
        column_squares=squares.sum(1, dtype=torch.float64),
        largest=facts[2].amax(1).view(torch.float32),
        changed=counted[0],
        inexact=counted[1],
        lost_squares=lost.sum(1, dtype=torch.float64) / SCALE**2,
    )


@triton.jit
def _pack(
    base,
    experts,
    values,
    squares,
    facts,
    lost,
    rows,
    columns,
    base_pitch,
    expert_step,
    expert_pitch,
    values_step,
    values_pitch,
    squares_step,
    facts_step,
    column_blocks,
    blocks,
    count,
    scale: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block = tl.program_id(0)
    row_block = block // column_blocks
    # a matrix may hold more than 2³¹ elements: the tile's place is int64, within the tile int32 does
    first_row = row_block.to(tl.int64) * ROWS
    first_column = (block % column_blocks) * COLUMNS
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)
    inside = (first_row + row < rows) & (first_column + column[None, :] < columns)
    base += first_row * base_pitch + first_column
    experts += first_row * expert_pitch + first_column
    values += first_row * values_pitch + first_column
    squares += row_block.to(tl.int64) * columns + first_column
    # the interpreter's arithmetic is wrong on bfloat16: it becomes float32 before anything else is done
    below = tl.load(base + row * base_pitch + column[None, :], mask=inside, other=0.0).to(tl.float32)
    stored = tl.load(experts + row * expert_pitch + column[None, :], mask=inside, other=0.0)
    for t in tl.range(0, count, num_stages=1):
        delta = stored.to(tl.float32) - below
        # the next expert's loads are under way while this one is reduced
        experts += expert_step
        stored = tl.load(experts + row * expert_pitch + column[None, :], mask=inside & (t + 1 < count), other=0.0)
        scaled = delta * scale
        packed = scaled.to(tl.float16)
        tl.store(values + row * values_pitch + column[None, :], packed, mask=inside)
        missed = scaled - packed.to(tl.float32)
        tl.store(squares + column, tl.sum(delta * delta, axis=0), mask=first_column + column < columns)
        tl.store(lost + block, tl.sum(missed * missed))
        # at most 2¹² each, so both counts take one reduction; what is inexact has changed
        counts = tl.sum(tl.where(missed != 0, 0x10001, (delta != 0).to(tl.int32)))
        tl.store(facts + block, counts & 0xFFFF)
        tl.store(facts + facts_step + block, counts >> 16)
        # as integers magnitudes are ordered, infinity above all numbers and NaN above that
        magnitude = delta.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        tl.store(facts + 2 * facts_step + block, tl.max(magnitude))
        values += values_step
        squares += squares_step
        lost += blocks
        facts += blocks
