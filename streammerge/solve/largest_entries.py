"""Keep a tensor's largest magnitudes, whatever its float dtype, without sorting it."""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge_kernels.magnitude import MagnitudeSelect, trim_

_CHUNK = 1 << 18
_SIGNLESS = (1 << 63) - 1


def keep_largest_(values: Tensor, keep: int) -> Tensor:
    """Set all but the `keep` largest magnitudes of a contiguous float32 or float64 tensor to zero, in place.

    Of equal magnitudes those of the lowest flat index are kept.
    """
    if keep >= values.numel():
        return values
    if values.dtype == torch.float64:
        return _keep_largest_wide(values, keep)
    select = MagnitudeSelect(keep, values.device)
    select.count(values)
    select.narrow()
    select.count(values)
    return trim_(values, select.cut)


def _keep_largest_wide(values: Tensor, keep: int) -> Tensor:
    """By the bits of float64, 16 at a time, as `MagnitudeSelect` does it for float32."""
    patterns = values.view(-1).view(torch.int64)
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(patterns), _CHUNK)]
    prefix, rank = 0, keep
    for shift in (48, 32, 16, 0):
        counts = torch.zeros(1 << 16, dtype=torch.int64, device=values.device)
        for chunk in chunks:
            part = patterns[chunk] & _SIGNLESS
            matching = part[part >> (shift + 16) == prefix] if shift < 48 else part
            counts += torch.bincount((matching >> shift) & 0xFFFF, minlength=1 << 16)
        from_top = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, rank))
        rank -= int(from_top[place - 1]) if place else 0
        prefix = (prefix << 16) | (0xFFFF - place)
    for chunk in chunks:
        part = patterns[chunk] & _SIGNLESS
        equal = part == prefix
        ranks = equal.cumsum(0)
        kept = (part > prefix) | (equal & (ranks <= rank))
        patterns[chunk].mul_(kept)
        rank = max(0, rank - int(ranks[-1]))
    return values
