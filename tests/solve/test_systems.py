import pytest
import torch

from streammerge.delta import TensorDeltas
from streammerge.solve.buffers import Buffers
from streammerge.solve.survey import Survey
from streammerge.solve.systems import dual, primal

SHAPES = [(5, 3, 2), (300, 70, 3), (70, 300, 2), (257, 600, 3)]


def problem(rows, columns, experts):
    torch.manual_seed(0)
    changes = torch.randn(experts, rows, columns)
    deltas = TensorDeltas(torch.zeros(rows, columns), list(changes))
    return deltas, changes, Survey(used=list(range(experts)), scale=1.0)


def reference(changes, anchor, pull=0.0):
    changes = changes.double()
    covariances = changes.mT @ changes
    pulls = pull / len(changes) * torch.eye(changes.shape[2])
    return covariances.sum(0), ((changes - anchor) @ (covariances + pulls)).sum(0)


@pytest.mark.parametrize("anchored", [True, False], ids=["anchored", "plain"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ways_to_the_primal_system_reach_float64_s(shape, left, anchored):
    deltas, changes, seen = problem(*shape)
    pull = 100.0 if anchored else 0.0
    buffers = Buffers(deltas, torch.float32)
    system = primal(deltas, seen, torch.float32, buffers, ridge_lambda=pull, anchored=anchored, left=left)
    anchor = changes[0] if anchored else torch.zeros(shape[:2])
    assert torch.equal(system.anchor, anchor)
    gram, right = reference(changes, anchor, pull)
    assert torch.equal(system.gram, system.gram.mT)
    assert (system.gram - gram).norm() <= 1e-6 * gram.norm()
    assert (system.right - right).norm() <= 1e-6 * right.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_dual_s_right_hand_side_spreads_to_the_primal_s(shape):
    deltas, changes, _ = problem(*shape)
    stack = changes.flatten(0, 1)
    system = dual(stack, changes.mean(0), Buffers(deltas, torch.float32), keep_gram=True)
    _, right = reference(changes, changes.mean(0))
    assert (system.spread(system.right) - right).norm() <= 1e-6 * right.norm()
    gram = stack.double() @ stack.double().mT
    assert (system.gram - gram).norm() <= 1e-6 * gram.norm()
    x = torch.randn(4, len(gram))
    assert (system.product(x) - x.double() @ gram).norm() <= 1e-5 * (x.double() @ gram).norm()


def test_identical_deltas_leave_exactly_nothing_to_correct():
    change = torch.randn(100, 400)
    deltas = TensorDeltas(torch.zeros(100, 400), [change, change])
    seen, buffers = Survey(used=[0, 1], scale=1.0), Buffers(deltas, torch.float32)
    for left in (False, True):
        system = primal(deltas, seen, torch.float32, buffers, ridge_lambda=1.0, anchored=True, left=left)
        assert not system.right.any()
    assert not dual(torch.cat([change, change]), change, buffers, keep_gram=False).right.any()
