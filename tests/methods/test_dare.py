import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.delta import TensorDeltas
from streammerge.methods.dare_linear import dare_linear
from streammerge.methods.dare_ties import dare_ties
from streammerge.methods.task_arithmetic import task_arithmetic
from streammerge.methods.ties import ties
from streammerge_kernels.drop import keep_mask
from tests.blocks import described, merged_by_blocks
from tests.kernels.devices import DEVICE

BOTH = [dare_linear, dare_ties]
# of the panels' length, in which sums are taken
PANEL = 8192


def merged(rule, changes, block=1 << 30, **parameters):
    """The rule's merge of changes [t, *shape] from a base of zeros."""
    return merged_by_blocks(rule, torch.zeros_like(changes[0]), list(changes), block, **parameters)


def random(count, shape, seed=0, dtype=torch.float32):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask(change, expert, density, seed=0, name="tensor"):
    return keep_mask(change.shape, density=density, seed=seed, name=name, expert=str(expert))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("rescale_by", ["norm", "probability", None])
def test_what_is_left_is_rescaled_and_added(rescale_by, dtype):
    changes = random(3, (40, 50), dtype=dtype)
    weights, densities = [1.0, -0.5, 2.0], [0.3, 0.8, 1.0]
    expected = torch.zeros(40, 50, dtype=torch.float64)
    for t, (change, weight, density) in enumerate(zip(changes.double(), weights, densities, strict=True)):
        left = change * mask(change, t, density)
        factor = {"norm": change.abs().sum() / left.abs().sum(), "probability": 1 / density, None: 1.0}[rescale_by]
        expected += 0.7 * weight * left * factor
    options = {"rescale_by": rescale_by} if rescale_by else {"rescale": False}
    result = merged(dare_linear, changes, weight=weights, density=densities, lambda_=0.7, **options)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("normalize", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("rescale_by", ["norm", "probability"])
def test_dare_ties_is_ties_of_what_is_left(rescale_by, normalize):
    changes = random(3, (40, 50))
    options = {"weight": [1.0, 0.5, 2.0], "normalize": normalize, "lambda_": 0.7}
    alone = [
        merged(dare_linear, changes, density=0.4, weight=[float(s == t) for s in range(3)], rescale_by=rescale_by)
        for t in range(3)
    ]
    result = merged(dare_ties, changes, density=0.4, rescale_by=rescale_by, **options)
    torch.testing.assert_close(result, merged(ties, torch.stack(alone), **options), atol=1e-6, rtol=0)


def test_the_mean_over_seeds_is_task_arithmetic():
    changes = random(2, (3, 4), dtype=torch.float64)
    seeds, density = 400, 0.25
    drawn = torch.stack([
        merged(dare_linear, changes, density=density, rescale_by="probability", seed=seed) for seed in range(seeds)
    ])  # fmt: skip
    deviation = ((1 - density) / density * (changes**2).sum(0) / seeds).sqrt()
    assert ((drawn.mean(0) - changes.sum(0)).abs() < 4 * deviation).all()


def test_rescaled_by_norm_a_tensor_keeps_its_sum_of_magnitudes():
    change = random(1, (60, 70))
    for density in (0.1, 0.5, 0.9):
        left = merged(dare_linear, change, density=density)
        assert abs(float(left.double().abs().sum() / change.double().abs().sum()) - 1) < 1e-6
        assert abs(torch.count_nonzero(left) / left.numel() - density) < 0.05


def test_the_draws_depend_on_seed_name_expert_and_entry_and_on_nothing_else():
    change = random(1, (40, 50))[0]

    def kept(changes, t, **key):
        weights = [float(s == t) for s in range(len(changes))]
        return merged(dare_linear, torch.stack(changes), weight=weights, density=0.5, **key) != 0

    alone = kept([change], 0)
    assert torch.equal(kept([change, change * 2, change], 0), alone)
    assert torch.equal(kept([change.flatten()], 0).view(40, 50), alone)
    others = [kept([change, change], 1), kept([change], 0, seed=1), kept([change], 0, name="other")]
    for other in others:
        assert 0.4 < (other != alone).float().mean() < 0.6


@pytest.mark.parametrize("rule", BOTH)
@given(panels=st.integers(1, 4), seed=st.integers(0, 1000), backwards=st.booleans())
@settings(max_examples=5, deadline=None)
def test_the_bits_depend_neither_on_the_cut_nor_on_the_order_of_blocks(rule, panels, seed, backwards):
    changes = random(2, (170, 150), seed)
    cut = merged(rule, changes, panels * PANEL, density=[0.2, 0.7], backwards=backwards, seed=seed)
    assert torch.equal(cut, merged(rule, changes, density=[0.2, 0.7], seed=seed))


@pytest.mark.parametrize("rule", BOTH)
@pytest.mark.parametrize("block", [1, 3, 1000])
def test_divided_by_density_any_cut_gives_the_same_bits(rule, block):
    changes = random(2, (20, 30))
    options = {"density": 0.4, "rescale_by": "probability"}
    assert torch.equal(merged(rule, changes, block, **options), merged(rule, changes, **options))


@pytest.mark.parametrize("rule", BOTH)
def test_a_device_gives_the_cpus_bits(rule):
    changes = random(3, (64, 300))
    there = merged(rule, changes.to(DEVICE), PANEL, density=0.4, normalize=True)
    assert there.device.type == DEVICE
    torch.testing.assert_close(there.cpu(), merged(rule, changes, density=0.4, normalize=True), atol=1e-6, rtol=0)


def test_at_density_one_nothing_is_dropped():
    changes = random(3, (6, 5))
    for options in ({"weight": [0.3, 0.2, 0.9]}, {"normalize": True, "lambda_": 0.4}):
        deltas = TensorDeltas(torch.zeros(6, 5), list(changes))
        assert torch.equal(merged(dare_linear, changes, **options), task_arithmetic(deltas, **options))
        assert torch.equal(
            merged(dare_ties, changes, **options), merged(ties, changes, **{"normalize": False} | options)
        )


@pytest.mark.parametrize("rule", BOTH)
@pytest.mark.parametrize("options", [{}, {"rescale_by": "probability"}, {"rescale": False}], ids=str)
def test_at_density_zero_all_is_dropped(rule, options):
    assert not merged(rule, random(2, (6, 5)), density=0.0, **options).any()


@pytest.mark.parametrize("rule", BOTH)
def test_dare_ignores_who_changed_nothing_and_scales(rule):
    changes = random(2, (20, 30))
    plain = merged(rule, changes, density=0.5)
    assert torch.equal(merged(rule, torch.cat([changes, torch.zeros(1, 20, 30)]), density=0.5), plain)
    assert torch.equal(merged(rule, changes * 2.0**-20, density=0.5), plain * 2.0**-20)
    assert not merged(rule, torch.zeros(2, 3, 4), density=0.5).any()


@pytest.mark.parametrize("rule", BOTH)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_one_entry_is_kept_whole_or_dropped(rule, shape):
    change = torch.full((1, *shape), 0.25)
    found = {float(merged(rule, change, density=0.5, seed=seed).sum()) for seed in range(20)}
    assert found == {0.0, 0.25}


def test_only_a_norm_takes_another_reading():
    cost = described(dare_linear).cost
    looks = [
        cost((4, 4), 2, parameters, 4).looks
        for parameters in (
            {"density": 0.5}, {}, {"density": [1.0, 0.5]}, {"density": 0.5, "rescale": False},
            {"density": 0.5, "rescale_by": "probability"},
        )
    ]  # fmt: skip
    assert looks == [1, 0, 1, 0, 0]


@pytest.mark.parametrize("rule", BOTH)
def test_rescaling_by_norms_without_a_look_is_a_mistake(rule):
    with pytest.raises(AssertionError, match="takes a look"):
        rule(TensorDeltas(torch.zeros(3), [torch.ones(3)]), density=0.5)
