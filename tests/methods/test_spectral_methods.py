import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.delta import TensorDeltas
from streammerge.methods.iso_c import iso_c
from streammerge.methods.iso_cts import iso_cts
from streammerge.methods.tsv import tsv
from streammerge.solve.cost_spectral import shared_directions
from tests.solve.changes import relative_error

METHODS = [tsv, iso_c, iso_cts]
SHAPES = [(9, 21), (40, 12), (16, 16)]
WIDE = torch.tensor([[[2.0, 0, 0], [0, 1, 0]], [[0, 1, 0], [1, 0, 1]]])
TALL = torch.tensor([[[1.0, 2], [3, 4], [5, 6]], [[2, -1], [0, 1], [1, 1]], [[0, 1], [1, 0], [-1, 2]]])


def merged(function, changes, **parameters):
    """A method of changes [t, out, in] from a base of zeros."""
    return function(TensorDeltas(torch.zeros_like(changes[0]), list(changes)), **parameters)


def random(count, shape, seed=0):
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def low_rank(count, shape, rank, seed=0):
    return random(count, (shape[0], rank), seed) @ random(count, (rank, shape[1]), seed + 1)


def orthogonal(size):
    return torch.linalg.qr(random(1, (size, size), seed=9)[0])[0]


def svd(matrix, rank):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank]


def polar(matrix):
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


def tsv_by_svd(changes):
    rank = min(changes[0].shape) // len(changes)
    u, s, v = zip(*(svd(change, rank) for change in changes), strict=True)
    return (polar(torch.cat(u, 1)) * torch.cat(s)) @ polar(torch.cat(v))


def iso_c_by_svd(changes):
    u, s, v = torch.linalg.svd(changes.sum(0), full_matrices=False)
    return s.mean() * u @ v


def iso_cts_by_svd(changes):
    common, own = shared_directions(min(changes[0].shape), len(changes), 0.8)
    shared = svd(changes.sum(0), common)
    parts = [svd(change - shared[0] @ shared[0].mT @ change, own) for change in changes]
    u, s, v = zip(*parts, shared, strict=True)
    return torch.cat(s).mean() * polar(torch.cat(u, 1)) @ polar(torch.cat(v))


REFERENCES = {tsv: tsv_by_svd, iso_c: iso_c_by_svd, iso_cts: iso_cts_by_svd}


@pytest.mark.parametrize(
    ("function", "changes", "expected"),
    [
        (tsv, WIDE, [[1.847759, 0, -0.765367], [0.541196, 0, 1.306563]]),
        (tsv, TALL, [[0, 0], [0, 0], [0, 0]]),
        (iso_c, WIDE, [[1.612372, 0.5, -0.612372], [0.295876, 0.908248, 1.520621]]),
        (iso_cts, WIDE, [[1.612372, 0.5, -0.612372], [0.295876, 0.908248, 1.520621]]),
        (iso_c, TALL, [[5.887544, -1.637194], [3.98373, 1.706508], [0.422918, 6.71711]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_the_worked_examples_are_reached(function, changes, expected, dtype):
    result = merged(function, changes.to(dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), torch.tensor(expected).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("function", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [2, 3])
def test_a_spectral_method_agrees_with_full_decompositions(function, shape, count):
    changes = random(count, shape)
    assert relative_error(merged(function, changes), REFERENCES[function](changes)) < 1e-10
    narrow = changes.float()
    assert relative_error(merged(function, narrow), REFERENCES[function](narrow.double())) < 1e-6


@pytest.mark.parametrize("function", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_spectral_method_does_not_depend_on_the_order_of_the_experts(function, shape):
    changes = random(3, shape)
    assert relative_error(merged(function, changes[[2, 0, 1]]), merged(function, changes)) < 1e-10


@pytest.mark.parametrize("function", METHODS)
@given(factor=st.floats(1e-12, 1e12), seed=st.integers(0, 2**20))
@settings(max_examples=10, deadline=None)
def test_a_spectral_method_scales_with_the_deltas(function, factor, seed):
    changes = random(3, (9, 12), seed)
    result = merged(function, changes * factor) / factor
    # a factor that is no power of two rounds, and Grams square what that does to close singular values
    assert relative_error(result, merged(function, changes)) < 1e-8


@pytest.mark.parametrize("function", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", [random, lambda count, shape: low_rank(count, shape, 2)], ids=["full", "low rank"])
def test_a_spectral_method_turns_with_its_outputs_and_its_inputs(function, shape, make):
    changes = make(3, shape)
    left, right = orthogonal(shape[0]), orthogonal(shape[1])
    turned = merged(function, left @ changes @ right)
    assert relative_error(turned, left @ merged(function, changes) @ right) < 1e-8


@pytest.mark.parametrize("function", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_where_no_expert_changed_anything_nothing_changes(function, shape):
    assert not merged(function, torch.zeros(3, *shape)).any()


@pytest.mark.parametrize("function", METHODS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1)], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_a_spectral_method_takes_vectors_and_single_numbers(function, shape, count):
    assert torch.isfinite(merged(function, random(count, shape))).all()


@pytest.mark.parametrize("function", METHODS)
def test_lambda_scales_the_result(function):
    changes = random(2, (8, 12))
    torch.testing.assert_close(merged(function, changes, lambda_=-0.5), -0.5 * merged(function, changes))


@pytest.mark.parametrize("function", METHODS)
def test_the_base_takes_no_part(function):
    base, changes = random(1, (8, 12), seed=5)[0], random(2, (8, 12))
    result = function(TensorDeltas(base, [base + change for change in changes]))
    assert relative_error(result, merged(function, changes)) < 1e-10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tsv_of_one_expert_is_that_expert_bit_for_bit(shape):
    change = random(1, shape).float()
    assert torch.equal(merged(tsv, change), change[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tsv_of_equal_experts_is_their_largest_directions(shape):
    change = random(1, shape)[0]
    u, s, v = svd(change, min(shape) // 3)
    assert relative_error(merged(tsv, change.expand(3, *shape)), (u * s) @ v) < 1e-9


def test_tsv_of_more_experts_than_directions_changes_nothing():
    assert not merged(tsv, random(7, (6, 9))).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_expert_that_changed_nothing_takes_its_share_of_tsvs_directions_and_no_more(shape):
    change = random(1, shape)[0]
    with_idle = torch.stack([torch.zeros(shape).double(), change, torch.zeros(shape).double()])
    u, s, v = svd(change, min(shape) // 3)
    assert relative_error(merged(tsv, with_idle), (u * s) @ v) < 1e-10
    assert relative_error(merged(tsv, with_idle), merged(tsv, change[None])) > 0.1


def test_tsv_of_low_rank_experts_is_their_sum_where_they_do_not_meet():
    inputs, outputs = orthogonal(24), orthogonal(24)
    own = [slice(4 * t, 4 * t + 4) for t in range(3)]
    changes = torch.stack([outputs[:, part] @ random(1, (4, 4), t)[0] @ inputs[part] for t, part in enumerate(own)])
    assert relative_error(merged(tsv, changes), changes.sum(0)) < 1e-10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_iso_of_one_expert_is_not_that_expert_and_equal_experts_count_several_times(shape):
    change = random(1, shape)
    once = merged(iso_c, change)
    assert relative_error(once, change[0]) > 0.1
    assert relative_error(merged(iso_c, change.expand(3, *shape)), 3 * once) < 1e-10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_expert_that_changed_nothing_is_ignored_by_iso_c(shape):
    changes = random(3, shape)
    changes[1] = 0.0
    assert relative_error(merged(iso_c, changes), merged(iso_c, changes[[0, 2]])) < 1e-10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_iso_c_of_a_low_rank_sum_keeps_to_its_directions_at_the_mean_of_all_singular_values(shape):
    changes = low_rank(1, shape, 3)
    u, s, v = svd(changes[0], 3)
    assert relative_error(merged(iso_c, changes), s.sum() / min(shape) * u @ v) < 1e-10
    rounded = merged(iso_c, changes.float())
    assert torch.linalg.matrix_rank(rounded.double(), rtol=1e-4) == 3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_iso_cts_of_low_rank_experts_has_no_more_directions_than_they(shape):
    result = merged(iso_cts, low_rank(2, shape, 1))
    assert torch.linalg.matrix_rank(result, rtol=1e-8) == 2


def test_an_expert_within_the_common_directions_gives_none_of_its_own():
    change = low_rank(1, (20, 30), 4)[0]
    deltas = TensorDeltas(torch.zeros_like(change), [change, 2 * change])
    u, s, v = svd(change, 4)
    assert relative_error(iso_cts(deltas), 3 * s.sum() / 20 * u @ v) < 1e-9
    assert deltas.facts["directions"] == 4


def test_iso_cts_with_all_directions_in_common_is_iso_c():
    changes = random(3, (9, 21))
    result = merged(iso_cts, changes, common_space_fraction=1.0)
    assert relative_error(result, merged(iso_c, changes)) < 1e-10
