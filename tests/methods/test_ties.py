import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.delta import TensorDeltas
from streammerge.methods.task_arithmetic import task_arithmetic
from streammerge.methods.ties import ties
from streammerge.solve.panels import PANEL
from tests.blocks import described, merged_by_blocks, model_merged_by_blocks
from tests.kernels.devices import DEVICE

WIDE = torch.tensor([[[2.0, 0, 0], [0, 1, 0]], [[0, 1, 0], [1, 0, 1]]])
TALL = torch.tensor([[[1.0, 2], [3, 4], [5, 6]], [[2, -1], [0, 1], [1, 1]], [[0, 1], [1, 0], [-1, 2]]])
YADAV = {"trim": "model", "keep": "threshold", "cancelled": "majority"}
ACTMAT = {"cancelled": "none"}


def merged(changes, block=1 << 30, **parameters):
    """TIES of changes [t, *shape] from a base of zeros."""
    return merged_by_blocks(ties, torch.zeros_like(changes[0]), list(changes), block, **parameters)


def coarse(count, shape, seed=0, dtype=torch.float32):
    """Changes with many equal magnitudes, many zeros, and sums that are exact: votes cancel."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, *shape, generator=generator) * 3).round().to(dtype) / 64


def trimmed(change, kept):
    """The `kept` largest by a stable sort: the first of equals."""
    order = torch.sort(change.flatten().abs(), descending=True, stable=True).indices
    mask = torch.zeros(change.numel(), dtype=torch.bool)
    mask[order[:kept]] = True
    return change * mask.view(change.shape)


def elected(changes, weights, zero=1.0, normalize=True):
    """The vote and the merge of what agrees, in float64."""
    products = torch.stack([w * c.double() for w, c in zip(weights, changes, strict=True)])
    vote = products.sum(0)
    sign = torch.where(vote == 0, float(zero), vote.sign())
    agrees = (products.sign() == sign) & (products != 0)
    total = (products * agrees).sum(0)
    divisor = (torch.tensor(weights).double().view(-1, *[1] * (changes[0].ndim)) * agrees).sum(0)
    return total / torch.where(divisor == 0, 1.0, divisor) if normalize else total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("block", [1, 2, 1 << 20])
@pytest.mark.parametrize(
    ("changes", "parameters", "expected"),
    [
        (WIDE, {"density": 0.5}, [[2, 1, 0], [1, 1, 1]]),
        (WIDE, {"density": 0.2, **ACTMAT}, [[2, 1, 0], [0, 0, 0]]),
        (TALL, {"density": 0.5}, [[2, 1], [1, 2.5], [5, 4]]),
        (torch.tensor([[2.0, 1], [-3, 4]]), ACTMAT, [-3, 2.5]),
        (torch.tensor([[0.1, 5, 0.2, 4], [6, 0.3, 7, 0.4]]), {"density": 0.5, **ACTMAT}, [6, 5, 7, 4]),
        (torch.tensor([[0.1, 5], [0.2, 6]]), {"density": 0.5, **ACTMAT}, [0, 5.5]),
    ],
    ids=["wide", "wide-actmat", "tall", "all-kept", "disjoint", "half"],
)
def test_ties_reaches_the_worked_examples(changes, parameters, expected, block, dtype):
    result = merged(changes.to(dtype), block, **parameters)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), torch.tensor(expected).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -2.0, 4.0]], ids=str)
@pytest.mark.parametrize("normalize", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize(("cancelled", "zero"), [("plus", 1.0), ("none", 0.0)])
def test_ties_trims_votes_and_merges_what_agrees(weights, normalize, cancelled, zero, dtype):
    changes = coarse(3, (11, 13), dtype=dtype)
    densities = [0.3, 0.75, 1.0]
    kept = [trimmed(c, int(d * c.numel())) for c, d in zip(changes, densities, strict=True)]
    reference = 0.5 * elected(kept, weights, zero, normalize)
    result = merged(changes, weight=weights, density=densities, normalize=normalize, cancelled=cancelled, lambda_=0.5)
    torch.testing.assert_close(result.double(), reference, atol=1e-6, rtol=0)


@pytest.mark.parametrize("parameters", [{}, YADAV, {"cancelled": "majority"}], ids=["defaults", "yadav", "majority"])
@given(block=st.integers(1, 200), seed=st.integers(0, 1000), backwards=st.booleans())
@settings(max_examples=15, deadline=None)
def test_the_bits_depend_neither_on_the_cut_nor_on_the_order_of_blocks(parameters, block, seed, backwards):
    changes = coarse(3, (12, 16), seed)
    whole = merged(changes, density=[0.2, 0.5, 0.9], **parameters)
    cut = merged(changes, block, density=[0.2, 0.5, 0.9], backwards=backwards, **parameters)
    assert torch.equal(cut, whole)


@pytest.mark.parametrize("parameters", [{"density": 0.3}, {"density": 0.3, **YADAV}], ids=["defaults", "yadav"])
def test_a_device_gives_the_cpus_bits(parameters):
    changes = coarse(3, (64, 130))
    there = merged(changes.to(DEVICE), 5000, **parameters)
    assert there.device.type == DEVICE
    assert torch.equal(there.cpu(), merged(changes, **parameters))


def yadav(tensors, density):
    """The published algorithm in float64: one vector per expert, a threshold, the majority's sign."""
    flat = torch.stack([torch.cat([t.flatten() for t in expert]) for expert in tensors]).double()
    size = flat.shape[1]
    threshold = flat.abs().kthvalue(size - int(size * density), dim=1, keepdim=True).values
    flat = flat * (flat.abs() >= threshold)
    sign = flat.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    agrees = torch.where(sign > 0, flat > 0, flat < 0)
    return (flat * agrees).sum(0) / agrees.sum(0).clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.7])
@pytest.mark.parametrize("block", [50, 1 << 20])
def test_the_papers_variant_trims_the_whole_model(density, block, dtype):
    shapes = {"first": (9, 20), "second": (31,), "third": (2, 3, 5)}
    # the last tensor changed most: of small shares it keeps nearly all, the first nearly nothing
    experts = [
        {name: coarse(1, shape, 7 * t + k, dtype)[0] * (k + 1) for k, (name, shape) in enumerate(shapes.items())}
        for t in range(3)
    ]
    base = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    result = model_merged_by_blocks(ties, base, experts, block, density=density, backwards=True, **YADAV)
    reference = yadav([expert.values() for expert in experts], density)
    torch.testing.assert_close(torch.cat([t.flatten() for t in result.values()]).double(), reference, atol=1e-6, rtol=0)


def test_a_trim_of_the_model_by_count_keeps_exactly_that_many_in_all():
    tensors = {"a": coarse(1, (40,), 1)[0], "b": coarse(1, (60,), 2)[0]}
    result = model_merged_by_blocks(
        ties, {name: torch.zeros_like(t) for name, t in tensors.items()}, [tensors], 7, density=0.3, trim="model"
    )
    expected = trimmed(torch.cat(list(tensors.values())), 30)
    assert torch.equal(torch.cat([result["a"], result["b"]]), expected)


def test_cancelled_votes_go_with_the_majority_and_with_nobody_where_that_is_even():
    changes = torch.tensor([[1.0, -1.0, -1.0, -2.0], [-1.0, -1.0, 3.0, -2.0]])
    assert merged(changes, cancelled="majority").tolist() == [-1.0, -1.0, 3.0, -2.0]
    assert merged(changes, cancelled="plus").tolist() == [1.0, -1.0, 3.0, -2.0]
    assert merged(changes[:, :3], cancelled="majority").tolist() == [0.0, -1.0, 3.0]


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_ties_of_one_expert_or_of_its_copies_is_that_expert_trimmed(density):
    change = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    for copies in (1, 2, 4):
        result = merged(change.expand(copies, 9, 8), density=density)
        assert torch.equal(result, trimmed(change, int(72 * density)))
    assert torch.equal(merged(change[None], density=density), change) == (density == 1.0)


def test_ties_of_one_expert_at_full_density_is_that_expert_bit_for_bit():
    base = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expert = (base.float() * 1.01).bfloat16()
    assert torch.equal((base.float() + merged_by_blocks(ties, base, [expert], 1000)).bfloat16(), expert)


def test_ties_does_not_depend_on_the_order_of_the_experts():
    changes = torch.randn(3, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    a, b = merged(changes, density=0.5), merged(changes[[2, 0, 1]], density=0.5)
    torch.testing.assert_close(a, b, atol=1e-14, rtol=0)


@given(exponent=st.integers(-30, 30), seed=st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_ties_scales_with_the_changes(exponent, seed):
    changes = coarse(3, (6, 5), seed)
    assert torch.equal(merged(changes * 2.0**exponent, density=0.5), merged(changes, density=0.5) * 2.0**exponent)


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_ties_does_not_turn_with_its_inputs_or_outputs(density):
    changes = torch.randn(3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (6, 5))
    plain = merged(changes, density=density)
    for turned, after in ((left @ changes, left @ plain), (changes @ right, plain @ right)):
        assert (merged(turned, density=density) - after).norm() > 0.05 * plain.norm()


@pytest.mark.parametrize("parameters", [{"density": 0.5}, {"density": 0.5, **YADAV}], ids=["defaults", "yadav"])
def test_an_expert_that_changed_nothing_is_ignored(parameters):
    changes = coarse(3, (6, 5))
    idle = torch.zeros(1, 6, 5)
    with_idle = torch.cat([idle, changes[:2], idle, changes[2:]])
    assert torch.equal(merged(with_idle, **parameters), merged(changes, **parameters))


def test_where_no_expert_changed_anything_nothing_is_merged():
    for parameters in ({}, YADAV, ACTMAT):
        assert not merged(torch.zeros(2, 3, 4), density=0.2, **parameters).any()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3, 1)], ids=str)
def test_of_a_small_tensor_one_entry_at_least_is_kept(shape):
    change = torch.full((1, *shape), 0.25)
    result = merged(change, density=0.2)
    assert result.shape == shape
    assert torch.count_nonzero(result) == 1
    assert not merged(change, density=0.0).any()


def test_sums_without_trim_or_conflict_are_task_arithmetic():
    changes = coarse(3, (6, 5)).abs()
    weights = [0.5, 2.0, 0.25]
    deltas = TensorDeltas(torch.zeros(6, 5), list(changes))
    assert torch.equal(merged(changes, weight=weights, normalize=False), task_arithmetic(deltas, weight=weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_what_is_left_of_an_expert_keeps_its_sum_of_magnitudes_in_the_vote_too(dtype):
    # by hand: 4 and -3 of a sum of 8 are left, times 8/7; of the second 4 and 1 of 5, times 1
    changes = torch.tensor([[4.0, -3, 1, 0], [-4, 0, 0, 1]], dtype=dtype)
    result = merged(changes, density=0.5, rescale=True)
    torch.testing.assert_close(result, torch.tensor([32 / 7, -24 / 7, 0, 1], dtype=dtype), atol=1e-6, rtol=0)
    # without it the votes on the first entry cancel, and are 4 all the same
    assert merged(changes, density=0.5).tolist() == [4, -3, 0, 1]
    assert merged(changes, density=0.5, cancelled="none").tolist() == [0, -3, 0, 1]
    result = merged(changes, density=0.5, cancelled="none", rescale=True)
    torch.testing.assert_close(result, torch.tensor([32 / 7, -24 / 7, 0, 1], dtype=dtype), atol=1e-6, rtol=0)


def test_each_experts_trim_is_rescaled_by_itself_and_one_that_keeps_all_or_nothing_is_not():
    changes = torch.randn(3, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    left = [trimmed(changes[0], 57), changes[1], torch.zeros(12, 16)]
    left[0] = left[0] * changes[0].abs().sum() / left[0].abs().sum()
    weights = [0.5, -2.0, 4.0]
    result = merged(changes, weight=weights, density=[0.3, 1.0, 0.0], rescale=True)
    torch.testing.assert_close(result, elected(left, weights), atol=1e-12, rtol=0)
    zeros = torch.zeros(2, 3, 4)
    assert not merged(zeros, density=0.2, rescale=True).any()
    assert torch.equal(merged(changes, rescale=True), merged(changes))


@pytest.mark.parametrize("parameters", [{}, YADAV], ids=["defaults", "yadav"])
@given(panels=st.integers(1, 4), seed=st.integers(0, 1000), backwards=st.booleans())
@settings(max_examples=5, deadline=None)
def test_rescaled_the_bits_do_not_depend_on_the_cut(parameters, panels, seed, backwards):
    generator = torch.Generator().manual_seed(seed)
    models = [{n: torch.randn(s, 150, generator=generator) for n, s in (("a", 170), ("b", 3))} for _ in range(2)]
    base = {name: torch.zeros_like(tensor) for name, tensor in models[0].items()}
    options = {"density": [0.2, 0.7], "rescale": True, **parameters}
    whole = model_merged_by_blocks(ties, base, models, 1 << 30, **options)
    cut = model_merged_by_blocks(ties, base, models, panels * PANEL, backwards=backwards, **options)
    assert all(torch.equal(cut[name], whole[name]) for name in base)


@pytest.mark.parametrize("backwards", [False, True])
def test_where_the_whole_model_is_trimmed_each_tensor_keeps_its_own_sum_of_magnitudes(backwards):
    # of the model's five entries the two largest are left, one of them in each of two tensors, and none of the third
    tensors = {"a": torch.tensor([8.0, 2.0]), "b": torch.tensor([-6.0, 1.0]), "c": torch.tensor([3.0])}
    base = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    options = {"density": 0.4, "trim": "model", "rescale": True, "backwards": backwards}
    result = model_merged_by_blocks(ties, base, [tensors], PANEL, **options)
    assert {name: tensor.tolist() for name, tensor in result.items()} == {"a": [10, 0], "b": [-7, 0], "c": [0]}


def test_the_majority_is_that_of_the_rescaled_changes():
    # of the first only 3 is left, of a sum of 6: on the first entry it loses to -4, and wins rescaled
    changes = torch.tensor([[3.0, 0, 1, 1, 1, 0], [-4, -1, 0, 0, 0, 0], [0, 0, 0, 0, -2, 2]])
    options = {"density": [0.17, 1.0, 1.0], "cancelled": "majority"}
    for rescale, majority in ((False, -1.0), (True, 0.0)):
        deltas = TensorDeltas(torch.zeros(6), list(changes))
        described(ties).merge(deltas, rescale=rescale, **options)
        assert deltas.seen.majority == majority


@pytest.mark.parametrize(
    ("parameters", "looks", "scope"),
    [
        ({}, 0, "tensor"),
        ({"density": 0.2}, 3, "tensor"),
        ({"density": [1.0, 0.2], "keep": "threshold"}, 2, "tensor"),
        ({"density": 0.2, **YADAV}, 3, "model"),
        ({"cancelled": "majority"}, 1, "tensor"),
        ({"rescale": True}, 0, "tensor"),
        ({"rescale": True, "density": 0.2}, 4, "tensor"),
        ({"rescale": True, "density": [1.0, 0.2], "keep": "threshold"}, 3, "tensor"),
        ({"rescale": True, "density": 0.2, **YADAV}, 4, "model"),
        ({"rescale": True, "cancelled": "majority"}, 1, "tensor"),
    ],
)
def test_ties_reads_again_only_for_what_it_must_know(parameters, looks, scope):
    cost = described(ties).cost((4, 4), 2, parameters, 4)
    assert (cost.passes, cost.looks, cost.look_scope) == (1, looks, scope)


def test_trimming_without_a_look_is_a_mistake():
    with pytest.raises(AssertionError, match="takes a look"):
        ties(TensorDeltas(torch.zeros(3), [torch.ones(3)]), density=0.5)
