import pytest
import torch

from streammerge.delta import TensorDeltas
from streammerge.methods.ram import ram
from streammerge.methods.ramplus_tl import ramplus_tl
from streammerge.solve.panels import PANEL
from tests.blocks import described, merged_by_blocks

WIDE = torch.float64
# entry by entry: one changer, one, all three, none beyond epsilon, two, just epsilon, one, none
CHANGES = torch.tensor(
    [
        [1, 0, 2, 1e-6, -1, 1e-5, 3e-6, 0],
        [0, 2, -1, 1e-6, 1e-6, 0, 1e-6, 0],
        [0, 1e-6, 5, 0, -3, 0, 4, 0],
    ],
    dtype=WIDE,
)
BOTH = pytest.mark.parametrize("method", [ram, ramplus_tl])


def merged(method, changes, dtype=WIDE, **parameters):
    """The merge of changes from a base of zero."""
    changes = [torch.as_tensor(change, dtype=dtype) for change in changes]
    return described(method).merge(TensorDeltas(torch.zeros_like(changes[0]), changes), **parameters)


def test_shared_entries_are_averaged_over_those_who_changed_them_and_others_kept():
    expected = torch.tensor([1, 2, 2, 0, -2, 0, 4, 0], dtype=WIDE)
    torch.testing.assert_close(merged(ram, CHANGES), expected, atol=1e-14, rtol=0)


def test_a_smaller_epsilon_lets_smaller_changes_count():
    expected = torch.tensor([1, 1.0000005, 2, 1e-6, -4 / 3 + 1e-6 / 3, 1e-5, 4 / 3 + 4e-6 / 3, 0], dtype=WIDE)
    torch.testing.assert_close(merged(ram, CHANGES, epsilon=1e-9), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("r", "alpha", "factors"),
    # shared over own entries: 2 / 1, 1 / 1, 2 / 1
    [(0.1, 0.2, (1.02, 1.02, 1.02)), (1.0, 10.0, (3, 2, 3)), (1.0, 1.5, (2.5, 2, 2.5)), (0.0, 1.0, (1, 1, 1))],
)
def test_an_experts_own_entries_are_amplified_by_its_shared_ones(r, alpha, factors):
    first, second, third = factors
    expected = torch.tensor([first, 2 * second, 2, 0, -2, 0, 4 * third, 0], dtype=WIDE)
    torch.testing.assert_close(merged(ramplus_tl, CHANGES, r=r, alpha=alpha), expected, atol=1e-14, rtol=0)


def test_experts_without_own_entries_have_nothing_to_amplify():
    changes = torch.randn(3, 4, 5, dtype=WIDE).abs() + 1
    assert torch.equal(merged(ramplus_tl, changes), merged(ram, changes))


@BOTH
def test_float32_agrees_with_float64(method):
    torch.manual_seed(0)
    changes = torch.randn(4, 5, 6, dtype=WIDE) * (torch.rand(4, 5, 6) < 0.4)
    found = merged(method, changes, torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), merged(method, changes), atol=1e-6, rtol=0)


@BOTH
def test_one_expert_or_copies_of_it_come_back(method):
    base = torch.randn(40, 30).bfloat16()
    expert = (base.float() + 0.1 * torch.randn(40, 30)).bfloat16()
    for copies in (1, 2, 3, 5):
        delta = described(method).merge(TensorDeltas(base, [expert] * copies), epsilon=0.0)
        assert torch.equal((base.float() + delta).bfloat16(), expert)


@BOTH
def test_order_and_experts_that_changed_nothing_do_not_matter(method):
    torch.manual_seed(0)
    changes = torch.randn(3, 4, 5, dtype=WIDE) * (torch.rand(3, 4, 5) < 0.4)
    expected = merged(method, changes)
    torch.testing.assert_close(merged(method, changes[[2, 0, 1]]), expected)
    assert torch.equal(merged(method, [*changes, changes[0] * 0]), expected)
    assert not merged(method, changes * 0).any()
    # epsilon scales with the changes
    torch.testing.assert_close(merged(method, changes * 1e-3, epsilon=1e-8) * 1e3, expected)


@BOTH
def test_rotations_do_not_commute_with_counting(method):
    torch.manual_seed(0)
    changes = torch.randn(3, 6, 6, dtype=WIDE) * (torch.rand(3, 6, 6) < 0.4)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=WIDE))
    assert (merged(method, turn @ changes) - turn @ merged(method, changes)).norm() > 0.1


@BOTH
def test_the_bytes_do_not_depend_on_the_blocks(method):
    torch.manual_seed(0)
    base, *changes = torch.randn(4, 3 * PANEL + 5)
    experts = [base + change * (torch.rand(change.shape) < 0.5) for change in changes]
    whole = described(method).merge(TensorDeltas(base, experts))
    for block in (100, PANEL, 2 * PANEL):
        assert torch.equal(whole, merged_by_blocks(method, base, experts, block, backwards=True))
