"""What one merge found of a tensor, for others that merge the same tensor in the same process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from streammerge.workspace import Workspace


class Remembered:
    """Findings about tensors, what they hold in `capacity_bytes` that are taken once. Threads use it side by side.

    same_steps  of which more than one of the merges makes the same, see `shared_blocks`

    The merges of a batch go through a model side by side. The first that asks for a finding in vain is to find it and
    keep it, and others that ask wait until it has; what is not kept when its thread's turn ends, or has no room, each
    finds for itself.
    """

    def __init__(self, capacity_bytes: int, same_steps: Container[Hashable] = ()) -> None:
        self.same_steps = same_steps
        self._memory = Workspace(capacity_bytes)
        self._free_bytes = self._capacity_bytes = capacity_bytes
        self._findings: dict[Hashable, list[_Finding]] = {}
        self._finders: set[int] = set()
        self._changed = threading.Condition()

    def recall(self, subject: object, key: Hashable) -> Any | None:
        """What was kept under `key` of the tensor that `subject` says all about; None where it is to be found."""
        with self._changed:
            found = self._of(subject, key)
            # who is waited for waits for nobody
            while found.finder is not None and not self._by_me():
                self._changed.wait()
            if found.is_new:
                found.is_new, found.finder = False, threading.get_ident()
            return found.what

    def keep(
        self, subject: object, key: Hashable, nbytes: int, make: Callable[[Callable[[Tensor], Tensor]], Any]
    ) -> bool:
        """Keep what `make` makes, given a function that copies tensors, `nbytes` in all; whether there was room.

        To be called by who asked in vain; of others that asked meanwhile nothing is kept.
        """
        with self._changed:
            found = self._of(subject, key)
            if found not in self._by_me():
                return False
            is_kept = nbytes <= self._free_bytes
            self._free_bytes -= nbytes if is_kept else 0
        what = make(self._copied) if is_kept else None
        with self._changed:
            found.what, found.finder = what, None
            if is_kept:
                self._finders.add(threading.get_ident())
            self._changed.notify_all()
        return is_kept

    def end_turn(self) -> bool:
        """Let nobody wait for what this thread was to find; whether it kept anything since it last ended a turn."""
        me = threading.get_ident()
        with self._changed:
            for found in self._by_me():
                found.finder = None
            self._changed.notify_all()
            was_finder = me in self._finders
            self._finders.discard(me)
        return was_finder

    def forget(self) -> None:
        """Begin anew; nobody uses what was recalled, nor is to find anything."""
        with self._changed:
            self._memory.reset()
            self._findings.clear()
            self._free_bytes = self._capacity_bytes

    def _of(self, subject: object, key: Hashable) -> _Finding:
        known = self._findings.setdefault(key, [])
        found = next((each for each in known if each.subject == subject), None)
        if found is None:
            found = _Finding(subject)
            known.append(found)
        return found

    def _by_me(self) -> list[_Finding]:
        me = threading.get_ident()
        return [each for known in self._findings.values() for each in known if each.finder == me]

    def _copied(self, tensor: Tensor) -> Tensor:
        with self._changed:
            memory = self._memory.empty(tuple(tensor.shape), tensor.dtype)
        return memory.copy_(tensor)


@dataclass(slots=True, eq=False)
class _Finding:
    """`finder` is the thread that others wait for."""

    subject: object
    is_new: bool = True
    finder: int | None = None
    what: Any | None = None
