"""Add a product of float16 matrices, or its lower triangle, to a float32 one: the kernel of Gram and moment."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How a product is cut: into tiles of `rows` × `columns`, their sums into blocks of `inner` terms.

    promote       blocks summed in the tensor cores before their sum is added to a float32 one outside: the
                  cores may cut where an addition rounds, which makes long sums too small
    in_registers  that float32 sum is a second tile in registers; else it is `out` itself
    descriptors   operands are read by the tensor memory accelerator (Hopper and later), else by pointers
    """

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    promote: int
    in_registers: bool
    descriptors: bool


# by architecture: below WIDE_FROM columns of the result, and from there on. 128 x 256 reads a quarter less for the
# same work, and has no registers for a second sum. tests/kernels/test_ahead_of_time.py compiles those of 80 and 90;
# 120 has little more than half of their shared memory
_AMPERE = Tiles(
    rows=128, columns=128, inner=32, num_warps=8, num_stages=4, promote=16, in_registers=True, descriptors=False
)
_HOPPER = Tiles(
    rows=128, columns=128, inner=64, num_warps=8, num_stages=4, promote=8, in_registers=True, descriptors=True
)
_WIDE = Tiles(
    rows=128, columns=256, inner=64, num_warps=8, num_stages=3, promote=64, in_registers=False, descriptors=True
)
TILES: dict[int, tuple[Tiles, Tiles]] = {80: (_AMPERE, _AMPERE), 90: (_HOPPER, _WIDE), 120: (_AMPERE, _AMPERE)}
WIDE_FROM = 4096
# row panels whose tiles follow each other, so that what they read of the right operand is still in the L2 cache
_GROUP = 8
# columns of a tile that are added to `out` at a time
_PIECE = tl.constexpr(64)
# sizes and strides that are multiples of this many elements keep all loads and stores 16 bytes wide
_EVEN = 16
_INTERPRETED = 90, 3


@dataclass(frozen=True, slots=True)
class Operand:
    """A float16 operand as it lies in memory.

    stored      [B, rows, columns], even: rows of consecutive elements, sizes and strides multiples of 16
    transposed  the operand is stored.mT
    """

    stored: Tensor
    transposed: bool


def operand(x: Tensor) -> Operand:
    """Take float16 `x` [B, rows, columns] as it is, or as what it is the transposed view of, if that is even.

    Else it is copied, and zeros make it so.
    """
    for view, transposed in ((x, False), (x.mT, True)):
        if is_even(view):
            return Operand(view, transposed)
    batches, rows, columns = x.shape
    copied = x.new_zeros(batches, up(rows), up(columns))
    copied[:, :rows, :columns] = x
    return Operand(copied, False)


def is_even(x: Tensor) -> bool:
    """Whether [B, rows, columns] can be read and written in blocks of 16 bytes."""
    strides = x.stride()[0 if x.shape[0] > 1 else 1 : 2]
    multiples = all(size % _EVEN == 0 for size in (*x.shape[1:], *strides))
    return multiples and x.stride(2) == 1 and min(strides) > 0 and x.data_ptr() % 16 == 0


def up(size: int) -> int:
    """The next multiple of 16."""
    return -(-size // _EVEN) * _EVEN


def add_product(
    out: Tensor,
    left: Operand,
    right: Operand,
    *,
    halves: int = 0,
    inverse: Tensor | None = None,
    triangle: bool = False,
) -> None:
    """Add left · right, or inverse · left · right, to `out`.

    out       [B, m, n] float32, any strides; if it is not even, a temporary of its size is
    left      [B, m, k], twice as many matrices if halves is 1: high and low parts of each in turn, which are summed
    right     [B, k, n], twice as many if halves is 2. m, n and k are rounded up to multiples of 16 in both
    inverse   [B] float32, where halves is not 0
    triangle  only tiles that reach the diagonal or lie below it (m = n)
    """
    batches, m, n = out.shape
    if not is_even(out):
        even = out.new_zeros(batches, up(m), up(n))
        add_product(even, left, right, halves=halves, inverse=inverse, triangle=triangle)
        out.add_(even[:, :m, :n])
        return
    k = left.stored.shape[1 if left.transposed else 2]
    tiles = tiles_for(n, out.device)
    count = tile_count(m, n, tiles, triangle)
    with torch.cuda.device(out.device) if out.device.type == "cuda" else nullcontext():
        _product[(min(batches * count, _machine(out.device)[1]),)](
            _argument(left, tiles, block_shape(tiles, left.transposed, right=False)),
            _argument(right, tiles, block_shape(tiles, right.transposed, right=True)),
            out,
            inverse,
            m,
            n,
            k,
            count,
            batches * count,
            *_strides(left.stored),
            *_strides(right.stored),
            *_strides(out),
            **constants(tiles, left.transposed, right.transposed, halves, triangle),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )


def block_shape(tiles: Tiles, transposed: bool, *, right: bool) -> list[int]:
    """What one load takes of an operand as it is stored."""
    if right:
        return [1, tiles.columns, tiles.inner] if transposed else [1, tiles.inner, tiles.columns]
    return [1, tiles.inner, tiles.rows] if transposed else [1, tiles.rows, tiles.inner]


def constants(tiles: Tiles, left_transposed: bool, right_transposed: bool, halves: int, triangle: bool):
    """What a kernel is compiled for, besides types and alignment."""
    return {
        "LEFT_TRANSPOSED": left_transposed,
        "RIGHT_TRANSPOSED": right_transposed,
        "HALVES": halves,
        "TRIANGLE": triangle,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "INNER": tiles.inner,
        "PROMOTE": tiles.promote,
        "IN_REGISTERS": tiles.in_registers,
        "DESCRIPTORS": tiles.descriptors,
        "GROUP": _GROUP,
    }


def tiles_for(columns: int, device: torch.device) -> Tiles:
    """The tiles for a result of so many columns; an architecture that is not listed has the next lower one's."""
    capability = _machine(device)[0]
    small, wide = TILES[max(listed for listed in TILES if listed <= capability)]
    return wide if columns >= WIDE_FROM else small


def tile_count(m: int, n: int, tiles: Tiles, triangle: bool) -> int:
    """How many tiles the result of one product has."""
    panels = -(-m // tiles.rows)
    if not triangle:
        return panels * -(-n // tiles.columns)
    return sum(panel * tiles.rows // tiles.columns + 1 for panel in range(panels))


def _argument(given: Operand, tiles: Tiles, block: list[int]):
    if not tiles.descriptors:
        return given.stored
    matrices, rows, _ = given.stored.shape
    pitch = given.stored.stride(1)
    strides = [given.stored.stride(0) if matrices > 1 else rows * pitch, pitch, 1]
    return TensorDescriptor(given.stored, list(given.stored.shape), strides, block)


def _strides(x: Tensor) -> tuple[int, int]:
    # a single matrix may have any batch stride, and 0 counts as a multiple of 16
    return (x.stride(0) if x.shape[0] > 1 else 0), x.stride(1)


@lru_cache(maxsize=16)
def _machine(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return _INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


@triton.jit(do_not_specialize=["tiles_each", "tiles"])
def _product(
    left,
    right,
    out,
    inverse,
    m,
    n,
    k,
    tiles_each,
    tiles,
    left_batch,
    left_pitch,
    right_batch,
    right_pitch,
    out_batch,
    out_row,
    LEFT_TRANSPOSED: tl.constexpr,
    RIGHT_TRANSPOSED: tl.constexpr,
    HALVES: tl.constexpr,
    TRIANGLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PROMOTE: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    GROUP: tl.constexpr,
):
    PARTS: tl.constexpr = 2 if HALVES > 0 else 1
    LEFT_PARTS: tl.constexpr = 2 if HALVES == 1 else 1
    RIGHT_PARTS: tl.constexpr = 2 if HALVES == 2 else 1
    # high and low parts follow each other in one sum: two products in a loop's round wait for each other
    blocks = tl.cdiv(k, INNER) * PARTS
    length = blocks if IN_REGISTERS else PROMOTE
    spans = tl.cdiv(blocks, length)
    mine = tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0))
    # one loop over tiles and spans of their sums: nested, the addresses of `out` would be kept during the sums
    for turn in range(mine * spans):
        tile = tl.program_id(0) + turn // spans * tl.num_programs(0)
        first = turn % spans * length
        batch = tile // tiles_each
        if TRIANGLE:
            i, j = lower_tile(tile % tiles_each, COLUMNS // ROWS)
        else:
            i, j = _grouped_tile(tile % tiles_each, tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS), GROUP)
        i *= ROWS
        j *= COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        part = tl.zeros((ROWS, COLUMNS), tl.float32)
        for block in range(first, min(first + length, blocks)):
            inner = block // PARTS * INNER
            l_matrix = batch * LEFT_PARTS + block % LEFT_PARTS
            r_matrix = batch * RIGHT_PARTS + block % RIGHT_PARTS
            a = _block(
                left, l_matrix, i, inner, left_batch, left_pitch, m, k, ROWS, INNER, LEFT_TRANSPOSED, DESCRIPTORS
            )
            b = _block(
                right, r_matrix, inner, j, right_batch, right_pitch, k, n, INNER, COLUMNS, RIGHT_TRANSPOSED, DESCRIPTORS
            )
            part = tl.dot(a, b, part)
            if IN_REGISTERS and block % PROMOTE == PROMOTE - 1:
                total += part
                # a constant would become a select outside of this branch, which reads sums still in flight
                part *= 0.0
        if IN_REGISTERS:
            part += total
        if HALVES > 0:
            part *= tl.load(inverse + batch)
        corner = out + batch.to(tl.int64) * out_batch + i.to(tl.int64) * out_row + j
        _add(corner, part, m - i, n - j, out_row, ROWS, COLUMNS)


@triton.jit
def _add(corner, part, height, width, pitch, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # a part of the columns at a time: what is there and what comes to it do not fit the registers at once
    if COLUMNS > _PIECE:
        HALF: tl.constexpr = COLUMNS // 2
        first, second = part.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
        _add(corner, first, height, width, pitch, ROWS, HALF)
        _add(corner + HALF, second, height, width - HALF, pitch, ROWS, HALF)
    else:
        rows = tl.arange(0, ROWS)[:, None]
        columns = tl.arange(0, COLUMNS)[None, :]
        target = corner + rows.to(tl.int64) * pitch + columns
        inside = (rows < height) & (columns < width)
        tl.store(target, tl.load(target, mask=inside) + part, mask=inside)


@triton.jit
def lower_tile(index, RATIO: tl.constexpr):
    # RATIO row panels in turn have one tile more than those before: RATIO (g² + g) / 2 tiles lie before group g
    g = ((tl.sqrt(8.0 * (index // RATIO).to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # float32's root is off by one at most
    g = tl.where(RATIO * (g * (g + 1) // 2) > index, g - 1, g)
    g = tl.where(RATIO * ((g + 1) * (g + 2) // 2) <= index, g + 1, g)
    rest = index - RATIO * (g * (g + 1) // 2)
    return RATIO * g + rest // (g + 1), rest % (g + 1)


@triton.jit
def _grouped_tile(index, panels, across, GROUP: tl.constexpr):
    first = index // (GROUP * across) * GROUP
    height = min(panels - first, GROUP)
    rest = index % (GROUP * across)
    return first + rest % height, rest // height


@triton.jit
def _block(
    x,
    matrix,
    row,
    column,
    batch_stride,
    pitch,
    height,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    if DESCRIPTORS and TRANSPOSED:
        block = x.load([matrix, column, row]).reshape(COLUMNS, ROWS).T
    elif DESCRIPTORS:
        block = x.load([matrix, row, column]).reshape(ROWS, COLUMNS)
    else:
        rows = row + tl.arange(0, ROWS)[:, None]
        columns = column + tl.arange(0, COLUMNS)[None, :]
        source = x + matrix.to(tl.int64) * batch_stride
        # the address is made the way that the elements lie: a transposed block of registers would not be prefetched
        if TRANSPOSED:
            source += columns.to(tl.int64) * pitch + rows
        else:
            source += rows.to(tl.int64) * pitch + columns
        block = tl.load(source, mask=(rows < height) & (columns < width), other=0.0)
    return block
