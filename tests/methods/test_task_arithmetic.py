import pytest
import torch

from streammerge.delta import TensorDeltas
from streammerge.methods.task_arithmetic import task_arithmetic


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [3.0, 1.0, -2.5]], ids=str)
@pytest.mark.parametrize("normalize", [False, True], ids=["sum", "mean"])
def test_task_arithmetic_adds_weighted_changes(shape, weights, normalize):
    torch.manual_seed(0)
    base, *experts = torch.randn(4, *shape)
    deltas = TensorDeltas(base, experts)
    result = task_arithmetic(deltas, weight=weights, normalize=normalize, lambda_=0.4)
    factor = 0.4 / sum(weights) if normalize else 0.4
    exact = sum(factor * w * (e.double() - base.double()) for w, e in zip(weights, experts, strict=True))
    torch.testing.assert_close(result.double(), exact, atol=1e-5, rtol=0)


def test_task_arithmetic_of_one_expert_is_that_expert_bit_for_bit():
    base = torch.randn(64, 64).bfloat16()
    expert = (base.float() * 1.01).bfloat16()
    delta = task_arithmetic(TensorDeltas(base, [expert]))
    assert torch.equal((base.float() + delta).bfloat16(), expert)


def test_a_lambda_of_zero_leaves_the_base():
    base, *experts = torch.randn(3, 5, 3)
    assert not task_arithmetic(TensorDeltas(base, experts), lambda_=0.0).any()


def test_weights_that_cancel_can_be_added():
    base, *experts = torch.randn(3, 5, 3)
    deltas = TensorDeltas(base, experts, name="layer.weight")
    difference = task_arithmetic(deltas, weight=[1.0, -1.0])
    torch.testing.assert_close(difference, experts[0] - experts[1], atol=1e-6, rtol=0)
