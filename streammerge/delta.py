"""What a method sees of the experts: a stream of W_t - W_0, one expert at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from streammerge.workspace import Workspace
from streammerge_kernels.delta_pack import Packed

Found = TypeVar("Found")

PerExpert = float | Sequence[float]
"""A method parameter that a recipe may set for each expert."""

MethodName = str
"""A method parameter that names the method it wraps."""

Settings = Mapping[str, Any] | None
"""A method parameter that holds the parameters of the method it wraps."""


class Delta(ABC):
    """One expert's change of one tensor, W_t - W_0, or of a piece of it, formed where it is used.

    index          the expert's number
    first_element  where in the flattened whole tensor it begins
    """

    index: int
    first_element: int = 0

    @abstractmethod
    def dense(self, out: Tensor | None = None) -> Tensor:
        """The change, [*shape] in the stream's dtype.

        Without `out` the result lies in a buffer that the stream owns and overwrites when the next
        expert's change is formed; it may be changed in place. With `out` ([*shape], that dtype) it is
        written there. Asking again reads the expert again.
        """


class Deltas(ABC):
    """The experts' changes of one tensor, in the recipe's order. Iterating again reads them again.

    name       the tensor's name, for messages and random keys
    shape      [out, in] for a method that streams by matrix; else the block's own shape
    dtype      the dtype of the arithmetic: float32, or float64 for float64 checkpoints
    device     where the tensors are
    experts    how many experts there are
    based      whether W_0 is a base model's; without one it is the first expert's
    facts      what the method notes for the report
    whole      shape of the whole tensor, of which this may be a block
    first_element  where in the flattened whole tensor this block begins
    seed       the recipe's, for random keys
    held       whether what is read is kept from a look to the merge, so that a look may keep something, too
    seen       what the method's look at the whole tensor found, where it asks for one
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    experts: int
    facts: dict[str, float | int | str | bool]
    whole: tuple[int, ...]
    based: bool = True
    first_element: int = 0
    seed: int = 0
    held: bool = False
    seen: Any = None

    @abstractmethod
    def __iter__(self) -> Iterator[Delta]:
        """Each expert's change, one in memory at a time."""

    @abstractmethod
    def base(self) -> Tensor:
        """W_0, [*shape] in `dtype`: the base model's tensor or, without one, the first expert's."""

    @abstractmethod
    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised buffer from the step's workspace, valid until the step ends."""

    def packed(self) -> Packed | None:
        """All changes in the matrix kernels' working format, or None where that is no gain: on the CPU, in float64."""
        return None

    def beside(self, index: int) -> Tensor | None:
        """What the recipe gives beside expert `index` for this tensor: a covariance, a diagonal. None without."""
        return None

    def recall(self, key: Hashable) -> Any | None:
        """What another merge of these experts kept under `key`; nothing of them is read then. None without."""
        return None

    def keep(self, key: Hashable, nbytes: int, make: Callable[[Callable[[Tensor], Tensor]], Any]) -> bool:
        """Keep for other merges of these experts what `make` makes; whether there are any, and room.

        nbytes  what its tensors take
        make    is given a function that copies a tensor to where it stays
        """
        return False

    def each(self, work: Callable[[Delta, Tensor], Found]) -> tuple[list[Tensor], list[list[Found]]]:
        """Form every expert's change and let `work` see it, and change it in place, piece by piece.

        Pieces are whole rows, where the block has rows, and begin at multiples of PANEL_ELEMENTS where it has none.
        A stream on a CPU may work on several at a time: `work` writes to its piece only.

        Returns the changes, each [*shape] in a buffer of the step's workspace, and for each expert what `work` found.
        """
        changes = [self.empty(*self.shape) for _ in range(self.experts)]
        return changes, [[work(delta, delta.dense(out=changes[delta.index]))] for delta in self]

    def weighted_sum(self, weights: Sequence[float]) -> Tensor:
        """Σ w_t (W_t - W_0), [*shape], in a buffer of the step's workspace."""
        merged = self.zeros(*self.shape)
        for weight, delta in zip(weights, self, strict=True):
            merged.add_(delta.dense(), alpha=weight)
        return merged

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A zeroed buffer from the step's workspace, valid until the step ends."""
        return self.empty(*shape, dtype=dtype).zero_()

    def per_expert(self, value: PerExpert) -> list[float]:
        """A parameter's value for each expert; a single number counts for all."""
        if isinstance(value, (int, float)):
            return [float(value)] * self.experts
        assert len(value) == self.experts, f"{len(value)} values for {self.experts} experts"
        return [float(v) for v in value]

    def note(self, **facts: float | int | str | bool) -> None:
        """Put facts about this tensor into the report: solver, certificate, kept rank, …"""
        self.facts.update(facts)


class TensorDelta(Delta):
    """The change between two tensors in memory."""

    def __init__(self, index: int, expert: Tensor, base: Tensor) -> None:
        self.index = index
        self._expert, self._base = expert, base

    def dense(self, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(self._base) if out is None else out
        return out.copy_(self._expert).sub_(self._base)


class TensorDeltas(Deltas):
    """Deltas of tensors that are in memory: for notebooks, tests and references.

    base       [*shape], any float dtype; None means the first expert, as for a merge without a base
    experts    each [*shape], any float dtype
    workspace  where methods take their buffers, as in a streamed merge; the allocator when None
    beside     what each expert has beside it, see `Deltas.beside`
    """

    def __init__(
        self,
        base: Tensor | None,
        experts: Sequence[Tensor],
        *,
        name: str = "tensor",
        workspace: Workspace | None = None,
        seed: int = 0,
        beside: Sequence[Tensor | None] | None = None,
    ) -> None:
        assert experts, "no experts"
        origin = experts[0] if base is None else base
        self._experts = list(experts)
        self.name = name
        self.shape = self.whole = tuple(origin.shape)
        self.based, self.seed = base is not None, seed
        self._beside = beside
        wide = any(t.dtype == torch.float64 for t in (origin, *experts))
        self.dtype = torch.float64 if wide else torch.float32
        self.device = origin.device
        self._base = origin.to(self.dtype)
        self._workspace = workspace
        self.experts = len(experts)
        self.facts = {}

    def __iter__(self) -> Iterator[Delta]:
        for index, expert in enumerate(self._experts):
            yield TensorDelta(index, expert, self._base)

    def base(self) -> Tensor:
        return self._base

    def beside(self, index: int) -> Tensor | None:
        return self._beside[index] if self._beside else None

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if self._workspace is not None:
            return self._workspace.empty(shape, dtype or self.dtype)
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
