"""Symmetric rank-k update: half of XᵀX, as panels of plain matrix products."""

from __future__ import annotations

from torch import Tensor

# measured best at n = 1024 to 4096, both CPU libraries: rectangles by halving down to 512, then rows of 128
_TRIANGLE = 512
_PANEL = 128
_STRIP = 64


def add_gram_(out: Tensor, x: Tensor) -> Tensor:
    """Add XᵀX to `out` on and below the diagonal; mirror_ fills the rest.

    out  [n, n]  float32 or float64; what lies above the diagonal is left in no particular state
    x    [k, n]  the same dtype, any strides: `add_gram_(out, d.mT)` adds D Dᵀ

    Does k·n² operations instead of the 2·k·n² of a full product, with no temporary. Returns `out`.
    """
    assert out.shape == (x.shape[1], x.shape[1]), f"out is {tuple(out.shape)} for x {tuple(x.shape)}"
    _add_triangle(out, x, x.mT, 0, x.shape[1])
    return out


def _add_triangle(out: Tensor, x: Tensor, xt: Tensor, start: int, stop: int) -> None:
    if stop - start <= _TRIANGLE:
        for row in range(start, stop, _PANEL):
            end = min(row + _PANEL, stop)
            out[row:end, start:end].addmm_(xt[row:end], x[:, start:end])
        return
    panels = (stop - start + _PANEL - 1) // _PANEL
    middle = start + panels // 2 * _PANEL
    _add_triangle(out, x, xt, start, middle)
    _add_triangle(out, x, xt, middle, stop)
    out[middle:stop, start:middle].addmm_(xt[middle:stop], x[:, start:middle])


def mirror_(out: Tensor) -> Tensor:
    """Copy the lower triangle of `out` [n, n] onto the upper one, in place; exactly symmetric after."""
    n = out.shape[0]
    for start in range(0, n, _STRIP):
        end = min(start + _STRIP, n)
        corner = out[start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        # reading the strip once in order is 3 to 5 times faster than copying its transposed view
        out[start:end, end:] = out[end:, start:end].contiguous().mT
    return out
