"""The exact k-th largest magnitude of any number of tensors, by two histograms of float32's bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streammerge_kernels.choice import twin

# a magnitude has 31 bits: the first pass counts by the high 15, the second by the low 16 of one of those
HIGH_BINS = 1 << 15
LOW_BINS = 1 << 16
# elements counted at a time: the integer temporaries then stay in a CPU's cache; a GPU wants few launches
_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 25


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the k largest magnitudes end.

    pattern  0-d int32  the bits of the k-th largest magnitude; those above it are kept
    ties     0-d int64  how many of the entries equal to it are kept too, in the order they are shown:
             `trim_` counts it down
    """

    pattern: Tensor
    ties: Tensor

    @property
    def magnitude(self) -> Tensor:
        """The k-th largest magnitude, 0-d float32."""
        return self.pattern.view(torch.float32)


class MagnitudeSelect:
    """Find where the `keep` largest magnitudes end, of blocks and tensors that are shown twice.

    `count` every block, in any order; `narrow`; `count` every block again; then `cut` is known.
    Nothing waits for the device. `keep` beyond the number of entries keeps all, 0 none.
    """

    def __init__(self, keep: int, device: torch.device | str = "cpu") -> None:
        assert keep >= 0, f"keep is {keep}"
        self._rank = torch.full((), keep, dtype=torch.int64, device=device)
        self._counts = torch.zeros(HIGH_BINS, dtype=torch.int64, device=device)
        self._prefix: Tensor | None = None

    def count(self, values: Tensor) -> None:
        """Count one block, [*shape] float32."""
        count_magnitudes_(self._counts, values, prefix=self._prefix)

    def narrow(self) -> None:
        """End the first pass."""
        assert self._prefix is None, "narrowed already"
        self._prefix, self._rank = find_bin(self._counts, self._rank)
        self._counts = torch.zeros(LOW_BINS, dtype=torch.int64, device=self._counts.device)

    @property
    def cut(self) -> Cut:
        """The result of both passes; each call gives its own `ties` to count down."""
        assert self._prefix is not None, "only one pass was made"
        low, ties = find_bin(self._counts, self._rank)
        return Cut(pattern=(self._prefix * LOW_BINS + low).to(torch.int32), ties=ties)


def count_magnitudes_(counts: Tensor, values: Tensor, *, prefix: Tensor | None = None) -> Tensor:
    """Add the histogram of the bits of |values| to `counts`.

    counts  [2¹⁵] int64, by the high 15 of 31 bits; with a prefix [2¹⁶] int64, by the low 16 bits of those
            values whose high bits it is
    values  [*shape] float32; copied where not contiguous
    prefix  0-d int64 in [0, 2¹⁵), on the device

    Bits grow with magnitudes; NaN counts as larger than infinity. Returns `counts`.
    """
    bins = HIGH_BINS if prefix is None else LOW_BINS
    assert counts.shape == (bins,), f"counts is {tuple(counts.shape)}, not ({bins},)"
    assert counts.dtype is torch.int64, f"counts is {counts.dtype}"
    assert values.dtype is torch.float32, f"values is {values.dtype}"
    if (faster := twin("magnitude", values, values.numel())) is not None:
        result: Tensor = faster.count_magnitudes_(counts, values, prefix=prefix)
        return result
    flat = values.contiguous().view(-1).view(torch.int32)
    on_cpu = values.device.type == "cpu"
    size = _CHUNK if on_cpu else _DEVICE_CHUNK
    for first in range(0, flat.numel(), size):
        pattern = flat[first : first + size] & 0x7FFFFFFF
        high = pattern >> 16
        if on_cpu:
            found = high if prefix is None else _picked(pattern, high, int(prefix)) & 0xFFFF
            counts += torch.bincount(found, minlength=bins)
        elif prefix is None:
            counts.scatter_add_(0, high.long(), torch.ones_like(high, dtype=torch.int64))
        else:
            # picking the matching ones would wait for their number
            counts.scatter_add_(0, (pattern & 0xFFFF).long(), (high == prefix).long())
    return counts


def _picked(values: Tensor, keys: Tensor, key: int) -> Tensor:
    # torch takes six times as long to pick by a mask
    return torch.from_numpy(values.numpy()[keys.numpy() == key])


def find_bin(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """The bin of the rank-th largest entry, and its rank among the entries of that bin: two 0-d int64.

    counts  [n] int64, the larger entries in the later bins
    rank    0-d int64; 0 is the last bin's 0-th, one beyond all entries a rank beyond those of bin 0
    """
    from_top = counts.flip(0).cumsum(0)
    position = torch.searchsorted(from_top, rank.view(1)).clamp_(max=counts.numel() - 1)
    before = torch.where(position > 0, from_top.gather(0, (position - 1).clamp_(min=0)), 0)
    return (counts.numel() - 1 - position).view(()), rank - before.view(())


def trim_(values: Tensor, cut: Cut) -> Tensor:
    """Set the entries that are not among the largest to zero, in place.

    values  [*shape] float32, contiguous; blocks come in the tensor's order, tensors in one fixed order

    Of the entries equal to the cut the first `cut.ties` are kept, and counted down there: those of the
    lowest index. NaN is kept. Returns `values`.
    """
    assert values.dtype is torch.float32, f"values is {values.dtype}"
    assert values.is_contiguous(), "values must be contiguous"
    if (faster := twin("magnitude", values, values.numel())) is not None:
        result: Tensor = faster.trim_(values, cut)
        return result
    bits = values.view(-1).view(torch.int32)
    size = _CHUNK if bits.is_cpu else _DEVICE_CHUNK
    for first in range(0, bits.numel(), size):
        part = bits[first : first + size]
        kept = _kept_on_cpu(part, cut) if bits.is_cpu else _kept(part, cut)
        # a mask of all bits: many times faster on CPUs than filling by a mask of entries
        part.bitwise_and_(kept.neg_())
    return values


def _kept(bits: Tensor, cut: Cut) -> Tensor:
    """Which entries a run keeps, 1 or 0: [n] int32. Nothing waits for the device."""
    pattern = bits & 0x7FFFFFFF
    equal = pattern == cut.pattern
    ranks = equal.cumsum(0)
    kept = (pattern > cut.pattern) | (equal & (ranks <= cut.ties))
    cut.ties.sub_(ranks[-1]).clamp_(min=0)
    return kept.to(torch.int32)


def _kept_on_cpu(bits: Tensor, cut: Cut) -> Tensor:
    """The same, by comparisons that are not into booleans, which are many times slower."""
    pattern = bits & 0x7FFFFFFF
    kept = torch.empty_like(pattern)
    # a run has fewer entries than int32 counts
    equals, ties = int(torch.eq(pattern, cut.pattern, out=kept).sum(dtype=torch.int32)), int(cut.ties)
    torch.ge(pattern, cut.pattern, out=kept)
    if equals > ties:
        kept.numpy()[np.flatnonzero(pattern.numpy() == cut.pattern.item())[ties:]] = 0
    cut.ties.sub_(equals).clamp_(min=0)
    return kept
