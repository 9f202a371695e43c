from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from streammerge_kernels import gram, gram_triton, product_triton
from streammerge_kernels.choice import choose
from streammerge_kernels.product_triton import Tiles, lower_tile
from tests.kernels.devices import DEVICE

# smaller than those that are launched, for several tiles, blocks and promotions in matrices that are small too
SMALL = Tiles(rows=64, columns=64, inner=32, num_warps=4, num_stages=2, promote=2, in_registers=True, descriptors=True)
VARIANTS = {
    "descriptors": SMALL,
    "pointers": replace(SMALL, descriptors=False),
    "wide": replace(SMALL, columns=128, in_registers=False),
}
SHAPES = [(1, 1), (3, 5), (72, 136), (160, 208), (40, 17)]
LAYOUTS = ["columns", "rows"]


@pytest.fixture(params=VARIANTS)
def tiles(request, monkeypatch):
    variant = VARIANTS[request.param]
    monkeypatch.setattr(product_triton, "TILES", {0: (variant, variant)})


def random(*shape, layout="columns"):
    """float16 X [..., k, n] whose rows, or whose columns, are contiguous."""
    *batch, k, n = shape
    stored = (*batch, k, n) if layout == "columns" else (*batch, n, k)
    values = torch.randn(stored).half().to(DEVICE)
    return values if layout == "columns" else values.mT


def poisoned(*shape):
    """A start whose upper triangle must not matter."""
    return torch.randn(shape, device=DEVICE).tril() + torch.full(shape, torch.nan, device=DEVICE).triu(1)


def exact(start, x):
    return (start.double() + x.double().mT @ x.double()).tril()


def error(found, expected):
    return (found.double().tril() - expected).norm()


def by_torch(start, x):
    with choose("torch"):
        return gram.add_gram_(start.tril(), x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_the_twin_adds_the_lower_triangle_as_accurately_as_torch(tiles, k, n, layout):
    torch.manual_seed(0)
    x, start = random(k, n, layout=layout), poisoned(n, n)
    expected = exact(start.tril(), x)
    out = start.clone()
    assert gram_triton.add_gram_(out, x) is out
    assert error(out, expected) <= 2 * error(by_torch(start, x), expected) + 1e-7 * expected.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tiles_that_are_launched_here_are_as_accurate_as_torch(layout):
    torch.manual_seed(0)
    x = random(144, 272, layout=layout)
    start = torch.randn(272, 272, device=DEVICE)
    expected = exact(start, x)
    found = gram_triton.add_gram_(start.clone(), x)
    assert error(found, expected) <= 2 * error(by_torch(start, x), expected) + 1e-7 * expected.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_matrix_of_a_batch_has_its_own_edges(tiles, layout):
    torch.manual_seed(0)
    x = random(3, 48, 80, layout=layout)
    out = gram_triton.add_gram_(torch.zeros(3, 80, 80, device=DEVICE), x)
    expected = exact(torch.zeros(3, 80, 80, device=DEVICE), x)
    for one, other in zip(out, expected, strict=True):
        assert error(one, other) <= 1e-6 * other.norm()


def test_views_that_are_not_even_give_the_gram_of_their_copies(tiles):
    torch.manual_seed(0)
    wide = torch.randn(48, 260).half().to(DEVICE)
    spread = torch.randn(2, 30, 64, 2).half().to(DEVICE)[..., 0]
    for view in (wide[:, 3:90], wide[::3, 16:144], spread[0], spread[0].mT, spread.expand(2, 30, 64)[:1]):
        n = view.shape[-1]
        out = gram_triton.add_gram_(torch.zeros(*view.shape[:-2], n, n, device=DEVICE), view)
        expected = exact(torch.zeros((), device=DEVICE), view)
        assert error(out, expected) <= 1e-6 * expected.norm()


def test_what_lies_around_a_sum_that_is_a_view_stays(tiles):
    torch.manual_seed(0)
    x = random(32, 48)
    whole = torch.zeros(100, 112, device=DEVICE)
    expected = exact(torch.zeros(48, 48, device=DEVICE), x)
    for view in (whole[5:53, 16:64], whole[5:53, 61:109]):
        gram_triton.add_gram_(view, x)
        assert error(view, expected) <= 1e-6 * expected.norm()
        view.zero_()
    assert (whole == 0).all()


def test_a_sum_of_stored_columns_is_added_to_as_one_of_rows(tiles):
    torch.manual_seed(0)
    x = random(32, 48)
    out = gram_triton.add_gram_(torch.zeros(48, 48, device=DEVICE).mT, x)
    expected = exact(torch.zeros(48, 48, device=DEVICE), x)
    assert error(out, expected) <= 1e-6 * expected.norm()


def test_zero_columns_stay_exactly_zero(tiles):
    torch.manual_seed(0)
    x = random(40, 96)
    x[:, 10:70] = 0
    out = gram_triton.add_gram_(torch.zeros(96, 96, device=DEVICE), x).tril()
    assert (out[10:70] == 0).all()
    assert (out[:, 10:70] == 0).all()


def test_a_nan_reaches_its_row_and_column_only(tiles):
    x = random(40, 96)
    x[7, 33] = torch.nan
    out = gram_triton.add_gram_(torch.zeros(96, 96, device=DEVICE), x).tril()
    reached = torch.zeros(96, 96, device=DEVICE, dtype=torch.bool)
    reached[33, :34], reached[33:, 33] = True, True
    assert torch.equal(out.isnan(), reached)


@pytest.mark.parametrize("shape", [(0, 16), (4, 0), (0, 3, 16), (2, 0, 16), (2, 3, 0)])
def test_empty_matrices_add_nothing(shape):
    x = torch.zeros(shape, dtype=torch.float16, device=DEVICE)
    start = torch.ones(*shape[:-2], shape[-1], shape[-1], device=DEVICE)
    for module in (gram, gram_triton):
        assert torch.equal(module.add_gram_(start.clone(), x), start)
        assert torch.equal(module.mirror_(start.clone()), start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_wider_matrices_are_left_to_torch(dtype):
    x = torch.randn(20, 30, dtype=dtype, device=DEVICE)
    start = torch.zeros(30, 30, dtype=dtype, device=DEVICE)
    assert torch.equal(gram_triton.add_gram_(start.clone(), x), by_torch(start, x))


def test_a_sum_of_another_shape_or_dtype_is_refused():
    x = random(8, 16)
    with pytest.raises(AssertionError, match="out is"):
        gram_triton.add_gram_(torch.zeros(8, 8, device=DEVICE), x)
    with pytest.raises(AssertionError, match="float64"):
        gram_triton.add_gram_(torch.zeros(16, 16, dtype=torch.float64, device=DEVICE), x)


@triton.jit
def _decode(indices, rows, columns, COUNT: tl.constexpr, RATIO: tl.constexpr):
    at = tl.arange(0, COUNT)
    i, j = lower_tile(tl.load(indices + at), RATIO)
    tl.store(rows + at, i)
    tl.store(columns + at, j)


@pytest.mark.parametrize("ratio", [1, 2])
def test_every_index_has_its_own_tile_also_where_the_root_is_inexact(ratio):
    panels = 16000
    # around where each panel begins, by summing up what lies before it
    before = (torch.arange(panels) // ratio + 1).cumsum(0)
    indices = torch.cat((torch.zeros(1, dtype=torch.int64), before[:-1], before - 1))
    count = 1 << (len(indices) - 1).bit_length()
    padded = torch.nn.functional.pad(indices, (0, count - len(indices))).int().to(DEVICE)
    rows, columns = torch.full_like(padded, -1), torch.full_like(padded, -1)
    _decode[(1,)](padded, rows, columns, COUNT=count, RATIO=ratio)
    panel = torch.arange(panels)
    first, last = rows[: len(indices)].cpu().split(panels), columns[: len(indices)].cpu().split(panels)
    assert torch.equal(first[0].long(), panel)
    assert torch.equal(first[1].long(), panel)
    assert (last[0] == 0).all()
    assert torch.equal(last[1].long(), panel // ratio)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [1, 64, 65, 300])
def test_as_many_tiles_are_counted_as_reach_the_diagonal(variant, n):
    tiles = VARIANTS[variant]
    reached = sum(
        j * tiles.columns < min((i + 1) * tiles.rows, n)
        for i in range(-(-n // tiles.rows))
        for j in range(-(-n // tiles.columns))
    )
    assert product_triton.tile_count(n, n, tiles, True) == reached


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("shape", [(1, 1), (130, 130), (3, 65, 65)], ids=str)
def test_mirroring_reads_only_what_is_below_and_is_that_of_torch(shape, dtype):
    torch.manual_seed(0)
    start = poisoned(*shape).to(dtype)
    expected = gram.mirror_(start.clone())
    assert torch.equal(expected, start.tril() + start.tril(-1).mT)
    assert torch.equal(gram_triton.mirror_(start.clone()), expected)


def test_a_view_is_mirrored_in_place_and_nothing_around_it():
    torch.manual_seed(0)
    whole = torch.randn(2, 90, 100, device=DEVICE)
    before = whole.clone()
    for module in (gram, gram_triton):
        module.mirror_(whole[:, 5:75, 20:90])
        assert torch.equal(whole[:, 5:75, 20:90], whole[:, 5:75, 20:90].mT)
        whole[:, 5:75, 20:90] = before[:, 5:75, 20:90]
        assert torch.equal(whole, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(72, 136), (2, 30, 50), (700, 5)], ids=str)
def test_torch_sums_float16_as_accurately_as_float32(monkeypatch, shape, layout):
    torch.manual_seed(0)
    # a few rows are converted at a time
    monkeypatch.setattr(gram, "_CONVERTED", 1000)
    x = random(*shape, layout=layout)
    n = shape[-1]
    start = torch.randn(*shape[:-2], n, n, device=DEVICE)
    expected = exact(start, x)
    wide = start + x.float().mT @ x.float()
    found = by_torch(start, x)
    assert error(found, expected) <= 2 * error(wide, expected) + 1e-7 * expected.norm()
