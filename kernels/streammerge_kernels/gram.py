"""Symmetric rank-k update: half of XᵀX, as panels of plain matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge_kernels.choice import twin

# measured best at n = 1024 to 4096, both CPU libraries: rectangles by halving down to 512, then rows of 128
_TRIANGLE = 512
_PANEL = 128
_STRIP = 64
# elements of a float16 matrix converted at a time: 32 MiB of float32
_CONVERTED = 1 << 23


def add_gram_(out: Tensor, x: Tensor) -> Tensor:
    """Add XᵀX to `out` on and below the diagonal; mirror_ fills the rest.

    out  [n, n]  float32 or float64; what lies above the diagonal is left in no particular state
    x    [k, n]  the same dtype, any strides: `add_gram_(out, d.mT)` adds D Dᵀ. float16, too, where out is
                 float32: products and sums are then float32's

    Batches, [B, ...] each, work too. Does k·n² operations instead of the 2·k·n² of a full product, with no
    temporary but these: float16 is converted on the CPU 32 MiB at a time, and by torch on a GPU becomes a
    full product, which takes 4 bytes per element of `out`. Returns `out`.
    """
    n = x.shape[-1]
    assert out.shape == (*x.shape[:-2], n, n), f"out is {tuple(out.shape)} for x {tuple(x.shape)}"
    if (faster := twin("gram", x, n)) is not None:
        return faster.add_gram_(out, x)  # type: ignore[no-any-return]
    if x.device.type == "cuda" and x.dtype == torch.float16 and x.numel() > 0:
        multiply = torch.mm if x.ndim == 2 else torch.bmm
        return out.add_(multiply(x.mT, x, out_dtype=torch.float32))
    if x.ndim == 3:
        for matrix, operand in zip(out, x, strict=True):
            _add_gram(matrix, operand)
    else:
        _add_gram(out, x)
    return out


def gram_(out: Tensor, x: Tensor) -> Tensor:
    """Write XᵀX [n, n] on and below the diagonal of `out`, whatever that held, as add_gram_ would add it to zeros."""
    if not out.is_cpu or x.ndim != 2 or x.dtype == torch.float16 or len(x) == 0:
        return add_gram_(out.zero_(), x)
    _add_triangle(out, x, x.mT, 0, x.shape[1], beta=0.0)
    return out


def _add_gram(out: Tensor, x: Tensor) -> None:
    k, n = x.shape
    if x.dtype != torch.float16:
        _add_triangle(out, x, x.mT, 0, n)
        return
    rows = max(_CONVERTED // max(n, 1), 1)
    for start in range(0, k, rows):
        panel = x[start : start + rows].float()
        _add_triangle(out, panel, panel.mT, 0, n)


def _add_triangle(out: Tensor, x: Tensor, xt: Tensor, start: int, stop: int, beta: float = 1.0) -> None:
    if stop - start <= _TRIANGLE:
        for row in range(start, stop, _PANEL):
            end = min(row + _PANEL, stop)
            out[row:end, start:end].addmm_(xt[row:end], x[:, start:end], beta=beta)
        return
    panels = (stop - start + _PANEL - 1) // _PANEL
    middle = start + panels // 2 * _PANEL
    _add_triangle(out, x, xt, start, middle, beta)
    _add_triangle(out, x, xt, middle, stop, beta)
    out[middle:stop, start:middle].addmm_(xt[middle:stop], x[:, start:middle], beta=beta)


def add_lower_(out: Tensor, matrix: Tensor) -> Tensor:
    """Add `matrix` to `out`, both [n, n], on and below the diagonal; what comes above it is for mirror_ to fill."""
    for start in range(0, len(out), _TRIANGLE):
        end = start + _TRIANGLE
        out[start:end, :end].add_(matrix[start:end, :end])
    return out


def mirror_(out: Tensor) -> Tensor:
    """Copy the lower triangle of `out` [n, n] or [B, n, n] onto the upper one, in place; exactly symmetric after."""
    n = out.shape[-1]
    if (faster := twin("gram", out, n)) is not None:
        return faster.mirror_(out)  # type: ignore[no-any-return]
    for start in range(0, n, _STRIP):
        end = min(start + _STRIP, n)
        corner = out[..., start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        # reading the strip once in order is 3 to 5 times faster than copying its transposed view
        out[..., start:end, end:] = out[..., end:, start:end].contiguous().mT
    return out
