"""Add a merged delta to its base, round the sum to the output's dtype, and measure what rounding did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streammerge_kernels.choice import twin
from streammerge_kernels.round import Rounding, round_to

# elements worked on at a time: temporaries are no larger, and that many ones have an exact sum in float32. A GPU wants
# few launches
_CHUNK = 1 << 19
_DEVICE_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of one run of elements; add up over a tensor's runs.

    sums  [4] float64, on the output's device: the four below, in their order

    changed         0-d int64    entries whose output is not the base's value in the output's dtype
    merged_squares  0-d float64  sum of the squares of the merged delta
    lost_squares    0-d float64  sum of the squares of output - (base + merged)
    non_finite      0-d int64    entries of the output that are infinite or NaN
    """

    sums: Tensor

    @property
    def changed(self) -> Tensor:
        return self.sums[0].long()

    @property
    def merged_squares(self) -> Tensor:
        return self.sums[1]

    @property
    def lost_squares(self) -> Tensor:
        return self.sums[2]

    @property
    def non_finite(self) -> Tensor:
        return self.sums[3].long()


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
    base_dtype: torch.dtype | None = None,
) -> Applied:
    """Write round(base + merged) to `out`.

    base        [*shape] any float dtype
    merged      [*shape] float32 or float64, in which the sum is formed; may be overwritten
    out         [*shape] bfloat16, float16, float32 or float64, contiguous; overlaps neither operand
    rounding, seed, name, first_index   as `round_to` takes them
    measure     without it `changed`, `merged_squares` and `lost_squares` are 0 and cost nothing
    base_dtype  one that holds every value of `base`, where that is narrower than its own: it saves a conversion

    The squares are those of norms in merged's dtype, infinite where one overflows. Operands that are
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
    size = _CHUNK if out.device.type == "cpu" else _DEVICE_CHUNK
    fits = out.dtype in (base.dtype, base_dtype)
    # a transposed matrix comes as a view; rounding goes by the order of the output's elements
    runs = merged.contiguous().view(-1), base.contiguous().view(-1), out.view(-1)
    rows = []
    # an empty run has one empty chunk
    for first in range(0, max(out.numel(), 1), size):
        exact, addend, rounded = (run[first : first + size] for run in runs)
        merged_norm = torch.linalg.vector_norm(exact) if measure else None
        exact.add_(addend)
        at = first_index + first
        round_to(exact, out.dtype, rounding=rounding, seed=seed, name=name, first_index=at, out=rounded)
        if merged_norm is None:
            # float32 whose squares have a sum fits in bfloat16 too, and is read faster than what was written
            telling = rounded if out.dtype is torch.float16 or exact.dtype is torch.float64 else exact
            norm, nothing = torch.linalg.vector_norm(telling, dtype=exact.dtype), torch.zeros((), device=out.device)
            rows.append((nothing, nothing, nothing, _non_finite(rounded, norm)))
        else:
            changed, lost_norm, norm = _compared(exact, rounded, addend if fits else addend.to(out.dtype))
            rows.append((changed, merged_norm, lost_norm, _non_finite(rounded, norm)))
    return Applied(_added(rows))


def _compared(exact: Tensor, rounded: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many entries of `rounded` are not `before`, the norm of what it lost of `exact`, and one that tells of NaN.

    The last is finite where all of `rounded` is, unless its squares overflow. `exact` is overwritten.
    """
    if rounded.dtype == exact.dtype:
        norm = torch.linalg.vector_norm(rounded)
        return torch.ne(rounded, before, out=exact).sum(), torch.zeros_like(norm), norm
    value = rounded.to(torch.promote_types(rounded.dtype, exact.dtype), copy=True)
    # what left the range leaves no finite remainder
    lost = torch.linalg.vector_norm(exact.sub_(value))
    # on a CPU a comparison into its operands' own dtype is several times faster than one into booleans
    return value.ne_(before).sum(), lost, lost


def _non_finite(rounded: Tensor, norm: Tensor) -> Tensor:
    # a norm is read faster than elements are tested, but only a CPU can look at it here
    if norm.device.type == "cpu" and math.isfinite(norm.item()):
        return torch.zeros((), dtype=torch.int64)
    return torch.count_nonzero(~torch.isfinite(rounded))


def _added(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """The sums over chunks, those of norms being of their squares: [4] float64."""
    on_cpu = rows[0][0].device.type == "cpu"
    numbers: list[list[Any]] = [[n.item() if on_cpu else n.double() for n in row] for row in rows]
    terms = ((changed, merged * merged, lost * lost, bad) for changed, merged, lost, bad in numbers)
    sums = [sum(column) for column in zip(*terms, strict=True)]
    return torch.tensor(sums, dtype=torch.float64) if on_cpu else torch.stack(sums)
