"""A covariance method's system as one merge leaves it to others that differ in the ridge alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from streammerge.solve.buffers import Buffers
from streammerge.solve.survey import Survey
from streammerge.solve.systems import System


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSystem:
    """What was seen of the experts, and X H = Y before λ takes part in it. Nothing here is written to again."""

    seen: Survey
    is_dual: bool
    anchor: Tensor | None
    gram: Tensor
    right: Tensor
    stack: Tensor | None
    roots: Tensor | None
    way: Tensor | None

    @classmethod
    def of(cls, system: System, seen: Survey, *, is_dual: bool, copy: Callable[[Tensor], Tensor]) -> KeptSystem:
        """A copy of a system that no solver saw yet."""

        def copied(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else copy(tensor)

        return cls(
            seen=seen,
            is_dual=is_dual,
            anchor=copied(system.anchor),
            gram=copy(system.gram),
            right=copy(system.right),
            stack=copied(system.stack),
            roots=copied(system.roots),
            way=copied(system.way),
        )

    def system(self, buffers: Buffers) -> System:
        """The system again, what solvers write to in `buffers`."""

        def writable(name: str, tensor: Tensor) -> Tensor:
            return buffers.take(name, tensor.dtype, *tensor.shape).copy_(tensor)

        # the dual form is factored in place
        gram = writable("gram", self.gram) if self.is_dual else self.gram
        return System(
            anchor=None if self.anchor is None else writable("anchor", self.anchor),
            gram=gram,
            right=writable("right", self.right),
            spare=gram if self.is_dual else buffers.take("spare", gram.dtype, *gram.shape),
            stack=self.stack,
            buffers=buffers,
            roots=self.roots,
            way=self.way,
        )


def kept_bytes(system: System) -> int:
    """What a copy takes."""
    parts = (system.anchor, system.gram, system.right, system.stack, system.roots, system.way)
    return sum(part.nbytes for part in parts if part is not None)
