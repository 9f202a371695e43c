"""Add a product of float16 by float32 to a float32 matrix, as accurately as if both were float32."""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge_kernels.choice import twin

# elements of a float16 operand converted at a time: 32 MiB of float32
_CONVERTED = 1 << 23


def add_moment_(out: Tensor, x: Tensor, gram: Tensor, *, left: bool = False) -> Tensor:
    """Add x · gram, or with `left` gram · x, to `out`; returns `out`.

    out   [m, n]  float32
    x     [m, n]  float16 or float32, any strides
    gram  [n, n]  float32, or with `left` [m, m]; symmetric, and both triangles are read: mirror_ it first

    All float64 works too, and so do batches, [B, ...] each. See add_product_ for accuracy and memory.
    """
    return add_product_(out, gram, x) if left else add_product_(out, x, gram)


def add_product_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add left · right to `out` with the accuracy of float32 products; returns `out`.

    out    [m, n]  float32
    left   [m, k]  one of the two is float16, the other float32; any strides
    right  [k, n]

    Batches, [B, ...] each, work too, and so do three float32 or three float64 tensors. On the CPU the
    float16 operand is converted, 32 MiB at a time. On a GPU the float32 one is written as the sum of two
    float16 numbers times a power of two taken from the largest magnitude of each matrix: 22 bits of
    mantissa, less for entries below 2⁻¹⁶ of the largest, which keep 2⁻³⁹ of it absolutely. The two take 4
    bytes per element of the float32 operand; torch takes 4 more while it writes them, and 4 per element of
    `out`. There, a NaN or an infinity in the float32 operand makes all of its matrix NaN; on the CPU, what
    it reaches.
    """
    check_product(out, left, right)
    if (faster := twin("moment", out, left.shape[-1])) is not None:
        return faster.add_product_(out, left, right)  # type: ignore[no-any-return]
    if out.numel() == 0 or left.shape[-1] == 0:
        return out
    if left.dtype == right.dtype:
        return out.addmm_(left, right) if out.ndim == 2 else out.baddbmm_(left, right)
    if out.device.type == "cuda":
        return _add_split_(out, left, right)
    if out.ndim == 3:
        for one in zip(out, left, right, strict=True):
            _add_converted_(*one)
        return out
    return _add_converted_(out, left, right)


def split(wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write float32 `wide` [..., rows, columns] as (high + low) · inverse, with high and low float16.

    inverse [..., 1, 1] float32 is a power of two, of its own for each matrix; NaN where the matrix has
    a NaN or an infinity.
    """
    scale, inverse = powers(largest_magnitude(wide))
    scaled = wide * scale
    high = scaled.half()
    return high, scaled.sub_(high).half(), inverse


def largest_magnitude(wide: Tensor) -> Tensor:
    """The largest |entry| of each matrix of [..., rows, columns], as [..., 1, 1]; NaN if it has one."""
    largest: Tensor = torch.linalg.vector_norm(wide, torch.inf, dim=(-2, -1), keepdim=True)
    return largest


def powers(largest: Tensor) -> tuple[Tensor, Tensor]:
    """The power of two that takes each magnitude into [2¹⁴, 2¹⁵), and its inverse, without asking the device.

    Magnitudes below 2⁻¹¹², zero among them, take that one's power. Where one is infinite or NaN, the
    inverse is NaN.
    """
    # from the bits, as a GPU's pow need not be exact
    exponent = (largest.view(torch.int32) >> 23) & 0xFF
    finite = exponent < 0xFF
    exponent = exponent.clamp(min=15)
    scale = ((268 - exponent) << 23).view(torch.float32)
    inverse = ((exponent - 14) << 23).view(torch.float32)
    return scale, torch.where(finite, inverse, torch.nan)


def check_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    shapes = f"out {tuple(out.shape)}, left {tuple(left.shape)}, right {tuple(right.shape)}"
    assert out.ndim in (2, 3), shapes
    assert left.shape == (*out.shape[:-1], left.shape[-1]), shapes
    assert right.shape == (*out.shape[:-2], left.shape[-1], out.shape[-1]), shapes
    found = f"{left.dtype} by {right.dtype} into {out.dtype}"
    assert out.dtype in (torch.float32, torch.float64), found
    assert {left.dtype, right.dtype} in ({out.dtype}, {torch.float16, torch.float32}), found
    assert out.dtype == torch.float32 or left.dtype == right.dtype, found


def _add_converted_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    inner = max(left.shape[-1], 1)
    panel = max(_CONVERTED // inner, 1)
    if left.dtype == torch.float16:
        for start in range(0, out.shape[0], panel):
            out[start : start + panel].addmm_(left[start : start + panel].float(), right)
    else:
        for start in range(0, out.shape[1], panel):
            out[:, start : start + panel].addmm_(left, right[:, start : start + panel].float())
    return out


def _add_split_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if left.dtype == torch.float32:
        high, low, inverse = split(left)
        pairs = ((high, right), (low, right))
    else:
        high, low, inverse = split(right)
        pairs = ((left, high), (left, low))
    for one, other in pairs:
        out.addcmul_(_float32_product(one, other), inverse)
    return out


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    # adding within addmm is broken for out_dtype: https://github.com/pytorch/pytorch/issues/154086
    multiply = torch.mm if left.ndim == 2 else torch.bmm
    return multiply(left, right, out_dtype=torch.float32)
