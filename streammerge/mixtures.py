"""The experts of a mixture as another model stores them: all of a layer in one tensor, or a matrix each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from streammerge.checkpoint import DTYPE_BYTES, Checkpoint, TensorEntry
from streammerge.derived import DerivedEntry, ReadPart, run_of
from streammerge.rules import TensorClass, role_by_name

if TYPE_CHECKING:
    from torch import Tensor

# how the hub names a layer's mixture, and the matrices that lie side by side, by rows, in each tensor of transformers 5
_STACKED = "mlp"
_APART: tuple[tuple[str, Mapping[str, tuple[str, ...]]], ...] = (
    ("mlp", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}),
    ("block_sparse_moe", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}),
)
_STACK_NAME = re.compile(rf"(?P<place>(?:.*\.)?){_STACKED}\.experts\.(?P<stack>gate_up_proj|down_proj)")
# no more digits than a model could count to
_MATRIX_NAME = re.compile(
    r"(?P<place>(?:.*\.)?)(?P<module>mlp|block_sparse_moe)\.experts\.(?P<number>0|[1-9]\d{0,8})\.(?P<part>\w+)\.weight"
)
_ROUTER_NAME = re.compile(r"(?P<place>(?:.*\.)?)(?P<module>mlp|block_sparse_moe)\.gate\.weight")


def in_layout_of(reference: Checkpoint, model: Checkpoint) -> Checkpoint:
    """The model with its experts, and Mixtral's router, under the names and in the shapes of the reference's.

    Reads nothing. A tensor that does not fit, of another number of experts or dtypes that differ, stays as it is.
    """
    found: dict[str, TensorEntry] = {}
    taken: Counter[str] = Counter()
    for name, entry in reference.tensors.items():
        if name in model.tensors:
            continue
        made, sources = _stack(name, entry, model) or _matrix(name, model) or _router(name, model) or (None, ())
        if made is not None:
            found[name] = made
            taken.update({source: made.elements // len(sources) for source in sources})
    # what is left of one, such as more experts than the reference has, must not go unseen
    kept = {name: entry for name, entry in model.tensors.items() if name not in taken or taken[name] != entry.elements}
    return replace(model, tensors=kept | found) if found else model


@dataclass(frozen=True, slots=True)
class _Joined:
    """Its parts, alike in shape and dtype, one after another."""

    def scratch_bytes(self, entry: DerivedEntry, elements: int) -> int:
        inner = (part.scratch_bytes(elements) for part in entry.parts if isinstance(part, DerivedEntry))
        return elements * DTYPE_BYTES[entry.dtype] + max(inner, default=0)

    def fill(self, entry: DerivedEntry, out: Tensor, first_element: int, read: ReadPart) -> None:
        size = entry.parts[0].elements
        filled = 0
        while filled < out.numel():
            number, first = divmod(first_element + filled, size)
            count = min(size - first, out.numel() - filled)
            out[filled : filled + count] = read(entry.parts[number], first, count)
            filled += count


def _stack(name: str, entry: TensorEntry, model: Checkpoint) -> tuple[TensorEntry, tuple[str, ...]] | None:
    """A stack of what the model stores apart, and the tensors that it takes."""
    named = _STACK_NAME.fullmatch(name)
    if named is None or len(entry.shape) != 3 or not _is_out_in(name, entry, model):
        return None
    for module, stacks in _APART:
        parts = stacks[named["stack"]]
        names = tuple(
            f"{named['place']}{module}.experts.{number}.{part}.weight"
            for number in range(entry.shape[0])
            for part in parts
        )
        entries = [model.tensors[each] for each in names if each in model.tensors]
        kinds = {(each.shape, each.dtype) for each in entries}
        if len(entries) != len(names) or len(kinds) != 1 or len(entries[0].shape) != 2 or not entries[0].elements:
            continue
        rows, columns = entries[0].shape
        first = entries[0]
        return DerivedEntry(
            name=name, dtype=first.dtype, shape=(entry.shape[0], len(parts) * rows, columns),
            file=first.file, offset=first.offset, nbytes=sum(each.nbytes for each in entries),
            location=first.location, parts=tuple(entries), derivation=_Joined(),
        ), names  # fmt: skip
    return None


def _matrix(name: str, model: Checkpoint) -> tuple[TensorEntry, tuple[str, ...]] | None:
    """One matrix of what the model stores as a stack, and the stack that it is a part of."""
    named = _MATRIX_NAME.fullmatch(name)
    if named is None:
        return None
    for stack, parts in dict(_APART)[named["module"]].items():
        source = f"{named['place']}{_STACKED}.experts.{stack}"
        entry = model.tensors.get(source)
        if named["part"] not in parts or entry is None or len(entry.shape) != 3:
            continue
        number, (experts, rows, columns) = int(named["number"]), entry.shape
        if number >= experts or rows % len(parts) or not entry.elements or not _is_out_in(source, entry, model):
            continue
        shape = rows // len(parts), columns
        first = (number * len(parts) + parts.index(named["part"])) * shape[0] * columns
        return replace(run_of(entry, shape, first), name=name), (source,)
    return None


def _router(name: str, model: Checkpoint) -> tuple[TensorEntry, tuple[str, ...]] | None:
    named = _ROUTER_NAME.fullmatch(name)
    for module, _ in _APART if named else ():
        assert named is not None, "the loop is over a match"
        source = f"{named['place']}{module}.gate.weight"
        if source in model.tensors:
            return replace(model.tensors[source], name=name), (source,)
    return None


def _is_out_in(name: str, entry: TensorEntry, model: Checkpoint) -> bool:
    role = role_by_name(name, entry.shape, entry.dtype, model.config)
    return role is not None and role.kind is TensorClass.STACK and not role.transposed
