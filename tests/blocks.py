"""Merge a tensor, or a model, block by block as the engine does: every look over all blocks, then the method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from streammerge import methods
from streammerge.delta import Delta, TensorDeltas
from streammerge.methods import Look, Method

Rule = str | Method | Callable[..., Tensor]


def described(rule: Rule) -> Method:
    """A method's declaration: of its name in the table, or of its function, which need not be in the table."""
    if isinstance(rule, Method):
        return rule
    return methods.describe(rule) if isinstance(rule, str) else methods._describe(rule.__name__, rule.__module__)


def merged_by_blocks(
    rule: Rule,
    /,
    base: Tensor | None,
    experts: Sequence[Tensor],
    block_elements: int,
    *,
    name: str = "tensor",
    seed: int = 0,
    beside: Sequence[Tensor | None] | None = None,
    backwards: bool = False,
    **arguments: Any,
) -> Tensor:
    """The merged delta, [*shape], of a tensor cut into blocks of `block_elements`.

    rule       its name, `Method` or function
    beside     what each expert has beside it: the tensor's shape, cut like it; for a matrix method as given
    backwards  merge the last block first: what was seen must not depend on the order of merging

    Blocks are 1-D runs, for a row method as many whole rows as fit (at least one), for a matrix method the whole.
    `arguments` are keyword arguments of the method's function; what is left out has its default.
    """
    return model_merged_by_blocks(
        rule,
        None if base is None else {name: base},
        [{name: expert} for expert in experts],
        block_elements,
        seed=seed,
        beside=None if beside is None else {name: beside},
        backwards=backwards,
        **arguments,
    )[name]


def model_merged_by_blocks(
    rule: Rule,
    /,
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Tensor]],
    block_elements: int,
    *,
    seed: int = 0,
    beside: Mapping[str, Sequence[Tensor | None]] | None = None,
    backwards: bool = False,
    **arguments: Any,
) -> dict[str, Tensor]:
    """The merged delta of each tensor of a model: like `merged_by_blocks`, with looks of the scope that is priced."""
    method = described(rule)

    def blocks(name: str) -> list[BlockDeltas]:
        cut = _cut(
            method, None if base is None else base[name], [e[name] for e in experts], block_elements,
            name=name, seed=seed, beside=beside and beside.get(name),
        )  # fmt: skip
        return list(cut)

    names = list(experts[0])
    price = {name: method.cost(*_priced(blocks(name)[0], method, arguments)) for name in names}
    of_model = any(cost.look_scope == "model" and cost.looks for cost in price.values())
    seen = {}
    for together in [names] if of_model else [[name] for name in names]:
        look = _looked(method, [blocks(name) for name in together], price[together[0]].looks, arguments)
        seen |= dict.fromkeys(together, look)
    merged = {}
    for name in reversed(names) if backwards else names:
        whole = torch.full_like(experts[0][name], torch.nan, dtype=blocks(name)[0].dtype).view(-1)
        for deltas in reversed(blocks(name)) if backwards else blocks(name):
            deltas.seen = seen[name]
            part = method.load()(deltas, **arguments)
            assert part.shape == deltas.shape, f"{method.name} returned {tuple(part.shape)} for {deltas.shape}"
            assert part.dtype == deltas.dtype, f"{method.name} returned {part.dtype} for {deltas.dtype}"
            whole[deltas.first_element : deltas.first_element + part.numel()] = part.reshape(-1)
        merged[name] = whole.view(experts[0][name].shape)
    return {name: merged[name] for name in names}


class BlockDeltas(TensorDeltas):
    """A block of tensors in memory: its buffers are poisoned, its deltas lie in one buffer as the engine's do."""

    _one: Tensor | None = None

    def __iter__(self) -> Iterator[Delta]:
        for delta in super().__iter__():
            yield _BlockDelta(self, delta)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        buffer = super().empty(*shape, dtype=dtype)
        return buffer.fill_(torch.nan if buffer.dtype.is_floating_point else 0)

    def buffer(self) -> Tensor:
        if self._one is None:
            self._one = self.empty(*self.shape)
        return self._one


class _BlockDelta(Delta):
    def __init__(self, deltas: BlockDeltas, inner: Delta) -> None:
        self.index, self.first_element = inner.index, deltas.first_element
        self._deltas, self._inner = deltas, inner

    def dense(self, out: Tensor | None = None) -> Tensor:
        return self._inner.dense(self._deltas.buffer() if out is None else out)


def _cut(
    method: Method,
    base: Tensor | None,
    experts: Sequence[Tensor],
    block_elements: int,
    *,
    name: str,
    seed: int,
    beside: Sequence[Tensor | None] | None,
) -> Iterator[BlockDeltas]:
    whole = experts[0].shape
    columns = whole[-1] if whole else 1
    by_matrix, by_row = method.streams_by == "matrix", method.streams_by == "row"
    size = max(block_elements // columns, 1) * columns if by_row else block_elements
    size = experts[0].numel() if by_matrix else max(size, 1)

    def run(tensor: Tensor, first: int) -> Tensor:
        part = tensor.reshape(-1)[first : first + size]
        return part.view(-1, columns) if by_row else part.view(whole) if by_matrix else part

    for first in range(0, experts[0].numel(), size):
        deltas = BlockDeltas(
            None if base is None else run(base, first),
            [run(expert, first) for expert in experts],
            name=name,
            seed=seed,
            beside=beside and [b if b is None or by_matrix else run(b, first) for b in beside],
        )
        deltas.whole, deltas.first_element = tuple(whole), first
        yield deltas


def _priced(
    deltas: BlockDeltas, method: Method, arguments: Mapping[str, Any]
) -> tuple[tuple[int, int], int, Mapping[str, Any], int]:
    elements = math.prod(deltas.whole)
    columns = elements if method.streams_by == "element" or not deltas.whole else deltas.whole[-1]
    return (elements // columns, columns), deltas.experts, arguments, deltas.dtype.itemsize


def _looked(
    method: Method, tensors: Sequence[Sequence[BlockDeltas]], passes: int, arguments: Mapping[str, Any]
) -> Look | None:
    if method.look_path is None or not passes:
        return None
    look = method.look(tensors[0][0], arguments)
    for number in range(passes):
        for deltas in (deltas for blocks in tensors for deltas in blocks):
            look.look(number, deltas)
        look.finish(number)
    return look
