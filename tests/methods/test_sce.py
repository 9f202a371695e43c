import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streammerge.delta import TensorDeltas
from streammerge.methods.sce import sce
from streammerge.solve.panels import PANEL
from tests.blocks import described, merged_by_blocks

WIDE = torch.float64
G1 = [[[2.0, 0, 0], [0, 1, 0]], [[0.0, 1, 0], [1, 0, 1]]]
G2 = [[[1.0, 2], [3, 4], [5, 6]], [[2.0, -1], [0, 1], [1, 1]], [[0.0, 1], [1, 0], [-1, 2]]]


def merged(changes, dtype=WIDE, **parameters):
    """The merge of changes from a base of zero."""
    changes = [torch.as_tensor(change, dtype=dtype) for change in changes]
    return described(sce).merge(TensorDeltas(torch.zeros_like(changes[0]), changes), **parameters)


def reference(changes, topk=1.0):
    """Select, calculate, erase: each step as the paper writes it, in float64."""
    changes = torch.stack([torch.as_tensor(change, dtype=WIDE) for change in changes])
    if topk < 1.0:
        variance = changes.var(0, unbiased=False).view(-1)
        keep = int(int((variance != 0).sum()) * topk)
        order = torch.argsort(variance, descending=True, stable=True)[:keep]
        mask = torch.zeros_like(variance).index_fill_(0, order, 1.0).view(changes[0].shape)
        changes = changes * mask
    weights = changes.square().flatten(1).sum(1)
    sign = torch.where(changes.sum(0) >= 0, 1.0, -1.0)
    agrees = (changes.sign() == sign) * (weights / weights.sum()).nan_to_num().view(-1, *[1] * (changes.ndim - 1))
    return (agrees * changes).sum(0) / torch.where(agrees.sum(0) > 0, agrees.sum(0), 1.0)


@pytest.mark.parametrize(
    ("changes", "topk", "expected"),
    [
        (G1, 1.0, [[2, 1, 0], [1, 1, 1]]),
        (G1, 0.5, [[2, 1, 0], [0, 0, 0]]),
        (G2, 1.0, [[1.080808, 1.928571], [2.857143, 3.757576], [4.676768, 5.358491]]),
    ],
)
def test_golden_values(changes, topk, expected):
    torch.testing.assert_close(merged(changes, select_topk=topk), torch.tensor(expected, dtype=WIDE), atol=1e-6, rtol=0)


@pytest.mark.parametrize("topk", [1.0, 0.9, 0.5, 0.1])
@pytest.mark.parametrize("shape", [(7,), (5, 6), (2, 3, 4), (1,)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_it_selects_calculates_and_erases(shape, count, topk):
    torch.manual_seed(count)
    changes = torch.randn(count, *shape, dtype=WIDE)
    expected = reference(changes, topk)
    torch.testing.assert_close(merged(changes, select_topk=topk), expected, atol=1e-14, rtol=1e-12)
    narrow = merged(changes.float(), torch.float32, select_topk=topk)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("topk", [1.0, 0.3])
@pytest.mark.parametrize("panels", [1, 3])
def test_the_bytes_do_not_depend_on_the_blocks(panels, topk):
    torch.manual_seed(0)
    base = torch.randn(5 * PANEL + 77).bfloat16()
    # changes of few values: many variances tie
    experts = [base.float() + torch.randint(-2, 3, base.shape) * 2.0**-6 for _ in range(3)]
    whole = described(sce).merge(TensorDeltas(base, experts), select_topk=topk)
    cut = merged_by_blocks(sce, base, experts, panels * PANEL, select_topk=topk)
    assert torch.equal(whole, cut)
    assert torch.equal(whole, merged_by_blocks(sce, base, experts, panels * PANEL, backwards=True, select_topk=topk))
    kept = int((torch.stack(experts).var(0, unbiased=False) > 0).sum())
    if topk < 1.0:
        assert int(topk * kept) * 0.7 < int((whole != 0).sum()) <= int(topk * kept)


def test_of_equal_variances_those_of_the_lowest_index_are_kept():
    changes = torch.ones(10), -torch.ones(10) / 2
    assert torch.equal(merged(changes, torch.float32, select_topk=0.35) != 0, torch.arange(10) < 3)


def test_equal_experts_vary_nowhere_so_that_a_selection_keeps_nothing():
    change = torch.randn(5, 7)
    for count in (1, 2, 3, 7):
        assert not merged([change] * count, torch.float32, select_topk=0.9).any()
        torch.testing.assert_close(merged([change] * count, torch.float32), change)


def test_a_selection_of_nothing_leaves_the_base():
    changes = torch.randn(3, 4, 5)
    assert not merged(changes, torch.float32, select_topk=0.0).any()


@pytest.mark.parametrize("topk", [1.0, 0.6])
def test_permutation_and_scale(topk):
    torch.manual_seed(0)
    changes = torch.randn(3, 6, 5, dtype=WIDE)
    expected = merged(changes, select_topk=topk)
    torch.testing.assert_close(merged(changes[[2, 0, 1]], select_topk=topk), expected, atol=1e-14, rtol=1e-14)
    for scale in (1e-12, 1e-3, 1e6):
        found = merged(changes * scale, select_topk=topk)
        torch.testing.assert_close(found / scale, expected, atol=1e-13, rtol=1e-13)


def test_an_expert_that_changed_nothing_does_not_count():
    torch.manual_seed(0)
    changes = torch.randn(3, 6, 5, dtype=WIDE)
    changes[1] = 0
    assert torch.equal(merged(changes), merged(changes[[0, 2]]))
    assert not merged(torch.zeros(3, 6, 5), torch.float32).any()


def test_rotations_do_not_commute_with_signs():
    torch.manual_seed(0)
    changes = torch.randn(3, 6, 6, dtype=WIDE)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=WIDE))
    assert (merged(turn @ changes) - turn @ merged(changes)).norm() > 0.1 * merged(changes).norm()


def test_mergekits_equal_weights_for_small_changes_are_had_by_asking():
    torch.manual_seed(0)
    changes = torch.randn(2, 50, dtype=WIDE).abs() * torch.tensor([[3e-4], [1e-4]])
    ours, theirs = merged(changes), merged(changes, compat="mergekit")
    torch.testing.assert_close(theirs, changes.mean(0), atol=1e-12, rtol=0)
    torch.testing.assert_close(ours, reference(changes), atol=1e-12, rtol=0)
    assert (ours - theirs).norm() > 0.1 * ours.norm()
    # above the floor they agree
    assert torch.equal(merged(changes * 1e3), merged(changes * 1e3, compat="mergekit"))


def test_mergekits_floor_of_weights_shrinks_what_a_small_expert_changed_alone():
    changes = torch.tensor([[1.0, 0.0], [0.0, 1e-4]], dtype=WIDE)
    assert merged(changes)[1].item() == pytest.approx(1e-4)
    assert merged(changes, compat="mergekit")[1].item() == pytest.approx(1e-4 * 1e-8 / 1e-6, rel=1e-3)


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=2, max_size=4),
    st.sampled_from([1.0, 0.75, 0.5, 0.2]),
)
def test_it_equals_the_reference_with_all_its_ties(changes, topk):
    wide = torch.tensor(changes, dtype=WIDE)
    # of a multiple of the number of experts the mean is whole, and equal variances are equal in any arithmetic
    whole = wide * 12
    torch.testing.assert_close(merged(whole, select_topk=topk), reference(whole, topk), atol=1e-12, rtol=1e-12)
