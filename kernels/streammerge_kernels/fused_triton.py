"""Triton twin of fused: the Gram's kernel subtracts as it multiplies, and leaves the packed differences behind."""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from streammerge_kernels.delta_pack import SCALE
from streammerge_kernels.moment import add_moment_

# 64 rows at a time spill registers where 32 do not, and so do a third stage on sm_80 and, where the columns cannot
# be read 16 bytes at a time, larger tiles
TILE = 128
UNALIGNED_TILE = 64
DEPTH = 32
WARPS = 8
STAGES = {80: 2, 90: 3}
# products of DEPTH rows before their sum moves to a second one: tensor cores truncate long sums
PROMOTE = 16


def add_gram_and_moment_(
    gram: Tensor,
    moment: Tensor,
    base: Tensor,
    expert: Tensor,
    *,
    of: Literal["change", "weights"] = "change",
    scratch: Tensor | None = None,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add DᵀD to `gram` and D DᵀD to `moment`; see `streammerge_kernels.fused`.

    One kernel reads the expert, and the base with it: it writes `scratch` and `packed`, from which the
    rest is computed. of="weights" reads the base once more, into 2 bytes an element, or 8 where it is float32.
    Operands whose columns are not adjacent are copied first; widths and pitches of multiples of 16 are the fast ones.
    """
    rows, columns = expert.shape
    if expert.numel() == 0:
        return gram, moment
    own = torch.empty_like(gram, memory_format=torch.contiguous_format) if scratch is None else scratch
    delta = torch.empty(rows, columns, dtype=torch.float16, device=expert.device) if packed is None else packed
    base = base if base.stride(1) == 1 else base.contiguous()
    expert = expert if expert.stride(1) == 1 else expert.contiguous()
    tile = TILE if _are_aligned(base, expert, delta) else UNALIGNED_TILE
    tiles = triton.cdiv(columns, tile)
    with torch.cuda.device_of(expert):
        _gram[(tiles * (tiles + 1) // 2,)](
            base,
            expert,
            delta,
            own,
            rows,
            columns,
            base.stride(0),
            expert.stride(0),
            delta.stride(0),
            own.stride(0),
            scale=SCALE,
            TILE=tile,
            DEPTH=DEPTH,
            PROMOTE=PROMOTE,
            num_warps=WARPS,
            num_stages=STAGES[90 if _is_hopper(expert) else 80],
        )
    gram += own
    add_moment_(moment, delta, own)
    if of == "weights":
        if base.dtype == torch.float32:
            scaled = base * SCALE
            high = scaled.half()
            add_moment_(moment, high, own)
            add_moment_(moment, scaled.sub_(high).half(), own)
        else:
            # a power of two: what rounding there is happens once, in the cast
            add_moment_(moment, torch.mul(base, SCALE, out=torch.empty_like(delta)), own)
    return gram, moment


def _are_aligned(*operands: Tensor) -> bool:
    return all(size % 16 == 0 for each in operands for size in (each.shape[1], each.stride(0), each.data_ptr()))


def _is_hopper(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] == 9


@triton.jit
def _gram(
    base,
    expert,
    packed,
    out,
    rows,
    columns,
    base_pitch,
    expert_pitch,
    packed_pitch,
    out_pitch,
    scale: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PROMOTE: tl.constexpr,
):
    # programs count the tiles of the lower triangle row by row; float32's root may be off by one
    program = tl.program_id(0)
    i = ((tl.sqrt(8.0 * program.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > program, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= program, i + 1, i)
    j = program - i * (i + 1) // 2
    left, right = i * TILE, j * TILE
    row = tl.arange(0, DEPTH)[:, None]
    column = tl.arange(0, TILE)[None, :]
    in_left = column < columns - left
    in_right = column < columns - right
    in_packed = in_left & (i == j)
    in_base = row * base_pitch + column
    in_expert = row * expert_pitch + column
    total = tl.zeros((TILE, TILE), tl.float32)
    part = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, rows, DEPTH):
        in_rows = row < rows - k
        # the interpreter's arithmetic is wrong on bfloat16: it becomes float32 before anything else is done
        tuned = tl.load(expert + left + in_expert, mask=in_rows & in_left, other=0.0).to(tl.float32)
        below = tl.load(base + left + in_base, mask=in_rows & in_left, other=0.0).to(tl.float32)
        d_left = ((tuned - below) * scale).to(tl.float16)
        tl.store(packed + left + row * packed_pitch + column, d_left, mask=in_rows & in_packed)
        tuned = tl.load(expert + right + in_expert, mask=in_rows & in_right, other=0.0).to(tl.float32)
        below = tl.load(base + right + in_base, mask=in_rows & in_right, other=0.0).to(tl.float32)
        d_right = ((tuned - below) * scale).to(tl.float16)
        part = tl.dot(tl.trans(d_left), d_right, part)
        if k % (DEPTH * PROMOTE) == DEPTH * (PROMOTE - 1):
            total += part
            part = tl.zeros((TILE, TILE), tl.float32)
        # a step at a time, as k * pitch may pass 2³¹
        expert += DEPTH * expert_pitch
        base += DEPTH * base_pitch
        packed += DEPTH * packed_pitch
    total += part
    r = tl.arange(0, TILE)[:, None]
    c = tl.arange(0, TILE)[None, :]
    inside = (r < columns - left) & (c < columns - right)
    tl.store(out + left.to(tl.int64) * out_pitch + right + r * out_pitch + c, total, mask=inside)
    tl.store(out + right.to(tl.int64) * out_pitch + left + c * out_pitch + r, total, mask=inside & (i != j))
