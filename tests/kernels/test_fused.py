import pytest
import torch

from streammerge_kernels import fused, fused_triton
from streammerge_kernels.choice import choose
from streammerge_kernels.delta_pack import SCALE, delta_pack
from tests.kernels.devices import DEVICE

# on a GPU, too, this is the torch one
reference = choose("torch")(fused.add_gram_and_moment_)
twin = fused_triton.add_gram_and_moment_
BOTH = pytest.mark.parametrize("implementation", [reference, twin], ids=["torch", "triton"])

SHAPES = [(1, 1), (3, 5), (70, 40), (60, 130), (33, 128), (45, 272)]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# numpy, in which the interpreter computes, warns where a GPU gives an infinity or NaN
QUIET = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def pair(rows, columns, *, stored=torch.bfloat16, base_stored=None):
    """A base, and an expert near it that left some columns as they were."""
    generator = torch.Generator().manual_seed(rows + columns)
    base = 0.02 * torch.randn(rows, columns, generator=generator)
    expert = base + 1e-3 * torch.randn(rows, columns, generator=generator)
    base = base.to(base_stored or stored)
    expert = torch.where(torch.arange(columns) % 7 == 3, base.float(), expert).to(stored)
    return base.to(DEVICE), expert.to(DEVICE)


def run(implementation, base, expert, **options):
    """What was added to a Gram (its lower triangle) and a moment that were not zero before."""
    rows, columns = expert.shape
    gram, moment = torch.ones(columns, columns, device=DEVICE), torch.ones(rows, columns, device=DEVICE)
    scratch = torch.full_like(gram, torch.nan)
    packed = torch.full_like(moment, torch.nan, dtype=torch.float16)
    buffers = {"scratch": scratch, "packed": packed, **options}
    returned = implementation(gram, moment, base, expert, **buffers)
    assert returned[0] is gram
    assert returned[1] is moment
    return gram.double().tril() - torch.ones_like(gram).tril(), moment.double() - 1, scratch, packed


def exactly(base, expert, of="change"):
    """In float64, from the packed differences: what the working format's rounding costs is delta_pack's affair."""
    packed = delta_pack(base, expert[None]).values[0].double()
    own = packed.mT @ packed
    weight = packed + (SCALE * base.double() if of == "weights" else 0)
    return own.tril(), weight @ own


def assert_as_accurate(ours, plain, exact):
    for got, other, true in zip(ours[:2], plain[:2], exact, strict=True):
        assert (got - true).norm() <= 2 * (other - true).norm() + 1e-7 * true.norm()


@pytest.mark.parametrize("of", ["change", "weights"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES, ids=IDS)
def test_the_reference_adds_both_products(rows, columns, of):
    base, expert = pair(rows, columns)
    ours = run(reference, base, expert, of=of)
    for got, true in zip(ours[:2], exactly(base, expert, of), strict=True):
        assert (got - true).norm() <= 1e-6 * true.norm() + 1e-6


@pytest.mark.parametrize("of", ["change", "weights"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES, ids=IDS)
def test_the_twin_is_as_accurate_as_the_reference(rows, columns, of):
    base, expert = pair(rows, columns)
    ours = run(twin, base, expert, of=of)
    assert_as_accurate(ours, run(reference, base, expert, of=of), exactly(base, expert, of))


@pytest.mark.parametrize("of", ["change", "weights"])
@pytest.mark.parametrize("base_stored", list(DTYPES.values()), ids=[f"{name}-base" for name in DTYPES])
@pytest.mark.parametrize("stored", list(DTYPES.values()), ids=[f"{name}-expert" for name in DTYPES])
def test_any_two_stored_dtypes_meet(stored, base_stored, of):
    base, expert = pair(45, 80, stored=stored, base_stored=base_stored)
    ours = run(twin, base, expert, of=of)
    assert_as_accurate(ours, run(reference, base, expert, of=of), exactly(base, expert, of))


def test_the_gram_kernel_leaves_the_packed_differences_and_both_triangles():
    base, expert = pair(40, 272)
    for implementation in (reference, twin):
        _, _, scratch, packed = run(implementation, base, expert)
        assert torch.equal(packed, delta_pack(base, expert[None]).values[0])
        true = packed.double().mT @ packed.double()
        assert (scratch.double() - true).norm() <= 1e-6 * true.norm()


def test_sums_longer_than_one_accumulator_takes_are_whole():
    rows = fused_triton.DEPTH * (2 * fused_triton.PROMOTE + 1) + 5
    base, expert = pair(rows, 24)
    ours = run(twin, base, expert)
    assert_as_accurate(ours, run(reference, base, expert), exactly(base, expert))


def test_several_experts_add_up_in_one_gram_and_one_moment():
    base, expert = pair(50, 60)
    experts = (expert, 2 * expert, expert + base)
    expected = [exactly(base, one) for one in experts]
    for implementation in (reference, twin):
        gram, moment = torch.zeros(60, 60, device=DEVICE), torch.zeros(50, 60, device=DEVICE)
        for one in experts:
            implementation(gram, moment, base, one)
        for got, true in zip(
            (gram.double().tril(), moment.double()), map(sum, zip(*expected, strict=True)), strict=True
        ):
            assert (got - true).norm() <= 1e-6 * true.norm()


def test_views_give_what_their_copies_give():
    base, expert = pair(150, 90)
    for some_base, some in (
        (base.mT, expert.mT),
        (base[5:60, 3:70], expert[5:60, 3:70]),
        (base[:, ::2], expert[:, ::2]),
    ):
        rows, columns = some.shape
        expected = run(twin, some_base.contiguous(), some.contiguous())
        wide = torch.full((columns + 3, columns + 9), torch.nan, device=DEVICE)
        tall = torch.full((rows + 3, columns + 9), torch.nan, dtype=torch.float16, device=DEVICE)
        views = {"scratch": wide[1:-2, 4:-5], "packed": tall[2:-1, 4:-5]}
        ours = run(twin, some_base, some, **views)
        for got, wanted in zip(ours[:2], expected[:2], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6 * wanted.abs().amax().item())
        for view in views.values():
            assert view.isfinite().all()
            view[:] = torch.nan
        assert wide.isnan().all()
        assert tall.isnan().all()


@BOTH
def test_an_expert_equal_to_its_base_adds_exactly_nothing(implementation):
    base, _ = pair(30, 50)
    gram, moment, *_ = run(implementation, base, base, of="weights")
    assert not gram.any()
    assert not moment.any()


@BOTH
@pytest.mark.parametrize("shape", [(0, 6), (6, 0)], ids=["no-rows", "no-columns"])
def test_empty_matrices_add_nothing(shape, implementation):
    rows, columns = shape
    gram, moment = torch.ones(columns, columns, device=DEVICE), torch.ones(rows, columns, device=DEVICE)
    empty = torch.empty(shape, device=DEVICE)
    implementation(gram, moment, empty, empty)
    assert (gram == 1).all()
    assert (moment == 1).all()


@QUIET
@BOTH
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 20.0], ids=["nan", "inf", "too-large"])
def test_a_difference_that_does_not_pack_is_never_a_finite_result(bad, implementation):
    base, expert = pair(40, 140)
    expert[3, 135] = bad
    gram, moment, *_ = run(implementation, base, expert)
    assert not gram[135, 135].isfinite()
    assert not moment[3, 135].isfinite()


def test_small_weights_keep_their_part_of_the_moment():
    base, expert = pair(40, 60, stored=torch.float32)
    base, expert = base * 2.0**-12, base * 2.0**-12 + (expert - base)
    ours = run(twin, base, expert, of="weights")
    assert_as_accurate(ours, run(reference, base, expert, of="weights"), exactly(base, expert, "weights"))


def test_buffers_of_another_shape_or_dtype_are_refused():
    base, expert = pair(4, 6)
    gram, moment = torch.zeros(6, 6, device=DEVICE), torch.zeros(4, 6, device=DEVICE)
    for wrong in (
        {"scratch": torch.empty(5, 6)},
        {"scratch": torch.empty(6, 6).double()},
        {"packed": torch.empty(4, 6)},
        {"packed": torch.empty(6, 4).half().mT},
    ):
        with pytest.raises(AssertionError, match=next(iter(wrong))):
            reference(gram, moment, base, expert, **{k: v.to(DEVICE) for k, v in wrong.items()})
