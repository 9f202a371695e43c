"""Cast to a narrower float: to nearest, or up or down at random so that the mean is kept.

The random bits are Philox4x32-10 (https://doi.org/10.1145/2063384.2063405), counted by the element's
index in its tensor, so a result does not depend on how the tensor was cut or on which device ran.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_DRAWS_PER_COUNT = 8
# elements rounded at a time: the integer temporaries then stay in a CPU's cache; a GPU wants few launches
_CHUNK = 1 << 15
_DEVICE_CHUNK = 1 << 22


def round_to(
    values: Tensor,
    dtype: torch.dtype,
    *,
    rounding: Rounding,
    seed: int,
    name: str,
    first_index: int,
    out: Tensor | None = None,
) -> Tensor:
    """Cast `values` to `dtype`.

    values       [*shape] float32 or float64, contiguous; a run of a tensor's elements
    dtype        a float dtype; "stochastic" acts on bfloat16 and float16, the others are cast plainly
    rounding     "nearest": ties to even. "stochastic": to one of the two neighbours with the
                 probability that makes the mean exact (float16 subnormals: to 2⁻¹⁷ of their spacing)
    seed, name   key of the random bits
    first_index  index in the whole tensor of `values`' first element: the counter
    out          [*shape] `dtype`, contiguous, or None for a new tensor

    Values that `dtype` can hold, infinities and NaN stay what they are. float64 values are first
    rounded to float32, whose spacing is 2⁻¹³ of float16's. Returns `out`.
    """
    out = torch.empty_like(values, dtype=dtype) if out is None else out
    assert values.is_contiguous(), "values must be contiguous"
    assert out.is_contiguous(), "out must be contiguous"
    if rounding == "nearest" or dtype not in (torch.bfloat16, torch.float16):
        return out.copy_(values)
    source, target = values.view(-1), out.view(-1)
    words = key(seed, name)
    size = _CHUNK if values.device.type == "cpu" else _DEVICE_CHUNK
    for start in range(0, source.numel(), size):
        chunk = source[start : start + size].float()
        bits = draws(words, first_index + start, chunk.numel(), values.device)
        up_or_down = _to_bfloat16 if dtype == torch.bfloat16 else _to_float16
        rounded = up_or_down(chunk, bits)
        target[start : start + size] = torch.where(chunk.isfinite(), rounded, chunk.to(dtype))
    return out


def key(seed: int, name: str) -> tuple[int, int]:
    """The generator's two key words for a seed and a tensor's name, the same on every machine."""
    digest = blake2b(name.encode(), digest_size=8, salt=(seed % (1 << 64)).to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def draws(words: tuple[int, int], first_index: int, count: int, device: torch.device | str | None = None) -> Tensor:
    """The 16 random bits of elements first_index … first_index + count - 1: [count] int64 in [0, 2¹⁶).

    Element i takes half i mod 8 of Philox block i // 8, the low half of a word before its high half.
    """
    first_block, skipped = divmod(first_index, _DRAWS_PER_COUNT)
    blocks = -(-(skipped + count) // _DRAWS_PER_COUNT)
    lanes = random_lanes(words, first_block, blocks, device)
    halves = torch.stack((lanes & 0xFFFF, lanes >> 16), dim=2).view(-1)  # [blocks * 8]
    return halves[skipped : skipped + count]


def random_lanes(
    words: tuple[int, int], first_count: int, counts: int, device: torch.device | str | None = None
) -> Tensor:
    """Philox of the counters first_count, first_count + 1, ...: [counts, 4] int64 in [0, 2³²)."""
    counter = torch.arange(first_count, first_count + counts, dtype=torch.int64, device=device)
    return torch.stack(philox(counter, words), dim=1)


def philox(counter: Tensor, words: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of the counters (c mod 2³², c div 2³², 0, 0): four [*shape] int64 words in [0, 2³²)."""
    c0, c1 = counter & _WORD, (counter >> 32).bitwise_and_(_WORD)
    c2, c3, high = torch.zeros_like(c0), torch.zeros_like(c0), torch.empty_like(c0)
    k0, k1 = words
    for _ in range(10):
        # int64 products wrap, which leaves the 64 bits of the unsigned product; in place, since memory is the limit.
        # The low words are cut only when they are multiplied next: until then they are but added bit by bit
        c0 *= _MULTIPLIERS[0]
        c2 *= _MULTIPLIERS[1]
        c1 ^= torch.bitwise_right_shift(c2, 32, out=high)
        c1 ^= k0
        c1 &= _WORD
        c3 ^= torch.bitwise_right_shift(c0, 32, out=high)
        c3 ^= k1
        c3 &= _WORD
        c0, c1, c2, c3 = c1, c2, c3, c0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1.bitwise_and_(_WORD), c2, c3.bitwise_and_(_WORD)


def _to_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    # adding below the kept half and cutting moves the magnitude up with probability (dropped bits) / 2¹⁶
    pattern = values.view(torch.int32)
    return ((pattern + bits.to(torch.int32)) & -0x10000).view(torch.float32).to(torch.bfloat16)


def _to_float16(values: Tensor, bits: Tensor) -> Tensor:
    pattern = values.view(torch.int32).to(torch.int64)
    biased = (pattern >> 23) & 0xFF
    mantissa = (pattern & 0x7FFFFF) | torch.where(biased > 0, 0x800000, 0)
    # below 2⁻¹⁴ (biased exponent 113) float16's spacing stays at 2⁻²⁴; past 42 the chance of rounding up is nil
    dropped = (126 - biased).clamp(13, 42)
    surplus = dropped - 16
    spread = torch.where(surplus > 0, (bits << surplus.clamp(min=0)) + (1 << (surplus - 1).clamp(min=0)), 0)
    spread = torch.where(surplus > 0, spread, bits >> (-surplus).clamp(min=0))
    steps = (mantissa + spread) >> dropped
    spacing = ((biased.clamp(min=113) - 10) << 23).to(torch.int32).view(torch.float32)
    return torch.copysign(steps.to(torch.float32) * spacing, values).to(torch.float16)
