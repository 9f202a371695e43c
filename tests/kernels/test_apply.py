import math

import pytest
import torch

from streammerge_kernels import apply, apply_triton
from streammerge_kernels.round import key, round_to
from tests.kernels.devices import DEVICE

KEY = {"seed": 3, "name": "model.layers.0.mlp.up_proj.weight"}
WIDTHS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
# the interpreter computes with numpy, which warns of what the kernels are to pass on
INTERPRETED = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
SHAPES = [(1,), (7,), (3, 5), (33, 65), (2, 2048), (5, 1000)]


def named(dtypes):
    return [pytest.param(dtype, id=NAMES[dtype]) for dtype in dtypes]


def operands(shape, base_dtype=torch.bfloat16, merged_dtype=torch.float32):
    torch.manual_seed(sum(shape))
    base = (torch.randn(shape, device=DEVICE) * 0.02).to(base_dtype)
    # some entries change nothing, some less than the output can show
    merged = (torch.randn(shape, device=DEVICE) * 1e-3).to(merged_dtype) * (torch.rand(shape, device=DEVICE) < 0.7)
    return base, merged


def both(base, merged, dtype, rounding="nearest", first_index=0, measure=True):
    """(out, facts) of the reference and of the twin."""
    results = []
    for module in (apply, apply_triton):
        out = torch.full(base.shape, torch.nan, dtype=dtype, device=DEVICE)
        applied = module.apply_(
            base, merged.clone(), out, rounding=rounding, first_index=first_index, measure=measure, **KEY
        )
        results.append((out, applied))
    return results


def same(left, right):
    """Equal to the bit, any NaN counting as any other."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return bool(((left.view(words) == right.view(words)) | (left.isnan() & right.isnan())).all())


def as_a_stream_did(base, merged, dtype, rounding):
    """The order of operations of streams before this op: their outputs must not change by a bit."""
    before = base.to(dtype)
    norm = torch.linalg.vector_norm(merged.contiguous()).item()
    exact = merged.contiguous().add_(base)
    out = torch.empty(base.shape, dtype=dtype)
    round_to(exact, dtype, rounding=rounding, first_index=16, out=out, **KEY)
    changed = int(torch.count_nonzero(out != before))
    lost = torch.linalg.vector_norm(exact.sub_(out)).item() if out.dtype != exact.dtype else 0.0
    return out, changed, norm * norm, lost * lost


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", named(WIDTHS))
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_the_reference_gives_what_streams_gave_to_the_bit(dtype, rounding, layout):
    base, merged = (t.cpu() for t in operands((90, 70), torch.float32))
    if layout == "transposed":
        merged = merged.mT.contiguous().mT
    out, changed, merged_squares, lost_squares = as_a_stream_did(base, merged.clone(), dtype, rounding)
    ours = torch.empty_like(out)
    applied = apply.apply_(base, merged, ours, rounding=rounding, first_index=16, **KEY)
    assert same(ours, out)
    assert applied.changed.item() == changed
    assert applied.merged_squares.item() == merged_squares
    assert applied.lost_squares.item() == lost_squares
    assert applied.non_finite.item() == 0


@pytest.mark.parametrize("dtype", named(WIDTHS))
def test_every_changed_element_of_a_run_of_millions_counts_and_zeros_of_either_sign_are_equal(dtype):
    base = torch.ones(3 * apply._CHUNK + 1)
    base[:5] = torch.tensor([-0.0, 0.0, math.nan, math.inf, -math.inf])
    merged = torch.ones(len(base))
    merged[:5] = torch.tensor([0.0, -0.0, 0.0, 1.0, math.inf])
    applied = apply.apply_(base, merged, torch.empty(len(base), dtype=dtype), rounding="nearest", first_index=0, **KEY)
    # NaN differs from itself, and of two infinities one is left
    assert applied.changed.item() == len(base) - 3
    assert applied.non_finite.item() == 3


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_reference_cut_in_chunks_is_the_reference(monkeypatch, rounding):
    base, merged = (t.cpu() for t in operands((40, 77)))
    outs, sums = [], []
    for chunk in (apply._CHUNK, 100):
        monkeypatch.setattr(apply, "_CHUNK", chunk)
        out = torch.empty_like(base)
        applied = apply.apply_(base, merged.clone(), out, rounding=rounding, first_index=3, **KEY)
        outs.append((out.tolist(), applied.changed.item()))
        sums.append(applied.sums.tolist())
    assert outs[0] == outs[1]
    assert sums[1] == pytest.approx(sums[0], rel=1e-6)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", named(WIDTHS))
def test_a_base_in_a_wider_dtype_than_its_values_need_counts_the_same(dtype, rounding):
    base, merged = (t.cpu() for t in operands((90, 70)))
    base[0, :3] = torch.tensor([-0.0, math.nan, math.inf])
    found = []
    for given, known in ((base, None), (base.float(), torch.bfloat16), (base.float(), None)):
        out = torch.empty(base.shape, dtype=dtype)
        applied = apply.apply_(given, merged.clone(), out, rounding=rounding, first_index=0, base_dtype=known, **KEY)
        found.append([out.nan_to_num().tolist(), applied.changed.item(), applied.non_finite.item()])
    assert found[0] == found[1] == found[2]
    assert found[0][2] == 2
    assert 0 < found[0][1] < base.numel()


@pytest.mark.parametrize("dtype", named([torch.bfloat16, torch.float16, torch.float32]))
def test_remainders_too_large_to_square_are_no_infinities(dtype):
    # what bfloat16 loses of it has a square beyond float32
    huge = torch.full((40,), 6e4 if dtype is torch.float16 else 3.0001e38)
    out = torch.empty(40, dtype=dtype)
    applied = apply.apply_(torch.zeros(40), huge, out, rounding="nearest", first_index=0, **KEY)
    assert out.isfinite().all()
    assert applied.non_finite.item() == 0


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", named(WIDTHS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_twin_writes_the_same_bits_and_counts_the_same(shape, dtype, rounding):
    base, merged = operands(shape)
    (expected, facts), (out, ours) = both(base, merged, dtype, rounding)
    assert same(out, expected)
    assert ours.changed.item() == facts.changed.item()
    assert ours.non_finite.item() == facts.non_finite.item() == 0


@pytest.mark.parametrize("merged_dtype", named([torch.float32, torch.float64]))
@pytest.mark.parametrize("base_dtype", named(WIDTHS))
@pytest.mark.parametrize("dtype", named(WIDTHS))
def test_every_mix_of_dtypes_gives_the_same_bits(base_dtype, merged_dtype, dtype):
    (expected, facts), (out, ours) = both(*operands((40, 65), base_dtype, merged_dtype), dtype, "stochastic")
    assert same(out, expected)
    assert ours.changed.item() == facts.changed.item()


@pytest.mark.parametrize("dtype", named([torch.bfloat16, torch.float16]))
@pytest.mark.parametrize("first_index", [1, 5, 8, 2**31 - 3, 2**34 + 7])
def test_the_twin_rounds_a_run_as_its_place_in_the_tensor_says(first_index, dtype):
    (expected, _), (out, _) = both(*operands((3000,)), dtype, "stochastic", first_index)
    assert same(out, expected)


@pytest.mark.parametrize("dtype", named([torch.bfloat16, torch.float16]))
@pytest.mark.parametrize("scale", [1e-9, 1e-7, 3e-6, 1e-4, 1.0, 3e4], ids=str)
def test_the_twin_rounds_stochastically_at_every_scale(scale, dtype):
    base = torch.zeros(4096, device=DEVICE)
    merged = torch.linspace(-2, 2, 4096, device=DEVICE) * scale
    (expected, _), (out, _) = both(base, merged, dtype, "stochastic")
    assert same(out, expected)


@INTERPRETED
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", named([torch.bfloat16, torch.float16]))
def test_every_value_a_narrow_dtype_can_hold_stays(dtype, rounding):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device=DEVICE).to(torch.int16).view(dtype)
    # every third: all exponents, and a third of the time
    every = every[::3].contiguous()
    zero = torch.zeros(every.shape, device=DEVICE)
    out = torch.empty_like(every)
    applied = apply_triton.apply_(every, zero, out, rounding=rounding, first_index=0, **KEY)
    # a sum with +0 turns -0 into +0, in torch too
    assert same(out, (every.float() + zero).to(dtype))
    assert applied.non_finite.item() == int((~every.isfinite()).sum())


def test_the_twin_rounds_halves_to_even():
    halves = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 2.0**-133, 2.0**-134], device=DEVICE)
    (expected, _), (out, _) = both(torch.zeros(5, device=DEVICE), halves, torch.bfloat16)
    assert same(out, expected)


@pytest.mark.parametrize("dtype", named(WIDTHS))
@pytest.mark.parametrize("merged_dtype", named([torch.float32, torch.float64]))
def test_squares_are_as_near_float64_as_the_references(dtype, merged_dtype):
    base, merged = operands((70, 130), torch.float32, merged_dtype)
    (out, facts), (_, ours) = both(base, merged, dtype)
    exact = (base + merged).double()
    for fact, truth in (("merged_squares", merged.double()), ("lost_squares", exact - out.double())):
        truth = truth.square().sum().item()
        error = abs(getattr(facts, fact).item() - truth)
        assert abs(getattr(ours, fact).item() - truth) <= 2 * error + 2e-7 * truth


@INTERPRETED
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", named([torch.bfloat16, torch.float16, torch.float32]))
def test_what_leaves_the_range_is_counted(dtype, rounding):
    base = torch.tensor([1.0, 65000.0, 3.39e38, 1.0, -3e38, 0.0], device=DEVICE)
    merged = torch.tensor([1.0, 3000.0, 3e36, torch.nan, -3e38, torch.inf], device=DEVICE)
    (expected, facts), (out, ours) = both(base, merged, dtype, rounding)
    assert same(out, expected)
    assert ours.non_finite.item() == facts.non_finite.item() == int((~expected.isfinite()).sum())
    assert ours.changed.item() == facts.changed.item()
    assert not math.isfinite(ours.merged_squares.item())


@pytest.mark.parametrize("shape", [(0,), (0, 5), (4, 0)], ids=str)
def test_an_empty_run_is_nothing(shape):
    for out, facts in both(*operands(shape), torch.bfloat16, "stochastic"):
        assert out.shape == shape
        assert [getattr(facts, fact).item() for fact in ("changed", "non_finite", "merged_squares")] == [0, 0, 0]


def test_views_are_applied_as_their_copies():
    base, merged = operands((60, 50))
    base, merged = base.mT, merged[:, ::2].repeat_interleave(2, 1).mT
    (expected, _), (out, _) = both(base, merged, torch.bfloat16, "stochastic")
    assert not base.is_contiguous()
    assert same(out, expected)
    assert same(
        expected, round_to((base + merged).contiguous(), torch.bfloat16, rounding="stochastic", first_index=0, **KEY)
    )


def test_unmeasured_facts_are_zero_but_the_range_is_still_watched():
    base, merged = operands((9,))
    merged[3] = torch.inf
    for out, facts in both(base, merged, torch.bfloat16, measure=False):
        assert out.isinf().sum() == 1
        assert facts.non_finite.item() == 1
        assert facts.changed.item() == facts.merged_squares.item() == facts.lost_squares.item() == 0


def test_facts_are_tensors_of_the_outputs_device():
    for _, facts in both(*operands((9,)), torch.float16):
        for fact, dtype in (("changed", torch.int64), ("non_finite", torch.int64), ("lost_squares", torch.float64)):
            assert getattr(facts, fact).shape == ()
            assert getattr(facts, fact).dtype == dtype
            assert getattr(facts, fact).device.type == DEVICE


def test_keys_are_passed_as_words_of_either_sign():
    # two names whose words differ in their top bit: int32 holds both
    words = {word >> 31 for name in "abcdefgh" for word in key(0, name)}
    assert words == {0, 1}
    base, merged = operands((300,))
    for name in "abcdefgh":
        outs = []
        for module in (apply, apply_triton):
            out = torch.empty_like(base)
            module.apply_(base, merged.clone(), out, rounding="stochastic", seed=0, name=name, first_index=0)
            outs.append(out)
        assert same(*outs)
