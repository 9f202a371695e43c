"""Where tensors stand in a picture: rows are layers, columns kinds, told by the tensors' names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from streammerge.rules import split_at_layer

MOST_ROWS, MOST_COLUMNS = 100, 12
_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")
_ENDING = re.compile(r"\.weight$")
OTHERS = "others"
# what a token's state passes in a layer, in this order
_WAY = tuple(
    re.compile(rf"(?:^|\.)(?:{step})$")
    for step in (
        r"q_proj|q|query|q_lin|q_a_proj|query_key_value|qkv_proj|c_attn|in_proj_weight", r"q_b_proj",
        r"k_proj|k|key|k_lin|kv_a_proj_with_mqa", r"v_proj|v|value|v_lin|kv_b_proj",
        r"o_proj|o|out_proj|out_lin|(?:attn|attention|attention\.output)\.(?:dense|c_proj)", r"gate|router",
        r"gate_proj|w1|wi|wi_0|fc1|lin1|c_fc|dense_h_to_4h|gate_up_proj", r"up_proj|w3|wi_1",
        r"down_proj|w2|wo|fc2|lin2|c_proj|dense_4h_to_h",
    )
)  # fmt: skip


class Named(Protocol):
    """Anything that belongs to a tensor."""

    @property
    def name(self) -> str: ...


Tensor = TypeVar("Tensor", bound=Named)


@dataclass(frozen=True, slots=True)
class Cell:
    """A value, the tensor that has it, and how many tensors the cell stands for."""

    value: float
    name: str
    count: int


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells by row and column; `rows` and `columns` are their labels, `outside` the cells of no layer.

    A cell of several tensors shows the largest value.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[int, int], Cell]
    outside: dict[str, Cell]

    @property
    def values(self) -> list[float]:
        """Every cell's value."""
        return [cell.value for cell in (*self.cells.values(), *self.outside.values())]


def kind_of(name: str) -> tuple[int | None, str]:
    """A tensor's layer, None outside of the layers, and its kind: its name without numbers and `.weight`."""
    before, layer, after = split_at_layer(name)
    return layer, _ENDING.sub("", _INDEX.sub("*", f"{before}*.{after}" if layer is not None else after))


def gridded(tensors: Iterable[Tensor], value: Callable[[Tensor], float | None]) -> Grid:
    """The grid of those tensors that have a value.

    More layers than 100 share rows, evenly; of more kinds than 12 the rarest share a column.
    """
    found: dict[tuple[int, str], list[tuple[float, str]]] = {}
    outside: dict[str, list[tuple[float, str]]] = {}
    for tensor in tensors:
        known = value(tensor)
        if known is None:
            continue
        layer, kind = kind_of(tensor.name)
        if layer is None:
            outside.setdefault(kind, []).append((known, tensor.name))
        else:
            found.setdefault((layer, kind), []).append((known, tensor.name))
    kinds = _fewer(sorted(dict.fromkeys(kind for _, kind in found), key=_way), Counter(kind for _, kind in found))
    apart = _fewer(list(outside), Counter({kind: len(values) for kind, values in outside.items()}))
    layers = sorted({layer for layer, _ in found})
    together = -(-len(layers) // MOST_ROWS) or 1
    rows = [layers[first : first + together] for first in range(0, len(layers), together)]
    place = {layer: number for number, row in enumerate(rows) for layer in row}
    column = {kind: number for number, kind in enumerate(kinds)}
    gathered: dict[tuple[int, int], list[tuple[float, str]]] = {}
    for (layer, kind), values in found.items():
        gathered.setdefault((place[layer], column.get(kind, len(kinds) - 1)), []).extend(values)
    for kind in [kind for kind in outside if kind not in apart]:
        outside.setdefault(OTHERS, []).extend(outside.pop(kind))
    return Grid(
        rows=tuple(str(row[0]) if len(row) == 1 else f"{row[0]}–{row[-1]}" for row in rows),
        columns=tuple(labels(kinds)),
        cells={key: _cell(values) for key, values in gathered.items()},
        outside={kind: _cell(values) for kind, values in outside.items()},
    )


def labels(kinds: Sequence[str]) -> list[str]:
    """The shortest endings that tell kinds apart: `q_proj`, but `encoder.wo` where a decoder has one too."""
    parts = [kind.split(".") for kind in kinds]
    told = []
    for own in parts:
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        told.append(".".join(own[-length:]))
    return told


def _way(kind: str) -> int:
    """Where on the way through a layer a kind stands; those that no pattern knows come last, as they came."""
    return next((number for number, step in enumerate(_WAY) if step.search(kind)), len(_WAY))


def _fewer(kinds: list[str], counts: Counter[str]) -> list[str]:
    if len(kinds) <= MOST_COLUMNS:
        return kinds
    kept = {kind for kind, _ in counts.most_common(MOST_COLUMNS - 1)}
    return [*(kind for kind in kinds if kind in kept), OTHERS]


def _cell(values: list[tuple[float, str]]) -> Cell:
    largest, name = max(values)
    return Cell(largest, name, len(values))
