import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.delta import TensorDeltas
from streammerge.errors import MergeError
from streammerge.solve.buffers import Buffers
from streammerge.solve.survey import survey


def surveyed(base, experts, **options):
    deltas = TensorDeltas(base, experts, name="layer.weight")
    mean = torch.empty(deltas.shape, dtype=deltas.dtype)
    slot = torch.empty(deltas.shape, dtype=deltas.dtype)
    return survey(deltas, mean, lambda used: slot, Buffers(deltas, deltas.dtype), **options), mean


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_the_mean_of_identical_deltas_is_that_delta_to_the_bit(count, seed):
    expert = torch.randn(300, 7, generator=torch.Generator().manual_seed(seed))
    seen, mean = surveyed(torch.zeros(300, 7), [expert] * count)
    assert torch.equal(mean, expert)
    assert seen.identical


def test_a_difference_in_the_last_element_is_seen():
    expert = torch.randn(300, 7)
    other = expert.clone()
    other[-1, -1] += 1.0
    seen, mean = surveyed(torch.zeros(300, 7), [expert, expert, other])
    assert not seen.identical
    torch.testing.assert_close(mean, (2 * expert + other) / 3)


def test_an_expert_that_changed_nothing_counts_for_nothing():
    base, a, b = torch.randn(3, 40, 30)
    seen, mean = surveyed(base, [base, a, base.clone(), b])
    _, without = surveyed(base, [a, b])
    assert seen.used == [1, 3]
    assert torch.equal(mean, without)


def test_columns_that_no_expert_changed_are_counted_out():
    a, b = torch.zeros(2, 4, 6)
    a[1, 2] = b[3, 5] = 1e-30
    assert surveyed(torch.zeros(4, 6), [a, b], count_columns=True)[0].columns == 2
    assert surveyed(torch.zeros(4, 6), [a, b])[0].columns == 6


@pytest.mark.parametrize("exponent", [-30, -8, 0, 5, 40, -140])
def test_the_scale_is_the_power_of_two_that_brings_deltas_to_about_one(exponent):
    seen, _ = surveyed(torch.zeros(500, 300), [torch.randn(500, 300) * 2.0**exponent])
    scaled = (seen.energy / 150_000) ** 0.5 * seen.scale
    assert torch.frexp(torch.tensor(seen.scale, dtype=torch.float64))[0] == 0.5
    assert 0.5 <= scaled < 1.0 or seen.scale == 2.0**126


def test_norms_of_tiny_deltas_keep_their_digits():
    expert = torch.randn(300, 500) * 1e-30
    seen, _ = surveyed(torch.zeros(300, 500), [expert])
    assert seen.energy == pytest.approx(expert.double().square().sum().item(), rel=1e-14)


@pytest.mark.parametrize(("value", "kind"), [(torch.nan, "NaN"), (-torch.inf, "an infinity")])
def test_a_value_that_is_not_finite_is_named_with_tensor_expert_and_element(value, kind):
    experts = list(torch.randn(3, 300, 500))
    experts[2][280, 3] = value
    with pytest.raises(MergeError) as raised:
        surveyed(torch.zeros(300, 500), experts)
    assert raised.value.message.startswith(f"`layer.weight`: expert 2 holds {kind} at element {280 * 500 + 3}")
    assert raised.value.hint


def test_a_base_that_is_not_finite_is_blamed_itself():
    base = torch.zeros(3, 4)
    base[1, 1] = torch.inf
    with pytest.raises(MergeError, match="the base holds an infinity at element 5"):
        surveyed(base, [torch.randn(3, 4)])
