"""Add a merged delta to its base, round the sum to the output's dtype, and measure what rounding did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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

    totals  the four below, in their order: [4] float64 on the output's device, or plain numbers where that is a CPU

    changed         0-d int64    entries whose output is not the base's value in the output's dtype
    merged_squares  0-d float64  sum of the squares of the merged delta
    lost_squares    0-d float64  sum of the squares of output - (base + merged)
    non_finite      0-d int64    entries of the output that are infinite or NaN
    """

    totals: Tensor | list[float]

    @property
    def sums(self) -> Tensor:
        """The totals as a tensor: [4] float64."""
        return torch.tensor(self.totals, dtype=torch.float64) if isinstance(self.totals, list) else self.totals

    def tolist(self) -> list[float]:
        """The totals as numbers; for an accelerator this waits."""
        return self.totals if isinstance(self.totals, list) else self.totals.tolist()

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
    size = _CHUNK if out.is_cpu else _DEVICE_CHUNK
    fits = out.dtype in (base.dtype, base_dtype)
    # a transposed matrix comes as a view; rounding goes by the order of the output's elements
    runs = _flat(merged), _flat(base), _flat(out)
    rows: list[tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int]] = []
    # an empty run has one empty chunk
    for first in range(0, max(out.numel(), 1), size):
        exact, addend, rounded = runs if out.numel() <= size else (run[first : first + size] for run in runs)
        merged_norm = torch.linalg.vector_norm(exact) if measure else None
        exact.add_(addend)
        at = first_index + first
        round_to(exact, out.dtype, rounding=rounding, seed=seed, name=name, first_index=at, out=rounded)
        if merged_norm is None:
            # float32 whose squares have a sum fits in bfloat16 too, and is read faster than what was written
            telling = rounded if out.dtype is torch.float16 or exact.dtype is torch.float64 else exact
            norm = torch.linalg.vector_norm(telling, dtype=exact.dtype)
            nothing = 0 if out.is_cpu else torch.zeros((), device=out.device)
            rows.append((nothing, nothing, nothing, _non_finite(rounded, norm)))
        else:
            changed, lost_norm, norm = _compared(exact, rounded, addend if fits else addend.to(out.dtype))
            rows.append((changed, merged_norm, lost_norm, _non_finite(rounded, norm)))
    return Applied(_added(rows, out.device))


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


def _flat(run: Tensor) -> Tensor:
    # a view of what is flat is no other tensor, and takes longer than a small one's arithmetic
    return run if run.ndim == 1 and run.is_contiguous() else run.contiguous().view(-1)


def _non_finite(rounded: Tensor, norm: Tensor) -> Tensor | int:
    # a norm is read faster than elements are tested, but only a CPU can look at it here
    if norm.is_cpu and math.isfinite(norm.item()):
        return 0
    return torch.count_nonzero(~torch.isfinite(rounded))


def _added(rows: Sequence[Sequence[Tensor | int]], device: torch.device) -> Tensor | list[float]:
    """The sums over chunks, those of norms being of their squares: see `Applied.totals`."""
    if device.type == "cpu":
        totals = [0.0] * 4
        for row in rows:
            changed, merged, lost, bad = [n if isinstance(n, int) else n.item() for n in row]
            for place, term in enumerate((changed, merged * merged, lost * lost, bad)):
                totals[place] += term
        return totals
    numbers = [[n.double() for n in row if isinstance(n, Tensor)] for row in rows]
    terms = ((changed, merged * merged, lost * lost, bad) for changed, merged, lost, bad in numbers)
    return torch.stack([sum(column[1:], column[0]) for column in zip(*terms, strict=True)])
