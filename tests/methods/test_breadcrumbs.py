import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.delta import TensorDeltas
from streammerge.methods.breadcrumbs import breadcrumbs
from streammerge.methods.breadcrumbs_ties import breadcrumbs_ties
from streammerge.methods.task_arithmetic import task_arithmetic
from streammerge.methods.ties import ties
from streammerge.solve.panels import PANEL
from tests.blocks import described, merged_by_blocks
from tests.kernels.devices import DEVICE

BOTH = [breadcrumbs, breadcrumbs_ties]


def merged(rule, changes, block=1 << 30, **parameters):
    """The rule's merge of changes [t, *shape] from a base of zeros."""
    return merged_by_blocks(rule, torch.zeros_like(changes[0]), list(changes), block, **parameters)


def coarse(count, shape, seed=0):
    """Changes with many equal magnitudes and zeros, whose sums are exact."""
    return (torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)) * 3).round() / 64


def crumbs(change, density, gamma):
    """What is kept, by a stable sort: the first of equals is the larger."""
    size = change.numel()
    kept = int(density * size)
    outliers = min(int(gamma * size), size - kept)
    order = torch.sort(change.flatten().abs(), descending=True, stable=True).indices
    mask = torch.zeros(size, dtype=torch.bool)
    mask[order[outliers : outliers + kept]] = True
    return change * mask.view(change.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("density", "gamma"),
    [(0.5, 0.1), (0.9, 0.01), (0.3, 0.9), (0.95, 0.2), (0.2, 0.0), (0.0, 0.3), (1.0, 0.5)],
    ids=str,
)
def test_outliers_and_small_entries_are_left_out(density, gamma, dtype):
    changes = coarse(3, (15, 20)).to(dtype)
    kept = [change if density == 1.0 else crumbs(change, density, gamma) for change in changes]
    result = merged(breadcrumbs, changes, weight=[1.0, 0.5, -2.0], density=density, gamma=gamma, lambda_=0.5)
    assert result.dtype == dtype
    assert torch.equal(result, 0.5 * (kept[0] + 0.5 * kept[1] - 2.0 * kept[2]))


def test_breadcrumbs_of_ten_entries_by_hand():
    change = torch.tensor([[5.0, -9, 1, 3, -2, 7, 0, 4, -6, 8]])
    # of ten the two largest, -9 and 8, are outliers; the next four are kept
    expected = [5.0, 0, 0, 0, 0, 7, 0, 4, -6, 0]
    assert merged(breadcrumbs, change, density=0.4, gamma=0.2).tolist() == expected
    # no room for small entries beside the kept: the three largest are outliers, not five
    expected = [5.0, 0, 1, 3, -2, 0, 0, 4, -6, 0]
    assert merged(breadcrumbs, change, density=0.7, gamma=0.5).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("rule", BOTH)
def test_what_is_kept_of_ten_entries_is_rescaled_by_hand(rule, dtype):
    change = torch.tensor([[5.0, -9, 1, 3, -2, 7, 0, 4, -6, 8]], dtype=dtype)
    # 22 is kept of a sum of 45
    expected = torch.tensor([5.0, 0, 0, 0, 0, 7, 0, 4, -6, 0], dtype=dtype) * 45 / 22
    result = merged(rule, change, density=0.4, gamma=0.2, rescale=True)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    # an expert of which all is kept, and one of which nothing is, are as they are
    three = torch.cat([change, change, change])
    result = merged(rule, three, density=[0.4, 1.0, 0.0], gamma=0.2, rescale=True)
    torch.testing.assert_close(result, expected + change[0], atol=1e-5, rtol=0)
    # where nothing but outliers changed, nothing is left to rescale
    assert not merged(rule, torch.eye(1, 10, dtype=dtype), density=0.4, gamma=0.2, rescale=True).any()


@pytest.mark.parametrize("rule", BOTH)
@given(panels=st.integers(1, 4), seed=st.integers(0, 1000), backwards=st.booleans())
@settings(max_examples=5, deadline=None)
def test_rescaled_the_bits_do_not_depend_on_the_cut(rule, panels, seed, backwards):
    changes = torch.randn(2, 170, 150, generator=torch.Generator().manual_seed(seed))
    parameters = {"density": [0.2, 0.7], "gamma": [0.05, 0.1], "rescale": True}
    cut = merged(rule, changes, panels * PANEL, backwards=backwards, **parameters)
    assert torch.equal(cut, merged(rule, changes, **parameters))


def test_each_expert_has_its_own_shares():
    changes = coarse(2, (40,))
    result = merged(breadcrumbs, changes, density=[0.5, 0.25], gamma=[0.1, 0.5])
    assert torch.equal(result, crumbs(changes[0], 0.5, 0.1) + crumbs(changes[1], 0.25, 0.5))


@pytest.mark.parametrize("rule", BOTH)
def test_a_tensor_too_small_for_an_outlier_keeps_its_largest(rule):
    changes = coarse(2, (64,))
    small = merged(rule, changes, density=0.5)
    assert torch.equal(small, merged(rule, changes, density=0.5, gamma=0.0))
    assert small.any()


@pytest.mark.parametrize("rule", BOTH)
@given(block=st.integers(1, 200), seed=st.integers(0, 1000), backwards=st.booleans())
@settings(max_examples=15, deadline=None)
def test_the_bits_depend_neither_on_the_cut_nor_on_the_order_of_blocks(rule, block, seed, backwards):
    changes = coarse(3, (12, 16), seed)
    parameters = {"density": [0.2, 0.5, 1.0], "gamma": [0.05, 0.3, 0.0], "weight": [0.3, 0.7, 1.1]}
    cut = merged(rule, changes, block, backwards=backwards, **parameters)
    assert torch.equal(cut, merged(rule, changes, **parameters))


@pytest.mark.parametrize("rule", BOTH)
def test_a_device_gives_the_cpus_bits(rule):
    changes = coarse(3, (64, 130))
    there = merged(rule, changes.to(DEVICE), 5000, density=0.4)
    assert there.device.type == DEVICE
    assert torch.equal(there.cpu(), merged(rule, changes, density=0.4))


@pytest.mark.parametrize("normalize", [True, False], ids=["mean", "sum"])
def test_breadcrumbs_ties_is_ties_of_what_breadcrumbs_keeps(normalize):
    changes = coarse(3, (15, 20))
    options = {"weight": [1.0, 0.5, 2.0], "normalize": normalize, "lambda_": 0.7}
    kept = torch.stack([crumbs(change, 0.4, 0.1) for change in changes])
    result = merged(breadcrumbs_ties, changes, density=0.4, gamma=0.1, **options)
    assert torch.equal(result, merged(ties, kept, **options))


def test_breadcrumbs_that_keep_all_are_task_arithmetic_bit_for_bit():
    changes = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1))
    for options in ({"weight": [0.3, 0.2, 0.9]}, {"normalize": True, "lambda_": 0.4}):
        deltas = TensorDeltas(torch.zeros(6, 5), list(changes))
        assert torch.equal(merged(breadcrumbs, changes, **options), task_arithmetic(deltas, **options))


@pytest.mark.parametrize("rule", BOTH)
def test_breadcrumbs_ignore_who_changed_nothing_scale_and_do_not_depend_on_the_order(rule):
    changes = coarse(3, (10, 20))
    plain = merged(rule, changes, density=0.5, gamma=0.1)
    assert torch.equal(merged(rule, changes[[2, 0, 1]], density=0.5, gamma=0.1), plain)
    assert torch.equal(merged(rule, changes * 8, density=0.5, gamma=0.1), plain * 8)
    with_idle = torch.cat([torch.zeros(1, 10, 20), changes])
    assert torch.equal(merged(rule, with_idle, density=0.5, gamma=0.1), plain)
    assert not merged(rule, torch.zeros(2, 10, 20), density=0.5, gamma=0.1).any()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_of_one_entry_a_share_below_one_keeps_none(shape):
    result = merged(breadcrumbs, torch.ones(2, *shape), density=0.9)
    assert result.shape == shape
    assert not result.any()


def test_cuts_take_looks_where_anything_is_dropped():
    cost = described(breadcrumbs).cost
    assert (cost((4, 4), 2, {}, 4).looks, cost((4, 4), 2, {"density": 0.5}, 4).looks) == (0, 3)
    assert cost((4, 4), 2, {"rescale": True}, 4).looks == 0
    assert cost((4, 4), 2, {"density": [1.0, 0.5], "rescale": True}, 4).looks == 4


@pytest.mark.parametrize("rule", BOTH)
def test_trimming_without_a_look_is_a_mistake(rule):
    with pytest.raises(AssertionError, match="takes a look"):
        rule(TensorDeltas(torch.zeros(3), [torch.ones(3)]), density=0.5)
