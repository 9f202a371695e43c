"""Entries whose importance stands out of a tensor's: their scores, and the threshold from the quartiles."""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.solve.panels import row_sums
from streammerge_kernels.magnitude import HIGH_BINS, LOW_BINS, count_magnitudes_, find_bin

# mergekit's: what is added to each probability
_FLOOR = 1e-8
# rows scored at a time hold about this many elements: the float64 temporaries then stay small
_CHUNK, _DEVICE_CHUNK = 1 << 16, 1 << 22


class QuartileLook:
    """Look at the importances: `threshold` is their median + 1.5 (Q_3 - Q_1), 0-d float64 on the device."""

    threshold: Tensor

    def __init__(self, deltas: Deltas, *, compat: str = "none") -> None:
        self._as_mergekit = compat == "mergekit"
        self._elements = 0
        # what is counted: magnitudes of positive ones and, where there may be any, of negative ones; the others as 0
        self._signs = [1, -1] if self._as_mergekit else [1]
        self._counts = [torch.zeros(HIGH_BINS, dtype=torch.int64, device=deltas.device) for _ in self._signs]
        self._below = torch.zeros((), dtype=torch.int64, device=deltas.device)
        self._prefixes: list[Tensor] = []
        self._ranks: list[Tensor] = []

    def look(self, number: int, deltas: Deltas) -> None:
        values = narrow_scores(deltas) if self._as_mergekit else scores(deltas)
        if number == 0:
            self._elements += values.numel()
            self._below += (values < 0.0).sum()
        for place, (sign, counts) in enumerate(zip(self._signs, self._counts, strict=True)):
            side = (values * sign).clamp_(min=0.0) if self._as_mergekit else values
            count_magnitudes_(counts, side, prefix=self._prefixes[place] if number else None)

    def finish(self, number: int) -> None:
        if number == 0:
            below, counts = int(self._below), dict(zip(self._signs, self._counts, strict=True))
            places = [place * (self._elements - 1) // 4 for place in (1, 2, 3)]
            self._signs = [-1 if place < below else 1 for place in places]
            # by rank from the largest magnitude of its side
            ranks = [place + 1 if place < below else self._elements - place for place in places]
            found = [
                find_bin(counts[sign], torch.full_like(self._below, rank))
                for sign, rank in zip(self._signs, ranks, strict=True)
            ]
            self._prefixes, self._ranks = [prefix for prefix, _ in found], [rank for _, rank in found]
            self._counts = [prefix.new_zeros(LOW_BINS) for prefix in self._prefixes]
            return
        lows = [find_bin(counts, rank)[0] for counts, rank in zip(self._counts, self._ranks, strict=True)]
        patterns = torch.stack([p * LOW_BINS + low for p, low in zip(self._prefixes, lows, strict=True)])
        magnitudes = patterns.to(torch.int32).view(torch.float32).double().unbind()
        lower, median, upper = (sign * each for sign, each in zip(self._signs, magnitudes, strict=True))
        self.threshold = median + 1.5 * (upper - lower)


def narrow_scores(deltas: Deltas) -> Tensor:
    """The importances as mergekit computes them, in float32: [rows, columns]. The divergence may be negative."""
    (delta,) = deltas
    columns = deltas.shape[-1] if deltas.shape else 1
    base, change = deltas.base().reshape(-1, columns), delta.dense().reshape(-1, columns)
    found = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    # never one row alone: torch shares a single sum out among its threads
    rows = max((_CHUNK if base.device.type == "cpu" else _DEVICE_CHUNK) // max(columns, 1), 2)
    for first in range(0, len(base), rows):
        before, moved = base[first : first + rows], change[first : first + rows]
        old = torch.softmax(before.float(), 1).add_(_FLOOR)
        new = torch.softmax((before + moved).float(), 1).add_(_FLOOR)
        terms = new * (new / old).log_()
        # nor another number of rows: a GPU's order of additions depends on it
        divergence = torch.nn.functional.pad(terms, (0, 0, 0, rows - len(terms))).sum(1)[: len(terms)]
        found[first : first + rows] = moved.float().abs() * divergence[:, None]
    return found


def scores(deltas: Deltas) -> Tensor:
    """|D| · KL(softmax(W_0 + D) ‖ softmax(W_0)) with the divergence of each row: [rows, columns] float32."""
    (delta,) = deltas
    columns = deltas.shape[-1] if deltas.shape else 1
    base, change = deltas.base().reshape(-1, columns), delta.dense().reshape(-1, columns)
    found = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    rows = max((_CHUNK if base.device.type == "cpu" else _DEVICE_CHUNK) // max(columns, 1), 1)
    for first in range(0, len(base), rows):
        part = slice(first, first + rows)
        before, moved = base[part].double(), change[part].double()
        old = torch.softmax(before, 1).add_(_FLOOR)
        new = torch.softmax(before + moved, 1).add_(_FLOOR)
        divergence = row_sums(new, new.log() - old.log()).clamp_(min=0.0)
        found[part] = moved.abs() * divergence[:, None]
    return found
