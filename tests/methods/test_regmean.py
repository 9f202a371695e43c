import pytest
import torch

from streammerge.delta import TensorDeltas
from streammerge.errors import MergeError
from streammerge.methods.regmean import regmean
from streammerge.solve.cost_covariance import regmean as price
from tests.solve.changes import CountingDeltas, experts, relative_error

SHAPES = [(5, 21), (40, 12), (16, 16)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_solver = pytest.mark.parametrize("solver", ["exact", "ridge", "pinv"])


def random(count, shape, seed=0):
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariances(count, columns, samples=200, seed=1):
    inputs = random(count, (samples, columns), seed) * torch.logspace(0, -1, columns, dtype=torch.float64)
    return list(inputs.mT @ inputs)


def merged(changes, beside, base=None, **parameters):
    base = torch.zeros_like(changes[0]) if base is None else base
    return regmean(TensorDeltas(base, [base + each for each in changes], beside=beside), **parameters)


def by_definition(weights, grams, reduce=1.0, scales=None):
    """(Σ W_t G_t)(Σ G_t)⁻¹ of whole weights."""
    grams = [reduce * g + (1 - reduce) * g.diagonal().diag() for g in grams]
    grams = [g * s for g, s in zip(grams, scales or [1.0] * len(grams), strict=True)]
    target = sum(w @ g for w, g in zip(weights, grams, strict=True))
    return torch.linalg.solve(sum(grams), target, left=False)


def test_regmean_by_hand():
    # inputs along one axis each: every expert keeps the column that only it saw, and half of the one both saw
    changes = torch.tensor([[[1.0, 2.0, 3.0]], [[10.0, 20.0, 30.0]]]).double()
    beside = [torch.diag(torch.tensor([4.0, 0.0, 1.0])), torch.diag(torch.tensor([0.0, 9.0, 1.0]))]
    for solver in ("exact", "pinv"):
        torch.testing.assert_close(merged(changes, beside, solver=solver), torch.tensor([[1.0, 20.0, 16.5]]).double())


@every_shape
@pytest.mark.parametrize("reduce", [1.0, 0.9, 0.1, 0.0])
@pytest.mark.parametrize("scales", [None, [1.0, 2.0, 0.0]])
def test_regmean_of_changes_is_the_definition_of_whole_weights(shape, reduce, scales):
    base, changes, beside = random(1, shape, 7)[0], random(3, shape), covariances(3, shape[1])
    truth = by_definition([base + each for each in changes], beside, reduce, scales) - base
    result = merged(changes, beside, base, reduce=reduce, weight=scales or 1.0)
    assert relative_error(result, truth) < 1e-9
    # exact to rounding of the weights themselves, which the changes keep better
    narrow = merged(changes.float(), [g.float() for g in beside], reduce=reduce, weight=scales or 1.0)
    assert relative_error(narrow, truth) < 1e-3


@every_shape
def test_a_ridge_pulls_towards_the_weighted_mean(shape):
    changes, beside, scales = random(3, shape), covariances(3, shape[1]), [1.0, 3.0, 0.5]
    total = sum(s * g for s, g in zip(scales, beside, strict=True))
    amount = 0.2 * total.trace() / shape[1]
    eye = torch.eye(shape[1], dtype=torch.float64)
    shifted = [s * g + amount * s / 4.5 * eye for s, g in zip(scales, beside, strict=True)]
    truth = by_definition(changes, shifted)
    result = merged(changes, beside, solver="ridge", ridge=0.2, weight=scales, reduce=1.0)
    assert relative_error(result, truth) < 1e-9
    strong = merged(changes, beside, solver="ridge", ridge=1e9, weight=scales)
    mean = sum(s * c for s, c in zip(scales, changes, strict=True)) / 4.5
    assert relative_error(strong, mean) < 1e-7


@every_shape
@every_solver
def test_one_expert_and_equal_ones_come_back(shape, solver):
    base, (expert,) = experts("sft", *shape, 1)
    for copies in (1, 3):
        beside = covariances(copies, shape[1])
        delta = regmean(TensorDeltas(base, [expert] * copies, beside=beside), solver=solver)
        if solver == "pinv":
            assert relative_error(delta, expert.float() - base.float()) < 1e-5
        else:
            assert torch.equal((base.float() + delta).bfloat16(), expert)


@every_solver
def test_the_order_of_the_experts_does_not_matter(solver):
    changes, beside = random(3, (9, 7)), covariances(3, 7)
    turned = merged(changes[[2, 0, 1]], [beside[2], beside[0], beside[1]], solver=solver)
    assert relative_error(turned, merged(changes, beside, solver=solver)) < 1e-10


@every_solver
@pytest.mark.parametrize("factor", [1e-12, 3.0, 1e12])
def test_only_ratios_of_the_covariances_matter(solver, factor):
    changes, beside = random(3, (9, 7)), covariances(3, 7)
    plain = merged(changes, beside, solver=solver)
    assert relative_error(merged(changes, [g * factor for g in beside], solver=solver), plain) < 1e-9
    assert relative_error(merged(changes * factor, beside, solver=solver) / factor, plain) < 1e-9
    one = merged(changes, [beside[0] * 3.0, *beside[1:]], solver=solver)
    assert relative_error(one, plain) > 1e-2


def test_rows_are_merged_each_by_itself():
    changes, beside = random(3, (9, 7)), covariances(3, 7)
    assert relative_error(merged(changes[:, 2:5], beside), merged(changes, beside)[2:5]) < 1e-10


def test_regmean_follows_a_change_of_the_inputs_basis():
    changes, beside, mixing = random(3, (9, 7)), covariances(3, 7), random(1, (7, 7), 5)[0]
    # inputs turn the other way than weights do
    moved = [torch.linalg.solve(mixing, torch.linalg.solve(mixing, g).mT) for g in beside]
    result = merged(changes @ mixing, moved, reduce=1.0)
    assert relative_error(result, merged(changes, beside, reduce=1.0) @ mixing) < 1e-8
    # the diagonal is of one basis
    reduced = merged(changes @ mixing, moved, reduce=0.5)
    assert relative_error(reduced, merged(changes, beside, reduce=0.5) @ mixing) > 1e-3


def test_white_covariances_give_the_mean_and_diagonal_ones_a_mean_of_each_column():
    changes = random(3, (9, 7))
    eye = torch.eye(7, dtype=torch.float64)
    assert relative_error(merged(changes, [eye] * 3), changes.mean(0)) < 1e-12
    diagonals = random(3, (7,), 4).square()
    expected = (changes * diagonals[:, None]).sum(0) / diagonals.sum(0)
    assert relative_error(merged(changes, covariances_of(diagonals), reduce=0.0), expected) < 1e-10


def covariances_of(diagonals):
    off = torch.full((7, 7), 0.1, dtype=torch.float64).fill_diagonal_(0)
    return [diagonal.diag() + off for diagonal in diagonals]


@every_solver
def test_an_expert_that_changed_nothing_counts_on_the_inputs_it_saw(solver):
    changes = torch.stack([random(1, (9, 7))[0], torch.zeros(9, 7).double()])
    beside = covariances(2, 7)
    truth = by_definition(changes, beside, 0.9)
    assert relative_error(merged(changes, beside, solver=solver, ridge=1e-6), truth) < 1e-4
    assert relative_error(merged(changes.flip(0), beside[::-1], solver=solver, ridge=1e-6), truth) < 1e-4


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_an_input_that_no_expert_saw_keeps_the_mean_s_weights(solver, dtype):
    changes, beside = random(3, (9, 7)).to(dtype), covariances(3, 7)
    for gram in beside:
        gram[3] = gram[:, 3] = 0
    result = merged(changes, beside, solver=solver)
    expected = torch.zeros(9, dtype=dtype) if solver == "pinv" else changes[:, :, 3].mean(0)
    torch.testing.assert_close(result[:, 3], expected, atol=1e-6, rtol=0)
    unseen = merged(changes, [torch.zeros(7, 7)] * 3, solver=solver)
    expected = torch.zeros(9, 7, dtype=dtype) if solver == "pinv" else changes.mean(0)
    torch.testing.assert_close(unseen, expected, atol=1e-6, rtol=0)


@every_solver
def test_where_no_expert_changed_anything_the_delta_is_exactly_zero(solver):
    deltas = TensorDeltas(torch.ones(9, 7), [torch.ones(9, 7)] * 2, beside=covariances(2, 7))
    assert not regmean(deltas, solver=solver).any()


def test_where_a_covariance_may_be_missing_its_tensor_is_averaged():
    changes, (gram, _) = random(2, (9, 7)), covariances(2, 7)
    for beside in (None, [gram, None]):
        assert relative_error(merged(changes, beside, missing="mean"), changes.mean(0)) < 1e-12
    weighted = merged(changes, [gram, None], missing="mean", weight=[3.0, 1.0])
    assert relative_error(weighted, 0.75 * changes[0] + 0.25 * changes[1]) < 1e-12


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda g: g.index_fill(0, torch.tensor([2]), torch.nan), "expert 1 has an entry that is not finite"),
        (lambda g: -g, "or a negative one on its diagonal"),
    ],
)
def test_a_damaged_covariance_is_refused(damage, message):
    changes, beside = random(2, (9, 7)), covariances(2, 7)
    with pytest.raises(MergeError, match=message) as raised:
        merged(changes, [beside[0], damage(beside[1])])
    assert raised.value.hint


@every_solver
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (40, 300), (300, 40), (1, 7), (7, 1)], ids=str)
def test_regmean_takes_no_more_workspace_and_passes_than_priced(shape, solver):
    base, changed = experts("sft", *shape, 3)
    for dtype in (torch.bfloat16, torch.float64):
        beside = [g.float() for g in covariances(3, shape[1])]
        deltas = CountingDeltas(base.to(dtype), [e.to(dtype) for e in changed], beside=beside)
        regmean(deltas, solver=solver)
        priced = price(shape, 3, {"solver": solver}, deltas.dtype.itemsize)
        assert deltas.taken <= priced.workspace_bytes - (8 << 20)
        if deltas.facts["escalation"] == "none":
            assert deltas.passes <= priced.passes
