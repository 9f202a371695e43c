"""Memory for one step at a time, taken once and reused: fresh pages cost more than arithmetic."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_ALIGNMENT_BYTES = 64
_MOST_KEPT = 256


class Workspace:
    """An arena of `nbytes`, or of `memory` that is so long. What is taken stays valid until `reset`.

    A method that takes more than was planned still gets memory, from the allocator; `overdraft_bytes`
    is the most that ever came to. The same shape at the same place is the same tensor again: making one takes longer
    than a small tensor's arithmetic.
    """

    def __init__(self, nbytes: int, memory: Tensor | None = None) -> None:
        self._memory = torch.empty(nbytes, dtype=torch.uint8) if memory is None else memory
        self._used = 0
        self._overdrawn = 0
        self._taken: dict[tuple[int, tuple[int, ...], torch.dtype], tuple[Tensor, int]] = {}
        self.peak_bytes = 0
        self.overdraft_bytes = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor."""
        key = self._used, shape, dtype
        if key in self._taken:
            taken, self._used = self._taken[key]
            return taken
        nbytes = math.prod(shape) * dtype.itemsize
        end = self._used + nbytes
        if end > len(self._memory):
            self._overdrawn += nbytes
            self.overdraft_bytes = max(self.overdraft_bytes, self._overdrawn)
            return torch.empty(shape, dtype=dtype)
        taken = self._memory[self._used : end].view(dtype).view(shape)
        self._used = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self.peak_bytes = max(self.peak_bytes, self._used)
        if len(self._taken) == _MOST_KEPT:
            self._taken.clear()
        self._taken[key] = taken, self._used
        return taken

    def reset(self) -> None:
        """All of it is free again."""
        self._used = self._overdrawn = 0

    def parts(self, count: int) -> list[Workspace]:
        """Its memory as workspaces for so many threads, to be used while nothing is taken of the whole."""
        nbytes = len(self._memory) // count // _ALIGNMENT_BYTES * _ALIGNMENT_BYTES
        return [Workspace(nbytes, self._memory[i * nbytes : (i + 1) * nbytes]) for i in range(count)]


class LaneWorkspace(threading.local, Workspace):
    """A workspace for merges that several threads take steps of: each thread that takes from it has one of its own."""
