"""What one merge found of a tensor, for others that merge the same tensor in the same process."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from streammerge.workspace import Workspace


class Remembered:
    """Findings about one tensor at a time, their tensors in `capacity_bytes` that are taken once.

    The merges of a batch go through a model side by side: when one of them comes to another tensor, what was
    found of the last one is forgotten.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._memory = Workspace(capacity_bytes)
        self._free_bytes = self._capacity_bytes = capacity_bytes
        self._subject: object = None
        self._findings: dict[Hashable, Any] = {}

    def recall(self, subject: object, key: Hashable) -> Any | None:
        """What was kept under `key` of the tensor that `subject` says all about; None where nothing was."""
        return self._findings.get(key) if subject == self._subject else None

    def keep(
        self, subject: object, key: Hashable, nbytes: int, make: Callable[[Callable[[Tensor], Tensor]], Any]
    ) -> bool:
        """Keep what `make` makes, given a function that copies tensors, `nbytes` in all; whether there was room."""
        if subject != self._subject:
            self._memory.reset()
            self._findings.clear()
            self._subject, self._free_bytes = subject, self._capacity_bytes
        if nbytes > self._free_bytes:
            return False
        self._findings[key] = make(self._copied)
        return True

    def _copied(self, tensor: Tensor) -> Tensor:
        self._free_bytes -= tensor.nbytes
        return self._memory.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)
