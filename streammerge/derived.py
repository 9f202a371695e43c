"""Tensors that no file holds as they are: computed run by run, as they are read, from tensors that files hold.

To the rest of streammerge they are tensors like any other. A kind of them is one class, a `Derivation`, and one
function that puts its entries in place of a checkpoint's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from streammerge.checkpoint import DTYPE_BYTES, TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

ReadPart = Callable[[TensorEntry, int, int], "Tensor"]
"""Reads a run of an entry, from an element on so many: [elements] in its stored dtype."""


class Derivation(Protocol):
    """How a tensor comes of others, its entry's `parts`.

    Plans hold and copy it: it is small, immutable, and loads torch in `fill` only.
    """

    def scratch_bytes(self, entry: DerivedEntry, elements: int) -> int:
        """The most memory that `fill` takes beside `out` for a run of so many elements, what it reads included."""

    def fill(self, entry: DerivedEntry, out: Tensor, first_element: int, read: ReadPart) -> None:
        """Write a run of the tensor, from `first_element` of the flattened whole on.

        out   [elements] in the entry's dtype; in row-major order, beginning anywhere
        read  gives runs of the parts; what it gives is valid until `fill` returns

        Called by the thread that reads, and on its own: not with an accelerator's tensors.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivedEntry(TensorEntry):
    """A tensor that is computed when it is read.

    name, dtype, shape, nbytes  of the tensor that results
    file, offset                of the part that decides when its turn is: models are read in the order of their bytes
    parts                       what it is computed from, stored or derived in turn
    written_dtype               what a merge writes it in by default; None for its own dtype
    """

    parts: tuple[TensorEntry, ...]
    derivation: Derivation
    written_dtype: str | None = None

    @property
    def output_dtype(self) -> str:
        """The dtype that a merge writes it in by default."""
        return self.written_dtype or self.dtype

    @property
    def stored_bytes(self) -> int:
        """Bytes that reading all of it reads, each once."""
        return sum(part.stored_bytes for part in self.parts)

    def scratch_bytes(self, elements: int) -> int:
        """The most memory that computing a run of so many elements takes beside the run."""
        return self.derivation.scratch_bytes(self, elements)


@dataclass(frozen=True, slots=True)
class _Run:
    """A run of the entry's one part, which is itself derived."""

    first_element: int

    def scratch_bytes(self, entry: DerivedEntry, elements: int) -> int:
        (whole,) = entry.parts
        inner = whole.scratch_bytes(elements) if isinstance(whole, DerivedEntry) else 0
        return elements * DTYPE_BYTES[entry.dtype] + inner

    def fill(self, entry: DerivedEntry, out: Tensor, first_element: int, read: ReadPart) -> None:
        out.copy_(read(entry.parts[0], self.first_element + first_element, out.numel()))


def run_of(entry: TensorEntry, shape: tuple[int, ...], first_element: int) -> TensorEntry:
    """A run of a tensor as one of its own: of `shape`, from `first_element` of the flattened whole on."""
    nbytes = math.prod(shape) * DTYPE_BYTES[entry.dtype]
    if isinstance(entry, DerivedEntry):
        return replace(entry, shape=shape, nbytes=nbytes, parts=(entry,), derivation=_Run(first_element))
    return replace(entry, shape=shape, nbytes=nbytes, offset=entry.offset + first_element * DTYPE_BYTES[entry.dtype])


def scratch_bytes(entry: TensorEntry, elements: int) -> int:
    """What computing a run of an entry takes beside the run: nothing, where a file holds it."""
    return entry.scratch_bytes(elements) if isinstance(entry, DerivedEntry) else 0
