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

    def __init__(self, deltas: Deltas, **arguments: object) -> None:
        self._elements = 0
        self._counts = [torch.zeros(HIGH_BINS, dtype=torch.int64, device=deltas.device)]
        self._prefixes: list[Tensor] = []
        self._ranks: list[Tensor] = []

    def look(self, number: int, deltas: Deltas) -> None:
        values = scores(deltas)
        self._elements += values.numel() if number == 0 else 0
        for place, counts in enumerate(self._counts):
            count_magnitudes_(counts, values, prefix=self._prefixes[place] if number else None)

    def finish(self, number: int) -> None:
        if number == 0:
            (counts,) = self._counts
            # ranks from the largest, of what is at ⌊q (n - 1)⌋ from the smallest
            last = self._elements - 1
            ranks = [torch.full_like(counts[0], self._elements - place * last // 4) for place in (1, 2, 3)]
            found = [find_bin(counts, rank) for rank in ranks]
            self._prefixes, self._ranks = [prefix for prefix, _ in found], [rank for _, rank in found]
            self._counts = [counts.new_zeros(LOW_BINS) for _ in found]
            return
        lows = [find_bin(counts, rank)[0] for counts, rank in zip(self._counts, self._ranks, strict=True)]
        patterns = torch.stack([p * LOW_BINS + low for p, low in zip(self._prefixes, lows, strict=True)])
        lower, median, upper = patterns.to(torch.int32).view(torch.float32).double().unbind()
        self.threshold = median + 1.5 * (upper - lower)


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
