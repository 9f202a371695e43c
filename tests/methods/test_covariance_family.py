"""WUDI, SWUDI, ASWUDI, TACT and ACTMat's further settings: worked examples, what holds of each, what does not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.delta import TensorDeltas
from streammerge.methods.actmat import actmat
from streammerge.methods.aswudi import aswudi
from streammerge.methods.swudi import swudi
from streammerge.methods.tact import tact
from streammerge.methods.wudi import wudi
from streammerge.solve import cost_covariance
from tests.solve.changes import CountingDeltas, experts, relative_error
from tests.solve.family import reference

WIDE = torch.tensor([[[2.0, 0, 0], [0, 1, 0]], [[0, 1, 0], [1, 0, 1]]], dtype=torch.float64)
TALL = torch.tensor([[[1.0, 2], [3, 4], [5, 6]], [[2, -1], [0, 1], [1, 1]], [[0, 1], [1, 0], [-1, 2]]]).double()
SHAPES = [(5, 21), (40, 12), (16, 16)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)

CLOSED = {
    "wudi": (wudi, {"solver": "exact"}),
    "wudi-ridge": (wudi, {}),
    "swudi": (swudi, {}),
    "aswudi": (aswudi, {}),
    "tact": (tact, {}),
    "actmat-p": (actmat, {"solver": "exact", "weight_exponent": 1.0}),
    "actmat-base": (actmat, {"anchor": "base"}),
    "actmat-sum": (actmat, {"anchor": "sum"}),
    "actmat-top_k": (actmat, {"solver": "top_k"}),
    "actmat-flow": (actmat, {"solver": "flow"}),
}


def every(*names):
    return pytest.mark.parametrize(
        ("method", "options"), [CLOSED[name] for name in names or CLOSED], ids=names or CLOSED
    )


def merged(method, changes, **parameters):
    """The method on changes [t, out, in] from a base of zeros."""
    return method(TensorDeltas(torch.zeros_like(changes[0]), list(changes)), **parameters)


def random(count, shape, seed=0):
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(size, seed=9):
    return torch.linalg.qr(random(1, (size, size), seed=seed)[0])[0]


@pytest.mark.parametrize(
    ("method", "changes", "parameters", "expected"),
    [
        (actmat, WIDE, {"solver": "exact", "weight_exponent": 1.0}, [[2, 0.625, -2], [0, 0.375, 2]]),
        (actmat, WIDE, {"solver": "exact", "weight_exponent": 0.5}, [[2, 0.563508, -2], [0, 0.436492, 2]]),
        (actmat, WIDE, {"solver": "pinv", "weight_exponent": 1.0}, [[2, 0.625, -2], [0, 0.375, 2]]),
        (
            actmat,
            WIDE,
            {"ridge": 0.01, "anchor": "base"},
            [[1.974022, 0.493421, -1.922748], [0.012818, 0.493421, 1.935567]],
        ),
        (actmat, WIDE, {"ridge": 0.01, "anchor": "mean"}, [[1.980602, 0.5, -1.929157], [0.012904, 0.5, 1.94847]]),
        (
            actmat,
            WIDE,
            {"ridge": 0.01, "anchor": "sum"},
            [[1.987182, 0.506579, -1.935567], [0.012989, 0.506579, 1.961374]],
        ),
        (wudi, WIDE, {"solver": "exact"}, [[2, 0.625, -2], [0, 0.375, 2]]),
        (wudi, TALL, {"solver": "exact"}, [[1.829338, 0.979891], [2.381744, 2.245582], [3.190017, 4.600265]]),
        (
            actmat,
            TALL,
            {"solver": "exact", "weight_exponent": 1.0},
            [[1.829338, 0.979891], [2.381744, 2.245582], [3.190017, 4.600265]],
        ),
        # F_1 = [3, 0], F_2 = [0, 2]: C_1 = diag(9, 0), C_2 = diag(0, 4), N = [27, 0] + [0, 8]
        (tact, torch.tensor([[[3.0, 1.0]], [[1.0, 2.0]]]).double(), {"solver": "pinv", "density": 0.5}, [[3.0, 2.0]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_the_family_reaches_the_worked_examples(method, changes, parameters, expected, dtype):
    result = merged(method, changes.to(dtype), **parameters)
    torch.testing.assert_close(result.double(), torch.tensor(expected).double(), atol=2e-6, rtol=0)


def test_swudi_and_aswudi_by_hand():
    # orthogonal inputs: both eigenvalues of diag(1, 0) + diag(0, 1) are 1
    changes = torch.tensor([[[3.0, 0.0]], [[0.0, 2.0]]]).double()
    start = torch.tensor([[3.0, 2.0]]).double()
    for method in (swudi, aswudi):
        torch.testing.assert_close(merged(method, changes), start, atol=1e-12, rtol=0)
    # from nothing, for a time: each covariance has trace one, so f = 1 - exp(-time)
    partly = merged(swudi, changes, anchor="base", time=0.5, top_k=1.0)
    torch.testing.assert_close(partly, start * (1 - torch.tensor(-0.5).double().exp()), atol=1e-12, rtol=0)
    # λ = 1.5 and 0.5: the participation ratio (√1.5 + √.5)² / 2 = 1.87 keeps both, a share of 0.5 one
    changes = torch.tensor([[[1.0, 0.0]], [[2.0, 2.0]]]).double()
    both = merged(aswudi, changes, anchor="base")
    torch.testing.assert_close(both, merged(wudi, changes, solver="exact"), atol=1e-12, rtol=0)
    truth = reference(changes, solver="top_k", top_k=0.5, anchor="sum", weight_exponent=1.0)
    torch.testing.assert_close(merged(aswudi, changes, top_k=0.5), truth, atol=1e-12, rtol=0)


@every("wudi", "swudi", "aswudi", "actmat-p", "actmat-sum", "actmat-top_k", "actmat-flow", "wudi-ridge")
@every_shape
def test_one_expert_comes_back_bit_for_bit(shape, method, options):
    base, (expert,) = experts("sft", *shape, 1)
    delta = method(TensorDeltas(base, [expert, base.clone()]), **options)
    assert torch.equal((base.float() + delta).bfloat16(), expert)


def test_one_expert_does_not_come_back_from_base_anchored_or_trimmed_merges():
    change = random(1, (16, 12))
    assert relative_error(merged(actmat, change, anchor="base"), change[0]) > 0.01
    # a trimmed wide matrix does not span what it changed; the mean, where it is the anchor, keeps the rest
    change = random(1, (4, 30))
    assert relative_error(merged(tact, change, solver="pinv", density=0.2), change[0]) > 0.1
    for solver in ("ridge", "exact", "top_k", "flow"):
        assert relative_error(merged(tact, change, solver=solver, density=0.2), change[0]) < 1e-9


@every("wudi", "actmat-p", "actmat-top_k", "actmat-flow")
@every_shape
def test_identical_experts_come_back_where_the_mean_anchors(shape, method, options):
    change = random(1, shape)
    assert torch.equal(merged(method, change.expand(3, -1, -1), **options), change[0])


@every("actmat-sum", "swudi", "aswudi", "wudi-ridge", "actmat-base")
def test_identical_experts_do_not_come_back_where_the_sum_or_the_base_anchors(method, options):
    change = random(1, (16, 12))
    assert relative_error(merged(method, change.expand(3, -1, -1), **options), change[0]) > 1e-3


@every()
@every_shape
def test_the_order_of_the_experts_does_not_matter(shape, method, options):
    changes = random(3, shape)
    assert relative_error(merged(method, changes[[2, 0, 1]], **options), merged(method, changes, **options)) < 1e-10


@every()
@every_shape
@given(factor=st.floats(1e-6, 1e6), seed=st.integers(0, 2**20))
@settings(max_examples=5, deadline=None)
def test_the_closed_forms_scale_with_the_deltas(shape, method, options, factor, seed):
    changes = random(3, shape, seed)
    result = merged(method, changes * factor, **options) / factor
    assert relative_error(result, merged(method, changes, **options)) < 1e-8


@every(*(name for name in CLOSED if name != "tact"))
@every_shape
def test_the_closed_forms_turn_with_outputs_and_inputs(shape, method, options):
    changes = random(3, shape)
    left, right = orthogonal(shape[0]), orthogonal(shape[1])
    turned = merged(method, left @ changes @ right, **options)
    assert relative_error(turned, left @ merged(method, changes, **options) @ right) < 1e-9


@pytest.mark.parametrize("side", ["left", "right"])
def test_trimming_does_not_turn(side):
    changes, turn = random(3, (16, 16)), orthogonal(16)
    turned = merged(tact, turn @ changes if side == "left" else changes @ turn)
    expected = turn @ merged(tact, changes) if side == "left" else merged(tact, changes) @ turn
    assert relative_error(turned, expected) > 1e-3


@every()
@every_shape
def test_experts_that_changed_nothing_are_ignored(shape, method, options):
    changes = random(3, shape)
    with_idle = torch.cat([torch.zeros(1, *shape), changes[:2], torch.zeros(2, *shape), changes[2:]])
    assert relative_error(merged(method, with_idle, **options), merged(method, changes, **options)) < 1e-10


@every()
@every_shape
def test_where_no_expert_changed_anything_the_delta_is_exactly_zero(shape, method, options):
    assert not method(TensorDeltas(torch.ones(shape), [torch.ones(shape)] * 3), **options).any()


@every_shape
def test_a_duplicate_counts_twice(shape):
    changes = random(2, shape)
    doubled = merged(wudi, changes[[0, 0, 1]], solver="exact")
    first, second = (change.mT @ change / change.norm() ** 2 for change in changes)
    target = 2 * changes[0] @ first + changes[1] @ second
    truth = target @ torch.linalg.pinv(2 * first + second, hermitian=True)
    assert relative_error(doubled, truth) < 1e-8


@every_shape
def test_one_norm_does_not_matter_to_wudi_and_dominates_actmat(shape):
    changes = random(3, shape)
    louder = changes.clone()
    louder[0] *= 1000
    cov = [merged(actmat, each, solver="ridge", ridge=0.01) for each in (changes, louder)]
    assert relative_error(cov[1] / 1000, changes[0]) < 0.1
    weighed = changes.mT @ changes / changes.flatten(1).norm(dim=1)[:, None, None] ** 2
    truth = (louder @ weighed).sum(0) @ torch.linalg.pinv(weighed.sum(0), hermitian=True)
    assert relative_error(merged(wudi, louder, solver="exact"), truth) < 1e-8
    assert cov[0].shape == shape


def test_wudi_of_orthogonal_inputs_is_the_sum():
    inputs = orthogonal(24)
    changes = torch.stack([random(1, (9, 8), t)[0] @ inputs[8 * t : 8 * t + 8] for t in range(3)])
    assert relative_error(merged(wudi, changes, solver="exact"), changes.sum(0)) < 1e-10


@pytest.mark.parametrize("shape", [(6, 9), (12, 5)], ids=str)
def test_iterations_are_the_paper_s_adam_on_the_paper_s_loss(shape):
    changes = random(3, shape) * 0.02
    way = changes.sum(0).clone().requires_grad_()
    adam = torch.optim.Adam([way], lr=1e-4)
    for _ in range(30):
        adam.zero_grad()
        sum(((way - d) @ d.mT).square().sum() / d.square().sum() for d in changes).backward()
        adam.step()
    result = merged(wudi, changes, iterations=30, learning_rate=1e-4)
    assert relative_error(result, way.detach()) < 1e-9
    narrow = merged(wudi, changes.float(), iterations=30, learning_rate=1e-4)
    assert relative_error(narrow, way.detach()) < 1e-3


def test_iterations_lower_the_loss_and_end_near_the_closed_form():
    changes = random(3, (12, 5)) * 1e-3
    loss = lambda m: sum(((m - d) @ d.mT).square().sum() / d.square().sum() for d in changes).item()  # noqa: E731
    losses = [loss(merged(wudi, changes, iterations=count)) for count in (1, 10, 100, 3000)]
    closed = loss(merged(wudi, changes, solver="exact"))
    assert losses == sorted(losses, reverse=True)
    assert closed <= losses[-1] <= closed * 1.01


@pytest.mark.parametrize("iterations", [0, 5])
def test_one_expert_is_a_fixed_point_of_wudi_whatever_the_zero_deltas(iterations):
    change = random(1, (6, 9))
    result = merged(wudi, torch.cat([change, torch.zeros(2, 6, 9)]), iterations=iterations)
    assert relative_error(result, change[0]) < 1e-12
    assert not merged(wudi, torch.zeros(2, 6, 9), iterations=iterations).any()


@every("wudi", "swudi", "aswudi")
def test_lambda_multiplies_the_merged_change(method, options):
    changes = random(2, (7, 9))
    torch.testing.assert_close(merged(method, changes, lambda_=0.5), merged(method, changes) * 0.5)


PRICES = {
    "wudi": (wudi, cost_covariance.wudi, {"solver": "exact"}),
    "wudi-ridge": (wudi, cost_covariance.wudi, {}),
    "wudi-adam": (wudi, cost_covariance.wudi, {"iterations": 2}),
    "swudi": (swudi, cost_covariance.swudi, {}),
    "aswudi": (aswudi, cost_covariance.aswudi, {"anchor": "base"}),
    "tact": (tact, cost_covariance.tact, {}),
    "tact-pinv": (tact, cost_covariance.tact, {"solver": "pinv", "center": True}),
}


@pytest.mark.parametrize(("method", "price", "options"), PRICES.values(), ids=PRICES)
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (40, 300), (300, 40), (1, 7), (7, 1)], ids=str)
def test_no_method_takes_more_workspace_than_priced(shape, method, price, options):
    base, changed = experts("sft", *shape, 4)
    for dtype in (torch.bfloat16, torch.float64):
        deltas = CountingDeltas(base.to(dtype), [e.to(dtype) for e in changed])
        method(deltas, **options)
        priced = price(shape, 4, options, deltas.dtype.itemsize)
        assert deltas.taken <= priced.workspace_bytes - (8 << 20)
        if deltas.facts.get("escalation", "none") == "none":
            assert deltas.passes <= priced.passes
