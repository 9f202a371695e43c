import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.delta import TensorDeltas
from streammerge.methods.actmat import actmat
from tests.solve.changes import experts as trained
from tests.solve.changes import relative_error

SOLVERS = ["ridge", "pinv", "exact"]
# a wide, a tall, a square matrix; the first is solved in the dual form
SHAPES = [(5, 21), (40, 12), (16, 16)]


def merged(changes, **parameters):
    """ACTMat of changes [t, out, in] from a base of zeros."""
    return actmat(TensorDeltas(torch.zeros_like(changes[0]), list(changes)), **parameters)


def random(count, shape, seed=0):
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(size):
    return torch.linalg.qr(random(1, (size, size), seed=9)[0])[0]


WIDE = torch.tensor([[[2.0, 0, 0], [0, 1, 0]], [[0, 1, 0], [1, 0, 1]]])
TALL = torch.tensor([[[1.0, 2], [3, 4], [5, 6]], [[2, -1], [0, 1], [1, 1]], [[0, 1], [1, 0], [-1, 2]]])


@pytest.mark.parametrize(
    ("changes", "parameters", "expected"),
    [
        (WIDE, {"solver": "exact"}, [[2, 0.5, -2], [0, 0.5, 2]]),
        (WIDE, {"solver": "pinv"}, [[2, 0.5, -2], [0, 0.5, 2]]),
        (WIDE, {"ridge": 0.01}, [[1.980602, 0.5, -1.929157], [0.012904, 0.5, 1.94847]]),
        (TALL, {"solver": "exact"}, [[2.037736, 1.132075], [3.387289, 3.408143], [4.566038, 5.981132]]),
        (TALL, {"solver": "pinv"}, [[2.037736, 1.132075], [3.387289, 3.408143], [4.566038, 5.981132]]),
    ],
    ids=["wide-exact", "wide-pinv", "wide-ridge", "tall-exact", "tall-pinv"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_actmat_reaches_the_worked_examples(changes, parameters, expected, dtype):
    result = merged(changes.to(dtype), **parameters)
    torch.testing.assert_close(result.double(), torch.tensor(expected).double(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("solver", ["ridge", "exact"])
@pytest.mark.parametrize("copies", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("kind", ["sft", "rl", "low_rank"])
def test_actmat_of_one_expert_or_of_its_copies_is_that_expert_bit_for_bit(kind, copies, solver):
    base, (expert,) = trained(kind, 48, 80, 1)
    delta = actmat(TensorDeltas(base, [expert] * copies), solver=solver)
    assert torch.equal((base.float() + delta).bfloat16(), expert)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_actmat_does_not_depend_on_the_order_of_the_experts(shape, solver):
    changes = random(3, shape)
    assert relative_error(merged(changes[[2, 0, 1]], solver=solver), merged(changes, solver=solver)) < 1e-11


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(factor=st.floats(1e-6, 1e6), seed=st.integers(0, 2**20))
@settings(max_examples=10, deadline=None)
def test_actmat_scales_with_the_deltas(shape, solver, factor, seed):
    changes = random(3, shape, seed)
    result = merged(changes * factor, solver=solver) / factor
    assert relative_error(result, merged(changes, solver=solver)) < 1e-9


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_actmat_turns_with_its_outputs_and_its_inputs(shape, solver):
    changes = random(3, shape)
    left, right = orthogonal(shape[0]), orthogonal(shape[1])
    turned = merged(left @ changes @ right, solver=solver)
    assert relative_error(turned, left @ merged(changes, solver=solver) @ right) < 1e-10


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_expert_that_changed_nothing_is_ignored(shape, solver):
    changes = random(3, shape).float()
    with_idle = torch.cat([torch.zeros(1, *shape), changes[:2], torch.zeros(2, *shape), changes[2:]])
    assert relative_error(merged(with_idle, solver=solver), merged(changes, solver=solver)) < 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_where_no_expert_changed_anything_the_delta_is_exactly_zero(shape, solver):
    deltas = TensorDeltas(torch.ones(shape), [torch.ones(shape)] * 3)
    assert not actmat(deltas, solver=solver).any()
    assert deltas.facts["solver"] == "none"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_actmat_satisfies_the_normal_equations(shape):
    changes = random(3, shape)
    covariances = changes.mT @ changes
    target = (changes @ covariances).sum(0)
    residual = merged(changes, solver="exact") @ covariances.sum(0) - target
    assert residual.norm() < 1e-12 * target.norm()


@pytest.mark.parametrize("solver", ["pinv", "exact"])
def test_actmat_of_changes_on_orthogonal_inputs_is_their_sum(solver):
    inputs = orthogonal(24)
    changes = torch.stack([random(1, (9, 8), t)[0] @ inputs[8 * t : 8 * t + 8] for t in range(3)])
    assert relative_error(merged(changes, solver=solver), changes.sum(0)) < 1e-11


@pytest.mark.parametrize("solver", SOLVERS)
def test_actmat_of_equal_covariances_is_the_mean(solver):
    change = random(1, (16, 10))[0]
    changes = torch.stack([change, orthogonal(16) @ change, -change])
    assert relative_error(merged(changes, solver=solver), changes.mean(0)) < 1e-11


def test_a_strong_ridge_gives_the_mean():
    changes = random(3, (16, 10))
    assert relative_error(merged(changes, ridge=1e9), changes.mean(0)) < 1e-8
