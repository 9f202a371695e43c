import pytest
import torch

from streammerge_kernels import delta_pack, delta_pack_triton
from streammerge_kernels.choice import choose
from streammerge_kernels.delta_pack import SCALE
from tests.kernels.devices import DEVICE

# on a GPU, too, this is the torch one
reference = choose("torch")(delta_pack.delta_pack)
twin = delta_pack_triton.delta_pack

SHAPES = [(1, 1), (3, 5), (32, 128), (33, 129), (70, 300), (100, 64)]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STORED = pytest.mark.parametrize("stored", list(DTYPES.values()), ids=list(DTYPES))
# numpy, in which the interpreter computes, warns where a GPU gives an infinity or NaN
QUIET = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def family(count, rows, columns, *, stored=torch.bfloat16, base_stored=None, size=1e-3):
    """A base and `count` experts near it, some entries and some whole columns left as they were."""
    generator = torch.Generator().manual_seed(count * rows + columns)
    base = torch.randn(rows, columns, generator=generator) * 0.02
    experts = base + size * torch.randn(count, rows, columns, generator=generator)
    same = torch.rand(count, rows, columns, generator=generator) < 0.3
    base = base.to(base_stored or stored)
    experts = torch.where(same | (torch.arange(columns) % 7 == 3), base.float(), experts)
    return base.to(DEVICE), experts.to(stored).to(DEVICE)


def poisoned(shape):
    return torch.full(shape, torch.nan, dtype=torch.float16, device=DEVICE)


def exact(base, experts):
    return experts.double() - base.double()


def assert_alike(ours, expected):
    """Everything that is exact is equal to the bit; sums are as float32 adds a tile up."""
    assert torch.equal(ours.values.view(torch.int16), expected.values.view(torch.int16))
    torch.testing.assert_close(ours.largest, expected.largest, rtol=0, atol=0, equal_nan=True)
    for name in ("changed", "inexact"):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), rtol=0, atol=0)
    for name in ("column_squares", "lost_squares"):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize(("rows", "columns"), SHAPES, ids=IDS)
@STORED
def test_differences_are_packed_to_nearest_and_counted(stored, rows, columns):
    base, experts = family(2, rows, columns, stored=stored)
    packed = reference(base, experts)
    delta = (experts.float() - base.float()).double()
    assert torch.equal(packed.values, (delta * SCALE).half())
    unpacked = packed.values.double() / SCALE
    assert torch.equal(packed.changed, (delta != 0).sum((1, 2)))
    assert torch.equal(packed.inexact, (delta != unpacked).sum((1, 2)))
    assert torch.equal(packed.largest.double(), delta.abs().amax((1, 2)))
    torch.testing.assert_close(packed.column_squares, delta.square().sum(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(packed.lost_squares, (delta - unpacked).square().sum((1, 2)), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("rows", "columns"), SHAPES, ids=IDS)
@STORED
def test_the_twin_packs_like_the_reference(stored, rows, columns):
    base, experts = family(3, rows, columns, stored=stored)
    out = poisoned(experts.shape)
    ours = twin(base, experts, out=out)
    assert ours.values is out
    assert_alike(ours, reference(base, experts))


@pytest.mark.parametrize("count", [1, 2, 4, 9], ids="T={}".format)
def test_the_twin_packs_any_number_of_experts(count):
    base, experts = family(count, 35, 100)
    assert_alike(twin(base, experts), reference(base, experts))


@pytest.mark.parametrize(
    ("base_stored", "stored"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
    ids=["fp32-base", "fp32-experts", "fp16-base"],
)
def test_the_base_may_be_stored_in_another_dtype(base_stored, stored):
    base, experts = family(2, 40, 140, stored=stored, base_stored=base_stored)
    assert_alike(twin(base, experts), reference(base, experts))


def test_the_twin_sums_squares_as_accurately_as_float32_adds_a_tile():
    base, experts = family(2, 200, 70)
    packed = twin(base, experts)
    squares = exact(base, experts).square().sum(1)
    assert (packed.column_squares - squares).norm() <= 1e-7 * squares.norm()


def test_columns_that_no_expert_changed_have_squares_of_exactly_zero():
    base, experts = family(2, 50, 140)
    for packed in (reference(base, experts), twin(base, experts)):
        assert (packed.column_squares[:, 3::7] == 0).all()
        assert (packed.column_squares[:, 4::7] > 0).all()


def test_an_expert_equal_to_its_base_is_all_zeros():
    base, _ = family(1, 40, 100)
    for packed in (reference(base, base[None]), twin(base, base[None])):
        facts = (packed.values, packed.column_squares, packed.largest, packed.changed, packed.lost_squares)
        assert not any(fact.any() for fact in facts)


def test_views_pack_like_their_copies():
    base, experts = family(3, 90, 150)
    views = [
        (base.mT, experts.mT),
        (base[5:60, 3:100], experts[:, 5:60, 3:100]),
        (base, experts[::2]),
        (base, base.expand(2, 90, 150)),
        (base[:, ::2], experts[:, :, ::2]),
    ]
    for some_base, some in views:
        expected = reference(some_base.contiguous(), some.contiguous())
        assert_alike(reference(some_base, some), expected)
        out = poisoned((some.shape[0], some.shape[1], some.shape[2] + 9))[:, :, 4:-5]
        assert_alike(twin(some_base, some, out=out), expected)


def test_nothing_beside_the_output_is_written():
    base, experts = family(2, 35, 130)
    wide = poisoned((2, 40, 140))
    twin(base, experts, out=wide[:, 2:37, 8:138])
    wide[:, 2:37, 8:138] = torch.nan
    assert wide.isnan().all()


@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 5, 0), (0, 3, 4)], ids=["no-rows", "no-columns", "no-experts"])
def test_empty_operands_pack_to_empty_values_and_zeros(shape):
    experts = torch.zeros(shape, device=DEVICE)
    for packed in (reference(experts.sum(0), experts), twin(experts.sum(0), experts)):
        assert packed.values.shape == shape
        assert packed.column_squares.shape == (shape[0], shape[2])
        for fact in (packed.largest, packed.changed, packed.inexact, packed.lost_squares):
            assert fact.shape == (shape[0],)
            assert not fact.any()


@QUIET
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "minus-inf"])
def test_an_input_that_is_not_finite_shows_in_its_expert_and_column_only(bad):
    base, experts = family(3, 40, 150)
    experts[1, 37, 140] = bad
    for packed in (reference(base, experts), twin(base, experts)):
        assert packed.largest.isfinite().tolist() == [True, False, True]
        assert (~packed.column_squares.isfinite()).nonzero().tolist() == [[1, 140]]
    base[0, 0] = bad
    for packed in (reference(base, experts), twin(base, experts)):
        assert not packed.largest.isfinite().any()
        assert not packed.column_squares[:, 0].isfinite().any()


@QUIET
def test_a_difference_too_large_for_the_format_shows_in_largest():
    base = torch.zeros(2, 3, device=DEVICE)
    experts = base.repeat(2, 1, 1)
    experts[0, 1, 2], experts[1, 1, 2] = -65519 / SCALE, 65520 / SCALE
    for packed in (reference(base, experts), twin(base, experts)):
        assert packed.largest.tolist() == [65519 / SCALE, 65520 / SCALE]
        assert packed.values[:, 1, 2].tolist() == [-65504, torch.inf]
        assert packed.inexact.tolist() == [1, 1]
        assert packed.column_squares.isfinite().all()
        assert packed.lost_squares.isfinite().tolist() == [True, False]


def test_small_differences_of_bfloat16_weights_survive_almost_all():
    base, experts = family(2, 120, 200, size=1e-4)
    packed = reference(base, experts)
    assert (packed.inexact < 0.01 * packed.changed).all()
    assert (packed.lost_squares < 1e-7 * packed.column_squares.sum(1)).all()


def test_an_output_of_another_shape_or_dtype_is_refused():
    base, experts = family(2, 4, 6)
    for out in (torch.empty(2, 4, 5).half(), torch.empty(2, 4, 6), torch.empty(2, 6, 4).half().mT):
        with pytest.raises(AssertionError, match="out "):
            reference(base, experts, out=out.to(DEVICE))
