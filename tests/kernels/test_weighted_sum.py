import pytest
import torch

from streammerge_kernels import weighted_sum, weighted_sum_triton
from tests.kernels.devices import DEVICE

BOTH = [pytest.param(weighted_sum, id="reference"), pytest.param(weighted_sum_triton, id="twin")]
DTYPES = [
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float64, id="fp64"),
]
WEIGHTS = [0.3, -1.25, 1 / 3, 1.0]


def models(shape, experts, dtype=torch.bfloat16):
    torch.manual_seed(experts)
    base = torch.randn(shape, device=DEVICE) * 0.02
    moved = base + torch.randn(experts, *shape, device=DEVICE) * 1e-3
    return base.to(dtype), moved.to(dtype)


def exactly(base, experts, weights):
    """In float64, with weights as float32 has them where the sum is float32."""
    narrow = weighted_sum.result_dtype(base, experts) == torch.float32
    weights = torch.tensor(weights, dtype=torch.float32 if narrow else torch.float64, device=DEVICE).double()
    changes = [expert.double() - base.double() for expert in experts]
    return sum((w * change for w, change in zip(weights, changes, strict=True)), torch.zeros_like(base).double())


def poisoned(shape, dtype=torch.float32):
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(1,), (33, 65), (3, 700)], ids=str)
def test_the_twin_is_as_near_float64_as_torch(shape, experts, dtype):
    base, moved = models(shape, experts, dtype)
    truth = exactly(base, moved, WEIGHTS[:experts])
    out = poisoned(shape, weighted_sum.result_dtype(base, moved))
    weighted_sum_triton.weighted_sum(base, moved, WEIGHTS[:experts], out=out)
    error = (weighted_sum.weighted_sum(base, moved, WEIGHTS[:experts]).double() - truth).norm()
    assert (out.double() - truth).norm() <= 2 * error + 1e-7 * truth.norm() * (dtype != torch.float64)


def test_the_reference_adds_in_the_order_that_linear_had():
    base, moved = models((40, 70), 3)
    merged = torch.zeros(40, 70, device=DEVICE)
    for weight, expert in zip(WEIGHTS, moved, strict=False):
        merged.add_(expert.float().sub_(base.float()), alpha=weight)
    assert torch.equal(weighted_sum.weighted_sum(base, moved, WEIGHTS[:3]), merged)


@pytest.mark.parametrize("module", BOTH)
def test_one_expert_of_weight_one_is_its_change_exactly(module):
    base, moved = models((50, 31), 1)
    assert torch.equal(module.weighted_sum(base, moved, [1.0]), moved[0].float() - base.float())


@pytest.mark.parametrize("module", BOTH)
def test_a_sequence_of_other_dtypes_gives_what_each_would(module):
    base, _ = models((20, 30), 1)
    moved = [(base.float() + 1e-3 * (i + 1)).to(dtype) for i, dtype in enumerate((torch.float16, torch.float32))]
    truth = exactly(base, moved, WEIGHTS[:2])
    result = module.weighted_sum(base, moved, WEIGHTS[:2])
    assert result.dtype == torch.float32
    assert (result.double() - truth).norm() <= 3e-7 * truth.norm()


@pytest.mark.parametrize("module", BOTH)
def test_a_stack_gives_the_bits_of_its_sequence(module):
    base, moved = models((9, 100), 11)
    weights = [0.1 * (i + 1) for i in range(11)]
    stacked = module.weighted_sum(base, moved, weights)
    assert torch.equal(stacked, module.weighted_sum(base, list(moved), weights))


@pytest.mark.parametrize("module", BOTH)
def test_one_float64_operand_makes_the_sum_float64(module):
    base, moved = models((5, 8), 2, torch.float32)
    result = module.weighted_sum(base.double(), moved, [0.1, 0.2])
    truth = exactly(base.double(), moved, [0.1, 0.2])
    assert result.dtype == torch.float64
    assert (result - truth).norm() <= 1e-15 * truth.norm()


@pytest.mark.parametrize("module", BOTH)
@pytest.mark.parametrize("cut", ["transposed", "strided experts", "sliced stack"])
def test_views_are_summed_as_their_copies(cut, module):
    base, moved = models((24, 40), 4)
    if cut == "transposed":
        base, moved = base.mT, moved.mT
    elif cut == "strided experts":
        base, moved = base[:, ::3], moved[:, :, ::3]
    else:
        moved = moved[1::2]
    weights = WEIGHTS[: len(moved)]
    expected = module.weighted_sum(base.contiguous(), moved.contiguous(), weights)
    assert torch.equal(module.weighted_sum(base, moved, weights), expected)


@pytest.mark.parametrize("module", BOTH)
def test_no_experts_sum_to_zero_and_no_elements_to_nothing(module):
    base, moved = models((4, 5), 2)
    assert not module.weighted_sum(base, moved[:0], [], out=poisoned((4, 5))).any()
    assert not module.weighted_sum(base, [], []).any()
    assert module.weighted_sum(base[:0], moved[:, :0], [1.0, 2.0]).shape == (0, 5)


@pytest.mark.parametrize("module", BOTH)
def test_equal_models_sum_to_zero_exactly(module):
    base, _ = models((30, 30), 1)
    assert not module.weighted_sum(base, base.expand(3, 30, 30), WEIGHTS[:3]).any()


def test_long_tensors_are_summed_as_their_parts(monkeypatch):
    base, moved = models((1000,), 2)
    whole = weighted_sum.weighted_sum(base, moved, WEIGHTS[:2])
    monkeypatch.setattr(weighted_sum, "_CHUNK", 64)
    assert torch.equal(weighted_sum.weighted_sum(base, moved, WEIGHTS[:2]), whole)


@pytest.mark.parametrize("change", ["weights", "shape", "dtype"])
def test_operands_that_do_not_fit_are_refused(change):
    base, moved = models((4, 5), 2)
    weights, out = ([1.0], None) if change == "weights" else ([1.0, 1.0], None)
    if change == "shape":
        moved = moved[:, :3]
    if change == "dtype":
        out = torch.empty(4, 5, dtype=torch.float64, device=DEVICE)
    with pytest.raises(AssertionError):
        weighted_sum.weighted_sum(base, moved, weights, out=out)
