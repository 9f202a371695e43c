"""What a method costs on one tensor, known before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Price of one step: workspace beyond the tensors being read, arithmetic, passes over the experts."""

    workspace_bytes: int
    flops: int
    passes: int


def elementwise(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """One multiply-add per element and expert, in blocks that the stream bounds by itself."""
    rows, columns = shape
    return Cost(workspace_bytes=0, flops=2 * experts * rows * columns, passes=1)
