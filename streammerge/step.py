"""One tensor of a plan: what is read, which method merges it, what is written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from streammerge.checkpoint import DTYPE_BYTES, TensorEntry
from streammerge.derived import DerivedEntry, run_of
from streammerge.fp8 import DequantisedEntry, Scheme
from streammerge.rules import Role
from streammerge.solve.cost import BLOCK_BUFFERS

COPY = "copy"


# without slots: it keeps what is computed of its fields, which each of a tensor's blocks asks for
@dataclass(frozen=True, kw_only=True)
class Step:
    """One tensor to merge, or to copy where `method` is "copy".

    base       the base model's bytes; None where the merge does not read a base
    experts    each expert's bytes, in the recipe's order; a copy has one entry and reads only that
    models     which of the plan's models `base` (if any) and then `experts` lie in
    dtype      the output's
    arguments  the method function's keyword arguments
    passes     how often the merge reads the experts: more than once for matrices only
    looks      passes before the merge, for what the method must know first
    by_row     blocks are whole rows of the last dimension
    looks_at_model  its looks see all such steps before the first is merged, as those of matrices do
    kept_bytes  what its looks keep of each expert's element, see `Cost`
    block_buffers  how many buffers of a block's size a step by element or row holds
    beside     for each expert what lies beside its weights, and in which of the plan's models
    pool       matrices of one pool read the same input and are merged together; they stand side by side in a plan
    parts      of the matrices stacked from a pool: each one's step, from top to bottom
    matrix     which one of a stack it is
    passes_non_finite  what is not a finite number ends no merge of it, see `Recipe.non_finite`
    scheme     the merged tensor is stored in 8 bits as this says, with its scales in a tensor of their own
    thin       a matrix that every expert changed by a low-rank product of the base's, if at all: the factors are merged
               and the base is read once
    workspace_bytes, device_bytes  what the method takes beside its inputs, on the CPU or on an accelerator
    """

    name: str
    role: Role
    method: str
    arguments: Mapping[str, Any]
    base: TensorEntry | None
    experts: tuple[TensorEntry, ...]
    models: tuple[int, ...]
    dtype: str
    by_matrix: bool
    passes: int
    flops: int
    workspace_bytes: int
    device_bytes: int = 0
    looks: int = 0
    by_row: bool = False
    looks_at_model: bool = False
    block_buffers: int = BLOCK_BUFFERS
    kept_bytes: int = 0
    beside: tuple[tuple[int, TensorEntry] | None, ...] = ()
    pool: str | None = None
    parts: tuple[Step, ...] = ()
    matrix: int | None = None
    passes_non_finite: bool = False
    scheme: Scheme | None = None
    thin: bool = False

    @property
    def outputs(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """Name, dtype and shape of each tensor that it writes."""
        if self.scheme is None:
            return ((self.name, self.dtype, self.shape),)
        scales = self.scheme.scales
        return ((self.name, self.scheme.codes.dtype, self.shape), (scales.name, scales.dtype, scales.shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape as stored."""
        return self.experts[0].shape

    @cached_property
    def elements(self) -> int:
        """How many elements the tensor has."""
        return self.experts[0].elements

    @property
    def columns(self) -> int:
        """Length of the last dimension."""
        return self.shape[-1] if self.shape else 1

    @property
    def matrices(self) -> int:
        """How many matrices are merged one after another: those of a stack. 1 for steps by element or row."""
        return math.prod(self.shape[:-2]) if self.by_matrix else 1

    @property
    def label(self) -> str:
        """The name, and of a matrix of a stack which one it is: for messages and random keys."""
        return self.name if self.matrix is None else f"{self.name}[{self.matrix}]"

    @property
    def first_element(self) -> int:
        """Where in the tensor it begins: a matrix of a stack, in the flattened stack."""
        return (self.matrix or 0) * self.elements

    @property
    def element_by_element(self) -> bool:
        """Whether what one element holds reaches no other, unless by its row."""
        return not self.by_matrix and self.looks == 0

    @property
    def read_bytes(self) -> int:
        """Bytes read from the inputs, each counted once however many passes there are."""
        if self.thin:
            return sum(e.stored_bytes for e in (*([self.base] if self.base else []), *self.factors))
        return sum(e.stored_bytes for e in self.experts) + (self.base.stored_bytes if self.base else 0)

    @property
    def write_bytes(self) -> int:
        """Bytes of the merged tensor."""
        return sum(math.prod(shape) * DTYPE_BYTES[dtype] for _, dtype, shape in self.outputs)

    @property
    def factors(self) -> tuple[TensorEntry, ...]:
        """Of a thin step, what is read of its experts: each one's A and B."""
        return tuple(part for expert in self.experts if isinstance(expert, DerivedEntry) for part in expert.parts[1:])

    @cached_property
    def element_bytes(self) -> int:
        """Bytes of one element in the widest dtype that the step touches."""
        entries = (*self.experts, self.base) if self.base else self.experts
        return max(DTYPE_BYTES[self.dtype], *(DTYPE_BYTES[e.dtype] for e in entries))

    @property
    def compute_bytes(self) -> int:
        """Bytes of one element in the arithmetic: 4, or 8 where float64 comes in."""
        return 8 if self.element_bytes == 8 else 4


def matrices_of(step: Step) -> Iterator[Step]:
    """Each matrix of a stack as a step of its own, of the same name; any other step as it is."""
    if not step.by_matrix or len(step.shape) == 2:
        yield step
        return
    for number in range(step.matrices):
        yield replace(
            step,
            base=step.base and _matrix_of(step.base, number),
            experts=tuple(_matrix_of(entry, number) for entry in step.experts),
            beside=tuple(found and (found[0], _matrix_of(found[1], number)) for found in step.beside),
            matrix=number,
            flops=step.flops // step.matrices,
        )


def _matrix_of(entry: TensorEntry, number: int) -> TensorEntry:
    shape = entry.shape[-2:]
    return run_of(entry, shape, number * math.prod(shape))


def stacked(parts: Sequence[Step]) -> Step:
    """One step for the matrices of a pool, stacked by rows; a single step stays what it is."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def entry(entries: Sequence[TensorEntry]) -> TensorEntry:
        rows = sum(each.shape[0] for each in entries)
        nbytes = sum(each.nbytes for each in entries)
        return replace(entries[0], shape=(rows, entries[0].shape[1]), nbytes=nbytes)

    bases = [part.base for part in parts if part.base]
    return replace(
        first,
        base=entry(bases) if bases else None,
        experts=tuple(entry(entries) for entries in zip(*(part.experts for part in parts), strict=True)),
        parts=tuple(parts),
    )


def as_stored(step: Step, entry: TensorEntry) -> tuple[Step, ...]:
    """The step or steps that write a tensor as `entry` is stored, if in 8 bits; what is copied keeps its codes."""
    if not isinstance(entry, DequantisedEntry):
        return (step,)
    if step.method != COPY:
        return (replace(step, dtype="F32", scheme=entry.scheme),)
    return tuple(
        replace(step, name=part.name, experts=(part,), dtype=part.dtype)
        for part in (entry.scheme.codes, entry.scheme.scales)
    )
