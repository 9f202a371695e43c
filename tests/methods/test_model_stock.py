import itertools
import math

import pytest
import torch

from streammerge.delta import TensorDeltas
from streammerge.methods.model_stock import model_stock
from tests.blocks import described, merged_by_blocks

WIDE = torch.float64
G2 = [[[1.0, 2], [3, 4], [5, 6]], [[2.0, -1], [0, 1], [1, 1]], [[0.0, 1], [1, 0], [-1, 2]]]


def merged(changes, dtype=WIDE, **parameters):
    """The merge of changes from a base of zero."""
    changes = [torch.as_tensor(change, dtype=dtype) for change in changes]
    return described(model_stock).merge(TensorDeltas(torch.zeros_like(changes[0]), changes), **parameters)


def share(changes):
    """t = N c / (1 + (N - 1) c), c the mean cosine of all pairs, along the last dimension."""
    pairs = list(itertools.combinations([change.double() for change in changes], 2))
    cosine = sum(torch.cosine_similarity(a, b, dim=-1, eps=0) for a, b in pairs) / len(pairs)
    count = len(changes)
    return (count * cosine / (1 + (count - 1) * cosine)).clamp(0, 1)


def test_golden_values():
    expected = [[0.611162, 0.407441], [0.814882, 1.018603], [1.018603, 1.833485]]
    torch.testing.assert_close(merged(G2), torch.tensor(expected, dtype=WIDE), atol=1e-6, rtol=0)
    orthogonal = [[[2.0, 0, 0], [0, 1, 0]], [[0.0, 1, 0], [1, 0, 1]]]
    assert not merged(orthogonal).any()


def test_the_report_is_told_the_share():
    deltas = TensorDeltas(torch.zeros(2), [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])])
    described(model_stock).merge(deltas)
    assert deltas.facts["t"] == pytest.approx(2 / (1 + math.sqrt(2)))


@pytest.mark.parametrize("shape", [(7,), (5, 6), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("by_row", [False, True], ids=["tensor", "rows"])
def test_the_share_comes_from_the_mean_cosine(by_row, count, shape):
    torch.manual_seed(count)
    changes = torch.randn(count, *shape, dtype=WIDE) + 0.5 * torch.randn(shape, dtype=WIDE)
    t = share(changes)[..., None] if by_row else share(changes.flatten(1))
    expected = t * changes.mean(0)
    torch.testing.assert_close(merged(changes, filter_wise=by_row), expected, atol=1e-13, rtol=1e-13)
    narrow = merged(changes.float(), torch.float32, filter_wise=by_row)
    torch.testing.assert_close(narrow.double(), expected, atol=1e-5, rtol=1e-5)


def test_two_experts_at_a_right_angle_leave_the_base():
    assert not merged([[1.0, 0, 2], [0.0, 3, 0]]).any()


@pytest.mark.parametrize("by_row", [False, True], ids=["tensor", "rows"])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_equal_experts_come_back(count, by_row):
    base = torch.randn(16, 40).bfloat16()
    expert = (base.float() + 0.01 * torch.randn(16, 40)).bfloat16()
    delta = described(model_stock).merge(TensorDeltas(base, [expert] * count), filter_wise=by_row)
    assert torch.equal((base.float() + delta).bfloat16(), expert)


@pytest.mark.parametrize("by_row", [False, True], ids=["tensor", "rows"])
def test_permutation_scale_and_rotation(by_row):
    torch.manual_seed(0)
    changes = torch.randn(3, 6, 6, dtype=WIDE) + torch.randn(6, 6, dtype=WIDE)
    expected = merged(changes, filter_wise=by_row)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=WIDE))
    found = [
        merged(changes[[2, 0, 1]], filter_wise=by_row),
        merged(changes * 1e-9, filter_wise=by_row) * 1e9,
        merged(changes @ turn, filter_wise=by_row) @ turn.T,
    ]
    for each in found:
        torch.testing.assert_close(each, expected, atol=1e-13, rtol=1e-12)
    left = turn.T @ merged(turn @ changes, filter_wise=by_row)
    assert torch.allclose(left, expected, atol=1e-12) != by_row


def test_an_expert_that_changed_nothing_counts_with_a_cosine_of_zero():
    change = torch.randn(4, 5, dtype=WIDE)
    cosine = 1 / 3
    t = 3 * cosine / (1 + 2 * cosine)
    torch.testing.assert_close(merged([change, change, change * 0]), t * change * 2 / 3)
    assert not merged([change * 0] * 3).any()
    assert not merged([change * 0] * 3, filter_wise=True).any()


@pytest.mark.parametrize("by_row", [False, True], ids=["tensor", "rows"])
@pytest.mark.parametrize("block", [64, 1000])
def test_the_bytes_do_not_depend_on_the_blocks(block, by_row):
    torch.manual_seed(0)
    base, *experts = torch.randn(4, 37, 250)
    whole = described(model_stock).merge(TensorDeltas(base, experts), filter_wise=by_row)
    found = merged_by_blocks(model_stock, base, experts, block, backwards=True, filter_wise=by_row)
    assert torch.equal(whole, found)


def test_experts_that_point_apart_leave_the_base_where_mergekit_goes_beyond_it():
    changes = torch.tensor([[1.0, 0.0], [-0.3, 1.0]], dtype=WIDE)
    cosine = -0.3 / math.hypot(0.3, 1)
    assert not merged(changes).any()
    theirs = merged(changes, compat="mergekit")
    torch.testing.assert_close(theirs, 2 * cosine / (1 + cosine) * changes.mean(0))
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=WIDE)
    assert not merged(opposite, compat="mergekit", filter_wise=True).any()


def test_small_changes_are_merged_where_mergekit_goes_back_to_the_base():
    changes = torch.tensor([[1.0, 0.0], [1.0, 0.1]], dtype=WIDE)
    small = changes * 1e-4
    torch.testing.assert_close(merged(small), merged(changes) * 1e-4, rtol=1e-12, atol=0)
    # its cosine is |D_1| |D_2| / 1e-6 of what it should be
    torch.testing.assert_close(merged(small, compat="mergekit")[0].item(), 0.019802e-4, rtol=1e-4, atol=0)
    assert torch.equal(merged(changes, compat="mergekit"), merged(changes))
