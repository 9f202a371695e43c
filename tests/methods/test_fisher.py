import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.delta import TensorDeltas
from streammerge.errors import MergeError
from streammerge.methods.fisher import fisher
from tests.blocks import merged_by_blocks


def random(count, shape, seed=0):
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def merged(changes, beside, **parameters):
    return fisher(TensorDeltas(torch.zeros_like(changes[0]), list(changes), beside=beside), **parameters)


def test_fisher_by_hand():
    changes = torch.tensor([[1.0, 1.0, 1.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    beside = list(torch.tensor([[1.0, 3.0, 0.0, 0.0], [1.0, 1.0, 2.0, 0.0]]))
    assert merged(changes, beside).tolist() == [3.0, 2.0, 5.0, 3.0]
    assert merged(changes, beside, weight=[3.0, 1.0]).tolist() == pytest.approx([2.0, 1.4, 5.0, 2.0])
    assert merged(changes, beside, weight=[0.0, 1.0]).tolist() == [5.0] * 4


@pytest.mark.parametrize("shape", [(7, 5), (11,), (1,), (2, 3, 4)], ids=str)
@given(seed=st.integers(0, 2**20), size=st.floats(1e-30, 1e30))
@settings(max_examples=15, deadline=None)
def test_fisher_is_the_weighted_mean_of_each_element_whatever_the_size_of_the_information(shape, seed, size):
    changes, information = random(4, shape, seed), random(4, shape, seed + 1).square()
    weights = [1.0, 0.5, 2.0, 1.0]
    shares = information * torch.tensor(weights).view(4, *[1] * len(shape))
    truth = (changes * shares).sum(0) / shares.sum(0)
    torch.testing.assert_close(merged(changes, list(information * size), weight=weights), truth)
    narrow = merged(changes.float(), list((information * size).float()), weight=weights)
    torch.testing.assert_close(narrow.double(), truth, atol=1e-5, rtol=1e-5)


def test_one_expert_comes_back_exactly_and_equal_ones_do():
    changes = random(1, (6, 5)).float()
    information = [each.square().float() for each in random(3, (6, 5), 1)]
    assert torch.equal(merged(changes, information[:1]), changes[0])
    torch.testing.assert_close(merged(changes.expand(3, -1, -1), information), changes[0], atol=0, rtol=1e-6)


def test_an_expert_that_changed_nothing_counts():
    changes, beside = torch.tensor([[4.0], [0.0]]), [torch.tensor([1.0]), torch.tensor([3.0])]
    assert merged(changes, beside).tolist() == [1.0]


@pytest.mark.parametrize("block", [1, 17, 64])
def test_fisher_does_not_depend_on_how_a_tensor_is_cut(block):
    changes, information = random(3, (9, 10)).float(), random(3, (9, 10), 1).square().float()
    information[:, 4, 2:7] = 0
    base = torch.zeros(9, 10)
    parts = merged_by_blocks(fisher, base, list(changes), block, beside=list(information), weight=[1.0, 2.0, 0.5])
    assert torch.equal(parts, merged(changes, list(information), weight=[1.0, 2.0, 0.5]))


def test_where_information_may_be_missing_its_tensor_is_averaged():
    changes = random(2, (3, 4))
    for beside in (None, [torch.ones(3, 4), None]):
        torch.testing.assert_close(merged(changes, beside, missing="mean"), changes.mean(0))


@pytest.mark.parametrize(
    ("information", "message"),
    [
        (torch.full((3, 4), -1.0), "negative or not finite"),
        (torch.full((3, 4), torch.nan), "negative or not finite"),
        (torch.full((3, 4), torch.inf), "negative or not finite"),
    ],
    ids=["negative", "nan", "infinite"],
)
def test_damaged_information_is_refused(information, message):
    with pytest.raises(MergeError, match=message) as raised:
        merged(random(2, (3, 4)), [torch.ones(3, 4), information])
    assert raised.value.hint
