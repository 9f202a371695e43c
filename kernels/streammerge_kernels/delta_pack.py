"""Differences from the base as scaled float16, the working format, with the facts that need the exact ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streammerge_kernels.choice import twin

SCALE = 4096.0
_STORED = (torch.bfloat16, torch.float16, torch.float32)
# elements differenced at a time: what bounds the reference's float32 and float64 temporaries
_PANEL = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Packed differences D of T experts from their base, and what was seen of D while packing.

    values          [T, out, in] float16  D · 2¹² rounded to nearest, ties to even
    column_squares  [T, in] float64       sum over the rows of D²
    largest         [T] float32           greatest |D|
    changed         [T] int64             entries with D ≠ 0
    inexact         [T] int64             entries whose packed value is not exactly D · 2¹²
    lost_squares    [T] float64           sum of (D - values / 2¹²)²

    D is the float32 difference of the stored values. Where an input is not finite `largest` and the
    squares of that column are NaN or infinite. A `largest` of 65520 / 2¹², just below 16, or more means
    that entries packed to infinity; `lost_squares` is then NaN or infinite.
    """

    values: Tensor
    column_squares: Tensor
    largest: Tensor
    changed: Tensor
    inexact: Tensor
    lost_squares: Tensor


def delta_pack(base: Tensor, experts: Tensor, *, out: Tensor | None = None) -> Packed:
    """Subtract the base from T experts and pack the differences.

    base     [out, in]     bfloat16, float16 or float32, any strides
    experts  [T, out, in]  one of these dtypes, not necessarily the base's, any strides
    out      [T, out, in]  float16 with adjacent columns: becomes `values`; None for a new tensor

    Sums of squares are float64 throughout; in the twin float32 within tiles of 32 x 128, where a
    difference beyond 1.8e19 overflows. Nothing waits for the device: the facts are tensors there.
    """
    count, rows, columns = experts.shape
    assert base.shape == (rows, columns), f"base is {tuple(base.shape)} for experts {tuple(experts.shape)}"
    assert base.dtype in _STORED, f"base is {base.dtype}"
    assert experts.dtype in _STORED, f"experts are {experts.dtype}"
    values = experts.new_empty(experts.shape, dtype=torch.float16) if out is None else out
    assert values.shape == experts.shape, f"out is {tuple(values.shape)} for experts {tuple(experts.shape)}"
    assert values.dtype == torch.float16, f"out is {values.dtype}"
    assert values.stride(-1) == 1 or columns <= 1, "out must have adjacent columns"
    if (faster := twin("delta_pack", experts, experts.numel())) is not None:
        packed: Packed = faster.delta_pack(base, experts, out=values)
        return packed
    squares = experts.new_zeros(count, columns, dtype=torch.float64)
    largest = experts.new_zeros(count, dtype=torch.float32)
    changed = experts.new_zeros(count, dtype=torch.int64)
    inexact = experts.new_zeros(count, dtype=torch.int64)
    lost = experts.new_zeros(count, dtype=torch.float64)
    panel = max(1, _PANEL // max(1, columns))
    for start in range(0, rows if columns else 0, panel):
        end = min(start + panel, rows)
        below = base[start:end].float()
        for t in range(count):
            delta = experts[t, start:end].float() - below
            scaled = delta * SCALE
            values[t, start:end] = scaled
            missed = scaled - values[t, start:end].float()  # exact in float32 where finite
            squares[t] += delta.double().square().sum(0)
            largest[t] = torch.maximum(largest[t], delta.abs().amax())
            changed[t] += (delta != 0).sum()
            inexact[t] += (missed != 0).sum()
            lost[t] += missed.double().square().sum() / SCALE**2
    return Packed(
        values=values, column_squares=squares, largest=largest, changed=changed, inexact=inexact, lost_squares=lost
    )
