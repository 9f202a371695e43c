"""The weighted sum of changes from a base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streammerge_kernels.choice import twin

# elements summed at a time: the converted operands then stay in a CPU's cache; a GPU wants few launches
_CHUNK = 1 << 17
_DEVICE_CHUNK = 1 << 25


def weighted_sum(
    base: Tensor, experts: Tensor | Sequence[Tensor], weights: Sequence[float], *, out: Tensor | None = None
) -> Tensor:
    """Compute Σ w_t (W_t - W_0).

    base     [*shape] any float dtype
    experts  [T, *shape], or a sequence of T tensors [*shape] that may differ in dtype
    weights  T numbers, rounded to the result's dtype
    out      [*shape] contiguous, or None for a new tensor; overlaps no operand

    The result is float64 if any operand is, else float32, and so is the arithmetic: differences
    rounded, then added in the order given, each product and its sum rounded once. Operands that are
    not contiguous are copied, an expert at a time. Returns `out`, zeros where there are no experts.
    """
    dtype = result_dtype(base, experts)
    out = torch.empty(base.shape, dtype=dtype, device=base.device) if out is None else out
    assert len(weights) == len(experts), f"{len(weights)} weights for {len(experts)} experts"
    assert all(expert.shape == base.shape for expert in experts), f"experts differ in shape from {tuple(base.shape)}"
    assert out.shape == base.shape, f"out is {tuple(out.shape)} for {tuple(base.shape)}"
    assert out.dtype == dtype, f"out is {out.dtype}, not {dtype}"
    assert out.is_contiguous(), "out must be contiguous"
    if (faster := twin("weighted_sum", base, base.numel())) is not None:
        result: Tensor = faster.weighted_sum(base, experts, weights, out=out)
        return result
    total, origin = out.zero_().view(-1), base.contiguous().view(-1)
    size = _CHUNK if base.device.type == "cpu" else _DEVICE_CHUNK
    for weight, expert in zip(weights, experts, strict=True):
        moved = expert.contiguous().view(-1)
        for first in range(0, total.numel(), size):
            part = slice(first, first + size)
            change = torch.sub(moved[part].to(dtype), origin[part].to(dtype))
            total[part].add_(change, alpha=weight)
    return out


def result_dtype(base: Tensor, experts: Tensor | Sequence[Tensor]) -> torch.dtype:
    """float64 if any operand is, else float32."""
    stored = [base.dtype, *([experts.dtype] if isinstance(experts, Tensor) else (e.dtype for e in experts))]
    return torch.float64 if torch.float64 in stored else torch.float32
