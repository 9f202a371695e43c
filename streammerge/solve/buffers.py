"""Working memory that one tensor's solution takes once and uses for one thing after another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from streammerge.delta import Deltas


class Buffers:
    """Named buffers from the step's workspace, each wide enough for `widest`.

    Taking a name again gives the same memory, in another shape or dtype: what it held is lost.
    """

    def __init__(self, deltas: Deltas, widest: torch.dtype) -> None:
        self._deltas, self._widest = deltas, widest
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """An uninitialised contiguous [*shape] of `dtype`."""
        elements = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.nbytes < elements * dtype.itemsize:
            widest = max(dtype, self._widest, key=lambda d: d.itemsize)
            flat = self._flat[name] = self._deltas.empty(elements, dtype=widest)
        return flat.view(dtype)[:elements].view(shape)
