"""Add a merged delta to its base, round the sum to the output's dtype, and measure what rounding did."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from streammerge_kernels.choice import twin
from streammerge_kernels.round import Rounding, round_to

# elements converted at a time where dtypes differ: an operation on all would convert all first
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of one run of elements, on the output's device; add up over a tensor's runs.

    changed         0-d int64    entries whose output is not the base's value in the output's dtype
    non_finite      0-d int64    entries of the output that are infinite or NaN
    merged_squares  0-d float64  sum of the squares of the merged delta
    lost_squares    0-d float64  sum of the squares of output - (base + merged)
    """

    changed: Tensor
    non_finite: Tensor
    merged_squares: Tensor
    lost_squares: Tensor


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
    """Write round(base + merged) to `out`.

    base      [*shape] any float dtype
    merged    [*shape] float32 or float64, in which the sum is formed; may be overwritten
    out       [*shape] bfloat16, float16, float32 or float64, contiguous; overlaps neither operand
    rounding, seed, name, first_index   as `round_to` takes them
    measure   without it `changed`, `merged_squares` and `lost_squares` are 0 and cost nothing

    The squares are those of a norm in merged's dtype, infinite where it overflows. Operands that are
    not contiguous are copied. On CUDA nothing waits for the device.
    """
    assert base.shape == merged.shape == out.shape, f"{tuple(base.shape)} + {tuple(merged.shape)} -> {tuple(out.shape)}"
    assert merged.dtype in (torch.float32, torch.float64), f"merged is {merged.dtype}"
    assert out.is_contiguous(), "out must be contiguous"
    if (faster := twin("apply", out, out.numel())) is not None:
        applied: Applied = faster.apply_(
            base, merged, out, rounding=rounding, seed=seed, name=name, first_index=first_index, measure=measure
        )
        return applied
    nothing = torch.zeros((), dtype=torch.float64, device=out.device)
    changed, merged_squares, lost_squares = nothing.long(), nothing, nothing
    if measure:
        # before `contiguous`: a norm of a view adds up in another order than that of its copy
        merged_squares = _squares(merged)
    # a transposed matrix comes as a view; rounding goes by the order of the output's elements
    exact, base = merged.contiguous(), base.contiguous()
    for part, addend in _chunks(exact, base):
        part.add_(addend)
    round_to(exact, out.dtype, rounding=rounding, seed=seed, name=name, first_index=first_index, out=out)
    non_finite = _non_finite(out, exact)
    if measure:
        for rounded, before in _chunks(out, base):
            changed = changed + _differing(rounded, before)
        if out.dtype != exact.dtype:
            for part, rounded in _chunks(exact, out):
                part.sub_(rounded)
            lost_squares = _squares(exact)
    return Applied(changed, non_finite, merged_squares, lost_squares)


def _chunks(left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    left, right = left.view(-1), right.view(-1)
    for first in range(0, left.numel(), _CHUNK):
        yield left[first : first + _CHUNK], right[first : first + _CHUNK]


def _differing(rounded: Tensor, before: Tensor) -> Tensor:
    # on a CPU a comparison into its operands' own dtype is several times faster than one into booleans; a chunk's
    # count of ones is exact in float32
    return before.to(rounded.dtype, copy=True).ne_(rounded).sum(dtype=torch.float32).long()


def _squares(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm.double().square()


def _non_finite(out: Tensor, exact: Tensor) -> Tensor:
    # a norm is read faster than elements are tested, but only a CPU can look at it here. float32 whose
    # squares have a sum fits in bfloat16 too, and is read faster than what was written
    telling = out if out.dtype is torch.float16 or exact.dtype is torch.float64 else exact
    if out.device.type == "cpu" and math.isfinite(torch.linalg.vector_norm(telling, dtype=exact.dtype).item()):
        return torch.zeros((), dtype=torch.int64)
    found = torch.zeros((), dtype=torch.int64, device=out.device)
    for part, _ in _chunks(out, out):
        found += torch.count_nonzero(~torch.isfinite(part))
    return found
