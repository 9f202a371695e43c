import pytest
import torch

from streammerge.delta import TensorDeltas
from streammerge.errors import MergeError
from streammerge.solve.buffers import Buffers
from streammerge.solve.survey import survey


def surveyed(base, experts, **options):
    deltas = TensorDeltas(base, experts, name="layer.weight")
    slots = torch.empty(2, *deltas.shape, dtype=deltas.dtype)
    seen = survey(deltas, lambda used: slots[min(used, 1)], Buffers(deltas, deltas.dtype), **options)
    return seen, slots[0]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_identical_deltas_are_seen_to_be_and_the_first_is_kept(count):
    expert = torch.randn(300, 7)
    seen, first = surveyed(torch.zeros(300, 7), [expert] * count)
    assert seen.identical
    assert torch.equal(first, expert)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_difference_in_the_last_element_is_seen(place):
    expert = torch.randn(300, 7)
    experts = [expert] * 3
    experts[place] = expert.clone()
    experts[place][-1, -1] += 1.0
    seen, _ = surveyed(torch.zeros(300, 7), experts)
    assert not seen.identical


def test_an_expert_that_changed_nothing_counts_for_nothing():
    base, a, b = torch.randn(3, 40, 30)
    seen, first = surveyed(base, [base, a, base.clone(), b])
    assert seen.used == [1, 3]
    assert torch.equal(first, a - base)
    assert seen.energy == surveyed(base, [a, b])[0].energy


def test_columns_that_no_expert_changed_are_counted_out():
    a, b = torch.zeros(2, 4, 6)
    a[1, 2] = b[3, 5] = 1e-30
    assert surveyed(torch.zeros(4, 6), [a, b], count_columns=True)[0].columns == 2
    assert surveyed(torch.zeros(4, 6), [a, b])[0].columns == 6


@pytest.mark.parametrize("exponent", [-140, -30, -25, 9, 40])
def test_the_scale_is_the_power_of_two_that_brings_deltas_to_about_one(exponent):
    seen, _ = surveyed(torch.zeros(500, 300), [torch.randn(500, 300) * 2.0**exponent])
    scaled = (seen.energy / 150_000) ** 0.5 * seen.scale
    assert torch.frexp(torch.tensor(seen.scale, dtype=torch.float64))[0] == 0.5
    assert 0.5 <= scaled < 1.0 or seen.scale == 2.0**126


@pytest.mark.parametrize("exponent", [-23, -8, 0, 7])
def test_deltas_whose_products_fit_as_they_are_stay_so(exponent):
    seen, _ = surveyed(torch.zeros(500, 300), [torch.randn(500, 300) * 2.0**exponent])
    assert seen.scale == 1.0
    change = torch.ones(2)
    assert seen.scaled_(change) is seen.unscaled_(change) is change
    assert change.tolist() == [1.0, 1.0]


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
