"""Device functions on bit patterns: rounding to narrower floats, and the random words that round.py defines."""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def words(tensor: Tensor) -> Tensor:
    """`tensor` as kernels take it: bfloat16 as a view of its bits in int16, other dtypes as they are.

    The interpreter computes on bfloat16's bits as if they were numbers, and its casts to and from
    float32 are wrong too: one loses subnormals, the other cuts instead of rounding.
    """
    return tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor


def signed(words: tuple[int, int]) -> tuple[int, int]:
    """Two words in [0, 2³²) as int32 of the same bits, which is how kernels take a key."""
    low, high = (word - (1 << 32) if word >> 31 else word for word in words)
    return low, high


@triton.jit
def to_bfloat16_bits(values):
    """Round float32 to the nearest bfloat16, ties to even: its bits as int16. NaN stays NaN."""
    pattern = values.to(tl.uint32, bitcast=True)
    nearest = (pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16
    bits = tl.where((pattern & 0x7FFFFFFF) > 0x7F800000, (pattern >> 16) | 0x40, nearest)
    return bits.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def from_bfloat16_bits(bits):
    """The float32 value of int16 bits of a bfloat16."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def widened(loaded):
    """What was loaded of `words(tensor)`, as float32; float64 as it is."""
    if loaded.dtype == tl.int16:
        value = from_bfloat16_bits(loaded)
    elif loaded.dtype == tl.float64:
        value = loaded
    else:
        value = loaded.to(tl.float32)
    return value


@triton.jit
def up_or_down_to_bfloat16_bits(values, draws):
    """Round float32 stochastically to bfloat16 as round.py does: bits as int16. `draws` int32 in [0, 2¹⁶)."""
    pattern = values.to(tl.uint32, bitcast=True)
    moved = ((pattern + draws.to(tl.uint32)) >> 16).to(tl.uint16).to(tl.int16, bitcast=True)
    return tl.where((pattern & 0x7FFFFFFF) < 0x7F800000, moved, to_bfloat16_bits(values))


@triton.jit
def up_or_down_to_float16(values, draws):
    """Round float32 stochastically to float16 as round.py does. `draws` int32 in [0, 2¹⁶)."""
    pattern = values.to(tl.int32, bitcast=True)
    biased = (pattern >> 23) & 0xFF
    mantissa = ((pattern & 0x7FFFFF) | tl.where(biased > 0, 0x800000, 0)).to(tl.int64)
    # below 2⁻¹⁴ (biased exponent 113) float16's spacing stays at 2⁻²⁴; past 42 the chance of rounding up is nil
    dropped = tl.minimum(tl.maximum(126 - biased, 13), 42)
    surplus = dropped - 16
    widened = draws.to(tl.int64) << tl.maximum(surplus, 0).to(tl.int64)
    half = tl.full(surplus.shape, 1, tl.int64) << tl.maximum(surplus - 1, 0).to(tl.int64)
    narrowed = (draws >> tl.maximum(-surplus, 0)).to(tl.int64)
    spread = tl.where(surplus > 0, widened + half, narrowed)
    steps = ((mantissa + spread) >> dropped.to(tl.int64)).to(tl.int32)
    spacing = ((tl.maximum(biased, 113) - 10) << 23).to(tl.float32, bitcast=True)
    magnitude = (steps.to(tl.float32) * spacing).to(tl.int32, bitcast=True)
    # the sign by its bit: Triton's -x is 0 - x, which makes +0 of +0
    moved = (magnitude | (pattern & -0x80000000)).to(tl.float32, bitcast=True)
    return tl.where(biased < 255, moved, values).to(tl.float16)


@triton.jit
def random_words(first_count, key_low, key_high, COUNTS: tl.constexpr):
    """Philox4x32-10 of the counters first_count, first_count + 1, ...: [COUNTS, 4] uint32, the words of round.philox.

    The key's words come as int32 bits, so that a kernel is compiled once for all keys.
    """
    counter = first_count + tl.arange(0, COUNTS).to(tl.int64)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros([COUNTS], tl.uint32)
    k0, k1 = zero + key_low.to(tl.uint32), zero + key_high.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(low, high, zero, zero, k0, k1)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [COUNTS, 4])


@triton.jit
def random_halves(first_count, key_low, key_high, ELEMENTS: tl.constexpr):
    """The 16-bit draws of elements 8·first_count, ...: [ELEMENTS] int32 in [0, 2¹⁶), as round.draws defines."""
    words = random_words(first_count, key_low, key_high, ELEMENTS // 8)
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [ELEMENTS]).to(tl.int32)
