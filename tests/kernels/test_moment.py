from dataclasses import replace

import pytest
import torch

from streammerge_kernels import moment, moment_triton, product_triton
from streammerge_kernels.product_triton import Tiles
from tests.kernels.devices import DEVICE

# smaller than those that are launched, for several tiles, blocks and promotions in matrices that are small too
SMALL = Tiles(rows=64, columns=64, inner=32, num_warps=4, num_stages=2, promote=2, in_registers=True, descriptors=True)
VARIANTS = {
    "descriptors": SMALL,
    "pointers": replace(SMALL, descriptors=False),
    "wide": replace(SMALL, columns=128, in_registers=False),
}
SHAPES = [(1, 1, 1), (5, 3, 17), (80, 48, 144), (72, 130, 40)]
LAYOUTS = ["rows", "columns"]
SIDES = ["half_left", "half_right"]
BOTH = pytest.mark.parametrize("module", [moment, moment_triton], ids=["torch", "triton"])


@pytest.fixture(params=VARIANTS)
def tiles(request, monkeypatch):
    variant = VARIANTS[request.param]
    monkeypatch.setattr(product_triton, "TILES", {0: (variant, variant)})


def random(*shape, layout="rows"):
    values = torch.randn(shape).to(DEVICE)
    return values if layout == "rows" else values.mT.contiguous().mT


def operands(m, k, n, side, layout="rows", *, batch=()):
    left, right = random(*batch, m, k, layout=layout), random(*batch, k, n, layout=layout)
    # as far from 1 as Grams of packed deltas, and of their inverses, are
    return (left.half(), right * 1e7) if side == "half_left" else (left * 1e-7, right.half())


def exact(start, left, right):
    return start.double() + left.double() @ right.double()


def check(found, start, left, right):
    expected = exact(start, left, right)
    wide = (start + left.float() @ right.float() - expected).norm()
    assert (found - expected).norm() <= 2 * wide + 1e-7 * expected.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_the_twin_is_as_accurate_as_a_float32_product(tiles, m, k, n, side, layout):
    torch.manual_seed(0)
    left, right = operands(m, k, n, side, layout)
    start = random(m, n) * (left.float() @ right.float()).abs().max()
    out = start.clone()
    assert moment_triton.add_product_(out, left, right) is out
    check(out, start, left, right)


@pytest.mark.parametrize("side", SIDES)
def test_the_tiles_that_are_launched_here_are_as_accurate_as_a_float32_product(side):
    torch.manual_seed(0)
    left, right = operands(130, 40, 140, side)
    start = torch.zeros(130, 140, device=DEVICE)
    check(moment_triton.add_product_(start.clone(), left, right), start, left, right)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
def test_torch_is_as_accurate_as_a_float32_product(monkeypatch, batch, side, layout):
    torch.manual_seed(0)
    # a few rows, or columns, are converted at a time
    monkeypatch.setattr(moment, "_CONVERTED", 300)
    left, right = operands(31, 70, 45, side, layout, batch=batch)
    start = torch.zeros(*batch, 31, 45, device=DEVICE)
    check(moment.add_product_(start.clone(), left, right), start, left, right)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
def test_what_torch_does_on_a_gpu_is_as_accurate_as_a_float32_product(monkeypatch, batch, side):
    torch.manual_seed(0)
    if DEVICE == "cpu":
        monkeypatch.setattr(moment, "_float32_product", lambda left, right: left.float() @ right.float())
    left, right = operands(31, 70, 45, side, batch=batch)
    start = torch.zeros(*batch, 31, 45, device=DEVICE)
    check(moment._add_split_(start.clone(), left, right), start, left, right)


@pytest.mark.parametrize("side", SIDES)
def test_each_matrix_of_a_batch_has_its_own_edges_and_scale(tiles, side):
    torch.manual_seed(0)
    left, right = operands(40, 24, 50, side, batch=(3,))
    scales = torch.tensor([1e-20, 1.0, 1e20], device=DEVICE).view(3, 1, 1)
    left, right = (left, right * scales) if side == "half_left" else (left * scales, right)
    out = moment_triton.add_product_(torch.zeros(3, 40, 50, device=DEVICE), left, right)
    for one in zip(out, torch.zeros_like(out), left, right, strict=True):
        check(*one)


@BOTH
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_a_moment_is_the_product_with_the_gram_on_its_side(module, left):
    torch.manual_seed(0)
    x = random(40, 72).half()
    gram = x.float() @ x.float().mT if left else x.float().mT @ x.float()
    start = random(40, 72)
    out = start.clone()
    assert module.add_moment_(out, x, gram, left=left) is out
    check(out, start, *((gram, x) if left else (x, gram)))


@BOTH
@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_operands_of_one_dtype_are_multiplied_by_torch(module, dtype, batch):
    torch.manual_seed(0)
    left, right, start = (random(*batch, *shape).to(dtype) for shape in ((5, 7), (7, 9), (5, 9)))
    add = torch.addmm if not batch else torch.baddbmm
    assert torch.equal(module.add_product_(start.clone(), left, right), add(start, left, right))


def test_views_give_the_product_of_their_copies(tiles):
    torch.manual_seed(0)
    x = random(48, 200).half()[:, 3:90]
    gram = random(87, 300)[:, 1:262:3]
    whole = torch.zeros(100, 100, device=DEVICE)
    out = whole[7:55, 5:92]
    check(moment_triton.add_product_(out, x, gram), torch.zeros_like(out), x, gram)
    out.zero_()
    assert (whole == 0).all()
    across = torch.zeros(87, 48, device=DEVICE).mT
    check(moment_triton.add_product_(across, x, gram), torch.zeros_like(across), x, gram)


@BOTH
@pytest.mark.parametrize("side", SIDES)
def test_a_zero_operand_adds_exactly_nothing(module, side):
    left, right = operands(20, 30, 40, side)
    start = random(20, 40)
    for pair in ((left * 0, right), (left, right * 0)):
        assert torch.equal(module.add_product_(start.clone(), *pair), start)


@BOTH
def test_a_nan_in_the_float32_operand_reaches_its_column_and_no_other_matrix(module):
    left, right = operands(20, 30, 40, "half_left", batch=(2,))
    right[1, 4, 7] = torch.nan
    out = module.add_product_(torch.zeros(2, 20, 40, device=DEVICE), left, right)
    assert out[0].isfinite().all()
    assert out[1, :, 7].isnan().all()


@BOTH
def test_a_nan_in_the_float16_operand_reaches_its_row(module):
    left, right = operands(20, 30, 40, "half_left")
    left[3, 4] = torch.nan
    out = module.add_product_(torch.zeros(20, 40, device=DEVICE), left, right)
    assert out[3].isnan().all()
    assert out[torch.arange(20) != 3].isfinite().all()


def test_with_an_infinity_a_split_matrix_is_nan_and_never_a_wrong_number():
    wide = torch.ones(2, 3, 4, device=DEVICE)
    wide[1, 2, 2] = torch.inf
    high, low, inverse = moment.split(wide)
    assert torch.equal((high[0].float() + low[0].float()) * inverse[0], wide[0])
    assert ((high[1].float() + low[1].float()) * inverse[1]).isnan().all()


@BOTH
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_empty_operands_add_nothing(module, shape):
    m, k, n = shape
    for batch in ((), (2,), (0,)):
        left, right = operands(m, k, n, "half_left", batch=batch)
        start = torch.ones(*batch, m, n, device=DEVICE)
        assert torch.equal(module.add_product_(start.clone(), left, right), start)


@BOTH
def test_operands_that_do_not_fit_are_refused(module):
    half, wide = torch.ones(4, 4, dtype=torch.float16, device=DEVICE), torch.ones(4, 4, device=DEVICE)
    for out, left, right, message in [
        (wide, half, half, "float16 by torch.float16 into"),
        (wide.double(), half, wide, "into torch.float64"),
        (half, half, wide, "into torch.float16"),
        (wide, wide.double(), half, "float64 by"),
        (wide, half[:, :3], wide, r"left \(4, 3\)"),
        (wide[:3], half, wide, r"out \(3, 4\)"),
        (wide[None], half[None], wide, r"out \(1, 4, 4\)"),
        (wide.expand(2, 4, 4), half.expand(3, 4, 4), wide.expand(2, 4, 4), r"left \(3, 4, 4\)"),
    ]:
        with pytest.raises(AssertionError, match=message):
            module.add_product_(out, left, right)


@pytest.mark.parametrize("largest", [2.0**-111, 1e-30, 0.9, 1.0, 3.99, 6e4, 1e30, 3.4e38], ids=str)
def test_a_power_of_two_brings_the_largest_magnitude_below_what_float16_holds(largest):
    scale, inverse = moment.powers(torch.tensor(largest, device=DEVICE))
    assert 2.0**14 <= largest * scale.item() < 2.0**15
    assert scale.item() * inverse.item() == 1
    assert torch.frexp(scale).mantissa == 0.5


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38], ids=str)
def test_magnitudes_next_to_zero_have_powers_that_float32_holds(largest):
    scale, inverse = moment.powers(torch.tensor(largest, device=DEVICE))
    assert largest * scale.item() < 2.0**15
    assert scale.item() * inverse.item() == 1


def test_two_halves_hold_22_bits_of_all_but_the_smallest_entries():
    torch.manual_seed(0)
    wide = random(60, 90) * torch.logspace(-12, 3, 90, device=DEVICE)
    high, low, inverse = moment.split(wide)
    apart = ((high.double() + low.double()) * inverse - wide).abs()
    assert (apart <= 2.0**-22 * wide.abs() + 2.0**-39 * wide.abs().max()).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_twin_splits_as_torch_does_and_pads_with_zeros(layout):
    torch.manual_seed(0)
    wide = random(2, 37, 150, layout=layout)
    scale, _ = moment.powers(moment.largest_magnitude(wide))
    found = moment_triton._split(wide, scale)
    stored = found.stored.mT if found.transposed else found.stored
    assert found.transposed == (layout == "columns")
    assert stored.shape == (4, 48, 160)
    high, low, _ = moment.split(wide)
    assert torch.equal(stored[0::2, :37, :150], high)
    assert torch.equal(stored[1::2, :37, :150], low)
    assert (stored[:, 37:] == 0).all()
    assert (stored[..., 150:] == 0).all()
