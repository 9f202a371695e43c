"""Where every output byte goes: shards, headers and offsets, final before the first tensor exists."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from streammerge.checkpoint import DTYPE_BYTES, INDEX_NAME, SINGLE_NAME

__all__ = ["INDEX_NAME", "Layout", "Placement", "Shard", "lay_out"]


@dataclass(frozen=True, slots=True)
class Placement:
    """One tensor's bytes in the output: `nbytes` from absolute byte `offset` of shard number `shard`."""

    shard: int
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its header, length field included, and its size in bytes."""

    file: str
    header: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All output files and where each tensor lies in them."""

    shards: tuple[Shard, ...]
    placements: dict[str, Placement]

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    def index_json(self) -> str | None:
        """The text of `model.safetensors.index.json`; None for a single shard, which needs none."""
        if len(self.shards) == 1:
            return None
        weight_map = {name: self.shards[p.shard].file for name, p in sorted(self.placements.items())}
        total = sum(p.nbytes for p in self.placements.values())
        return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]], max_shard_bytes: int) -> Layout:
    """Place tensors (name, dtype code, shape) in shards of at most `max_shard_bytes` of data.

    Shards fill in the given order, as Hugging Face's do; a tensor larger than the limit gets a shard of
    its own. Within a shard wider dtypes come first, so that every tensor is aligned to its element size.
    """
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for tensor in tensors:
        nbytes = _nbytes(tensor)
        if groups[-1] and filled + nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += nbytes
    shards = []
    placements = {}
    for number, group in enumerate(groups):
        group.sort(key=lambda tensor: -DTYPE_BYTES[tensor[1]])
        header = _header(group)
        position = len(header)
        for tensor in group:
            name, dtype, shape = tensor
            placements[name] = Placement(number, position, _nbytes(tensor), dtype, shape)
            position += _nbytes(tensor)
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else SINGLE_NAME
        shards.append(Shard(file, header, position))
    return Layout(tuple(shards), placements)


def _nbytes(tensor: tuple[str, str, tuple[int, ...]]) -> int:
    return math.prod(tensor[2]) * DTYPE_BYTES[tensor[1]]


def _header(tensors: list[tuple[str, str, tuple[int, ...]]]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        name, dtype, shape = tensor
        end = position + _nbytes(tensor)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    # the data begins on a multiple of 8, as the format's own writer has it
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
