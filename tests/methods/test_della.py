import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.delta import TensorDeltas
from streammerge.methods.della import della
from streammerge.methods.della_linear import della_linear
from streammerge.methods.task_arithmetic import task_arithmetic
from streammerge.methods.ties import ties
from streammerge.solve.drops import chances
from tests.blocks import described, merged_by_blocks
from tests.kernels.devices import DEVICE

BOTH = [della, della_linear]


def merged(rule, changes, block=1 << 30, **parameters):
    """The rule's merge of changes [t, *shape] from a base of zeros."""
    return merged_by_blocks(rule, torch.zeros_like(changes[0]), list(changes), block, **parameters)


def random(count, shape, seed=0, dtype=torch.float32):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_chances_grow_with_the_rank_in_the_row():
    rows = torch.tensor([[3.0, -1, 2, -5, 0], [7, 7, -7, 0, 0]])
    expected = [[0.6, 0.4, 0.5, 0.7, 0.3], [0.7, 0.6, 0.5, 0.4, 0.3]]
    torch.testing.assert_close(chances(rows, 0.3, 0.7), torch.tensor(expected, dtype=torch.float64))
    assert chances(torch.ones(3, 1), 0.3, 0.7).tolist() == [[0.5]] * 3


def test_ranks_of_a_long_row_are_all_different():
    rows = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0))
    found = chances(rows, 0.2, 0.8)
    assert all(len(row.unique()) == 3000 for row in found)
    assert torch.equal(found.argsort(1), rows.abs().argsort(1))
    assert (found.min(), found.max()) == (0.2, 0.8)


def test_an_entry_is_kept_as_often_as_its_chance_says():
    change = random(1, (4, 6), dtype=torch.float64)
    seeds = 600
    found = sum((merged(della_linear, change, density=0.5, epsilon=0.3, seed=seed) != 0).double()
                for seed in range(seeds)) / seeds  # fmt: skip
    chance = chances(change[0], 0.2, 0.8)
    assert ((found - chance).abs() < 4 * (chance * (1 - chance) / seeds).sqrt()).all()


def test_the_mean_over_seeds_is_task_arithmetic():
    changes = random(2, (3, 4), dtype=torch.float64)
    seeds = 400
    options = {"density": 0.4, "epsilon": 0.2, "rescale_by": "probability"}
    drawn = torch.stack([merged(della_linear, changes, seed=seed, **options) for seed in range(seeds)])
    spread = sum((1 / chances(change, 0.2, 0.6) - 1) * change**2 for change in changes)
    assert ((drawn.mean(0) - changes.sum(0)).abs() < 4 * (spread / seeds).sqrt()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("shape", [(60, 70), (900,), (5, 6, 40)], ids=str)
def test_rescaled_by_norm_a_tensor_keeps_its_sum_of_magnitudes(shape, dtype):
    change = random(1, shape, dtype=dtype)
    left = merged(della_linear, change, density=0.3)
    plain = merged(della_linear, change, density=0.3, rescale=False)
    assert left.dtype == dtype
    assert torch.equal(left != 0, plain != 0)
    assert torch.equal(plain[plain != 0], change[0][plain != 0])
    assert abs(float(left.double().abs().sum() / change.double().abs().sum()) - 1) < 1e-6
    assert abs(torch.count_nonzero(left) / left.numel() - 0.3) < 0.06


@pytest.mark.parametrize("rescale_by", ["norm", "probability"])
def test_della_is_ties_of_what_is_left(rescale_by):
    changes = random(3, (40, 50))
    alone = [
        merged(della_linear, changes, density=0.4, weight=[float(s == t) for s in range(3)], rescale_by=rescale_by)
        for t in range(3)
    ]
    for options in ({"weight": [1.0, 0.5, 2.0], "lambda_": 0.7}, {"normalize": False}):
        result = merged(della, changes, density=0.4, rescale_by=rescale_by, **options)
        torch.testing.assert_close(result, merged(ties, torch.stack(alone), **options), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", BOTH)
@pytest.mark.parametrize("rescale_by", ["norm", "probability"])
@given(block=st.integers(1, 900), seed=st.integers(0, 1000), backwards=st.booleans())
@settings(max_examples=10, deadline=None)
def test_the_bits_depend_neither_on_the_cut_nor_on_the_order_of_blocks(rule, rescale_by, block, seed, backwards):
    changes = random(2, (19, 45), seed)
    options = {"density": [0.3, 0.7], "epsilon": [0.2, 0.1], "rescale_by": rescale_by, "seed": seed}
    cut = merged(rule, changes, block, backwards=backwards, **options)
    assert torch.equal(cut, merged(rule, changes, **options))


@pytest.mark.parametrize("rule", BOTH)
def test_a_device_gives_the_cpus_bits(rule):
    changes = random(3, (64, 300))
    there = merged(rule, changes.to(DEVICE), 5000, density=0.4)
    assert there.device.type == DEVICE
    torch.testing.assert_close(there.cpu(), merged(rule, changes, density=0.4), atol=1e-6, rtol=0)


def test_at_density_one_nothing_is_dropped():
    changes = random(3, (6, 5))
    for options in ({"weight": [0.3, 0.2, 0.9]}, {"normalize": True, "lambda_": 0.4}):
        deltas = TensorDeltas(torch.zeros(6, 5), list(changes))
        assert torch.equal(merged(della_linear, changes, **options), task_arithmetic(deltas, **options))
        assert torch.equal(merged(della, changes, **options), merged(ties, changes, **options))


@pytest.mark.parametrize("rule", BOTH)
@pytest.mark.parametrize("options", [{}, {"rescale_by": "probability"}, {"rescale": False}], ids=str)
def test_at_density_zero_all_is_dropped(rule, options):
    assert not merged(rule, random(2, (6, 5)), density=0.0, **options).any()


@pytest.mark.parametrize("rule", BOTH)
def test_della_ignores_who_changed_nothing_and_scales(rule):
    changes = random(2, (20, 30))
    plain = merged(rule, changes, density=0.5)
    assert torch.equal(merged(rule, torch.cat([changes, torch.zeros(1, 20, 30)]), density=0.5), plain)
    assert torch.equal(merged(rule, changes * 2.0**-20, density=0.5), plain * 2.0**-20)
    assert not merged(rule, torch.zeros(2, 3, 4), density=0.5).any()


@pytest.mark.parametrize("rule", BOTH)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (7, 1)], ids=str)
def test_a_row_of_one_entry_is_kept_with_the_mean_chance(rule, shape):
    change = torch.full((1, *shape), 0.25)
    kept = torch.stack([merged(rule, change, density=0.6, rescale=False, seed=seed) != 0 for seed in range(200)])
    assert abs(kept.double().mean() - 0.6) < 4 * (0.24 / kept.numel()) ** 0.5


@pytest.mark.parametrize("rule", BOTH)
def test_rescaling_by_norms_takes_a_look(rule):
    price = described(rule)
    with pytest.raises(AssertionError, match="takes a look"):
        rule(TensorDeltas(torch.zeros(3, 3), [torch.ones(3, 3)]), density=0.5)
    looks = [
        price.cost((4, 4), 2, parameters, 4).looks
        for parameters in ({}, {"density": 0.5}, {"density": 0.5, "rescale_by": "probability"})
    ]
    assert looks == [0, 1, 0]
