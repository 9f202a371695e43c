import pytest
import torch

from streammerge.delta import TensorDeltas
from streammerge.methods.from_ import from_
from streammerge.solve.panels import PANEL
from tests.blocks import described, merged_by_blocks

WIDE = torch.float64


def merged(changes, dtype=WIDE, **parameters):
    """The merge of changes from a base of zero."""
    changes = [torch.as_tensor(change, dtype=dtype) for change in changes]
    return described(from_).merge(TensorDeltas(torch.zeros_like(changes[0]), changes), **parameters)


def test_changes_weigh_as_powers_of_their_norms():
    changes = [[3.0, 4.0], [0.0, 1.0]]
    torch.testing.assert_close(merged(changes), torch.tensor([15 / 6, 21 / 6], dtype=WIDE))
    torch.testing.assert_close(merged(changes, k=2.0), torch.tensor([75 / 26, 101 / 26], dtype=WIDE))
    torch.testing.assert_close(merged(changes, k=0.0), torch.tensor([1.5, 2.5], dtype=WIDE))


@pytest.mark.parametrize("k", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(7,), (5, 6), (2, 3, 4)], ids=str)
def test_it_minimises_the_weighted_distance(shape, k):
    torch.manual_seed(0)
    changes = torch.randn(3, *shape, dtype=WIDE) * torch.tensor([1.0, 5.0, 0.2]).view(3, *[1] * len(shape))
    weights = changes.flatten(1).norm(dim=1) ** k
    expected = (weights.view(3, *[1] * len(shape)) * changes).sum(0) / weights.sum()
    torch.testing.assert_close(merged(changes, k=k), expected, atol=1e-14, rtol=1e-13)
    torch.testing.assert_close(merged(changes, torch.float32, k=k).double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("k", [0.0, 1.0, 3.0])
def test_one_expert_or_copies_of_it_come_back(k):
    base = torch.randn(40, 30).bfloat16()
    expert = (base.float() + 0.1 * torch.randn(40, 30)).bfloat16()
    for copies in (1, 2, 3, 5):
        delta = described(from_).merge(TensorDeltas(base, [expert] * copies), k=k)
        assert torch.equal((base.float() + delta).bfloat16(), expert)


@pytest.mark.parametrize("k", [0.0, 1.0, 2.5])
def test_permutation_scale_and_rotations(k):
    torch.manual_seed(0)
    changes = torch.randn(3, 6, 6, dtype=WIDE)
    expected = merged(changes, k=k)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=WIDE))
    found = [
        merged(changes[[2, 0, 1]], k=k),
        merged(changes * 1e-30, k=k) * 1e30,
        turn.T @ merged(turn @ changes, k=k),
        merged(changes @ turn, k=k) @ turn.T,
    ]
    for each in found:
        torch.testing.assert_close(each, expected, atol=1e-13, rtol=1e-12)


def test_an_expert_that_changed_nothing_counts_in_the_average_only():
    torch.manual_seed(0)
    changes = torch.randn(2, 4, 5, dtype=WIDE)
    more = [*changes, torch.zeros(4, 5)]
    assert torch.equal(merged(more), merged(changes))
    torch.testing.assert_close(merged(more, k=0.0), changes.sum(0) / 3)
    assert not merged(changes * 0).any()


def test_a_large_power_takes_the_largest_change():
    changes = torch.randn(3, 4, 5, dtype=WIDE) * torch.tensor([1.0, 8.0, 2.0]).view(3, 1, 1)
    torch.testing.assert_close(merged(changes, k=1e6), changes[1])


def test_the_bytes_do_not_depend_on_the_blocks():
    base, *experts = torch.randn(4, 5 * PANEL + 77)
    whole = described(from_).merge(TensorDeltas(base, experts), k=1.5)
    for panels in (1, 3):
        assert torch.equal(whole, merged_by_blocks(from_, base, experts, panels * PANEL, backwards=True, k=1.5))
