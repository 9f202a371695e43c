"""Choose the faster of torch's two CPU libraries for float32 products, where it is as accurate."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

# what "bf16" selects: oneDNN's kernels, which compute in true float32 unless the CPU has bf16 tiles
_FAST = "bf16"
_ACCURATE = 1e-5
# what the setting was before the first of the blocks under way, and one entry for each of them
_before: list[Any] = []
_inside: list[None] = []
_changing = threading.Lock()
_SHAPES = ((64, 64, 64), (129, 257, 65), (256, 512, 128), (33, 1024, 300))


@contextmanager
def fast_matmul() -> Iterator[bool]:
    """Run the block's float32 CPU products through oneDNN where that is true float32; yield whether it is.

    On a CPU with bf16 tiles the same setting would round the operands to bf16, so it is used only
    where products of several shapes came out within 1e-5 of float64, tested once per process.
    The setting is global to the process: it is put back when the last of the blocks that overlap, on whatever
    threads, is left.
    """
    with _changing:
        accurate = is_accurate()
        if accurate:
            settings = _settings()
            if not _inside:
                _before.append(settings.fp32_precision)
                settings.fp32_precision = _FAST
            _inside.append(None)
    try:
        yield accurate
    finally:
        with _changing:
            if accurate:
                _inside.pop()
                if not _inside:
                    settings.fp32_precision = _before.pop()


@lru_cache(maxsize=1)
def is_accurate() -> bool:
    """Whether the setting exists here and leaves float32 products accurate."""
    settings = _settings()
    if not torch.backends.mkldnn.is_available() or not hasattr(settings, "fp32_precision"):  # type: ignore[no-untyped-call]
        return False
    before = settings.fp32_precision
    settings.fp32_precision = _FAST
    try:
        return all(product_error(*shape) < _ACCURATE for shape in _SHAPES)
    finally:
        settings.fp32_precision = before


def _settings() -> Any:
    # torch before 2.9 has no such switch, and torch's stubs know none
    return getattr(torch.backends.mkldnn, "matmul", None)


def product_error(rows: int, inner: int, columns: int) -> float:
    """Relative error of a random float32 product under the current settings, transposed operands included."""
    generator = torch.Generator().manual_seed(rows)
    left = torch.randn(rows, inner, generator=generator)
    right = torch.randn(columns, inner, generator=generator)
    exact = left.double() @ right.double().mT
    plain = (left @ right.mT.contiguous()).double()
    transposed = torch.zeros(columns, rows).addmm_(right, left.mT).mT.double()
    return max(float((p - exact).norm() / exact.norm()) for p in (plain, transposed))
