"""Which implementation of an op runs: a fixed table by architecture and size, and what overrides it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

Implementation = Literal["table", "torch", "triton"]

NEVER = 1 << 62
# predicted from what ahead-of-time compiling shows, not yet measured: `make gpu` does that
# the smallest size from which the Triton twin is taken, by compute capability (major * 10 + minor); an architecture
# that is not listed takes the next lower one's line. `size` is the op's own measure of its work
FASTER_FROM: dict[str, dict[int, int]] = {
    "delta_pack": {80: 0},
    "gram": {80: 1024},
    "moment": {80: NEVER},
    "fused": {80: NEVER},
    "apply": {80: 0},
    "weighted_sum": {80: 0},
    "elect": {80: 0},
    "magnitude": {80: 0},
    "drop": {80: 0},
}
_VARIABLE = "STREAMMERGE_KERNELS"
_override: ContextVar[Implementation | None] = ContextVar("kernels", default=None)


def twin(op: str, tensor: Tensor, size: int) -> ModuleType | None:
    """The module `OP_triton` where it should run in place of the torch reference, else None.

    op      a line of `FASTER_FROM`
    tensor  an operand; its device decides. CPU tensors never leave the reference
    size    what the table's line is measured in: the Gram's n, or the number of elements

    `STREAMMERGE_KERNELS=torch` or `=triton` in the environment, or `choose`, overrule the table.
    """
    if not tensor.is_cuda:
        return None
    chosen = _override.get() or os.environ.get(_VARIABLE, "table")
    assert chosen in ("table", "torch", "triton"), f"{_VARIABLE} is {chosen!r}, expected table, torch or triton"
    if chosen == "torch" or (chosen == "table" and size < faster_from(op, _capability(tensor.device))):
        return None
    return importlib.import_module(f"streammerge_kernels.{op}_triton")


def faster_from(op: str, capability: int) -> int:
    """The table's entry for an architecture; NEVER where it is older than all that are listed."""
    lines = [(listed, size) for listed, size in FASTER_FROM[op].items() if listed <= capability]
    return max(lines)[1] if lines else NEVER


@contextmanager
def choose(implementation: Implementation) -> Iterator[None]:
    """Overrule the table within the block, in this thread."""
    token = _override.set(implementation)
    try:
        yield
    finally:
        _override.reset(token)


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
