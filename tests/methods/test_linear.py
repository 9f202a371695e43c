import pytest
import torch

from streammerge.delta import TensorDeltas
from streammerge.methods.linear import linear


def soup(base, experts, **parameters):
    """The merged weights: what the engine writes, before it is cast."""
    deltas = TensorDeltas(base, experts, name="layer.weight")
    return deltas.base() + linear(deltas, **parameters)


def reference(experts, weights):
    return sum(w * e.double() for w, e in zip(weights, experts, strict=True))


@pytest.mark.parametrize("base", [True, False], ids=["base", "no_base"])
@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [3.0, 1.0, -2.5], [0.0, 0.0, 5.0]], ids=str)
def test_a_normalized_soup_is_the_weighted_mean_with_and_without_a_base(shape, weights, base):
    torch.manual_seed(0)
    first, *experts = torch.randn(4, *shape)
    result = soup(first if base else None, experts, weight=weights)
    exact = reference(experts, [w / sum(weights) for w in weights])
    torch.testing.assert_close(result.double(), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("base", [True, False], ids=["base", "no_base"])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [2.0, 0.25], [1.0, -1.0]], ids=str)
def test_a_soup_that_is_not_normalized_is_the_weighted_sum_of_the_weights(weights, base):
    torch.manual_seed(0)
    first, *experts = torch.randn(3, 6, 4)
    result = soup(first if base else None, experts, weight=weights, normalize=False)
    torch.testing.assert_close(result.double(), reference(experts, weights), atol=1e-6, rtol=0)


def test_one_number_weighs_every_expert_the_same():
    experts = list(torch.randn(3, 6, 4))
    assert torch.equal(soup(None, experts, weight=7.0), soup(None, experts))


@pytest.mark.parametrize("base", [True, False], ids=["base", "no_base"])
def test_a_soup_of_one_expert_or_its_copies_is_that_expert(base):
    first, expert = torch.randn(2, 64, 64).bfloat16()
    for copies in (1, 2, 3, 5):
        result = soup(first if base else None, [expert] * copies)
        torch.testing.assert_close(result, expert.float(), atol=1e-6, rtol=0)


def test_a_soup_keeps_digits_that_a_sum_of_weights_would_lose():
    base = torch.full((100,), 1000.0)
    experts = [base + 2.0**-14 * k for k in (1, 2, 3)]
    assert torch.equal(soup(None, experts), base + 2.0**-13)


def test_float64_experts_are_averaged_in_float64():
    experts = list(torch.randn(3, 6, 4, dtype=torch.float64))
    result = soup(None, experts)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, sum(experts) / 3, atol=1e-15, rtol=0)
