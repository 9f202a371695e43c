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
    buffers.take("anchor", torch.float32, *shape[:2]).copy_(changes[0])
    system = primal(deltas, seen, torch.float32, buffers, anchored=anchored, pulled=anchored, left=left).pull_(pull)
    anchor = changes[0] if anchored else torch.zeros(shape[:2])
    assert torch.equal(system.anchor, anchor)
    gram, right = reference(changes, anchor, pull)
    assert torch.equal(system.gram, system.gram.mT)
    assert (system.gram - gram).norm() <= 1e-6 * gram.norm()
    assert (system.right - right).norm() <= 1e-6 * right.norm()


@pytest.mark.parametrize("anchored", [True, False], ids=["anchored", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_dual_s_right_hand_side_spreads_to_the_primal_s(shape, anchored):
    deltas, changes, _ = problem(*shape)
    stack = changes.flatten(0, 1)
    system = dual(stack, shape[0], Buffers(deltas, torch.float32), anchored=anchored, keep_gram=True)
    anchor = changes.double().mean(0) * anchored
    _, right = reference(changes, anchor)
    assert (system.anchor - anchor).norm() <= 1e-6 * anchor.norm()
    assert (system.spread(system.right) - right).norm() <= 1e-6 * right.norm()
    gram = stack.double() @ stack.double().mT
    assert (system.gram - gram).norm() <= 1e-6 * gram.norm()
    x = torch.randn(4, len(gram))
    assert (system.product(x) - x.double() @ gram).norm() <= 1e-5 * (x.double() @ gram).norm()


@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_identical_deltas_leave_exactly_nothing_to_correct(count):
    change = torch.randn(100, 800)
    deltas = TensorDeltas(torch.zeros(100, 800), [change] * count)
    seen, buffers = Survey(used=list(range(count)), scale=1.0), Buffers(deltas, torch.float32)
    for left in (False, True):
        buffers.take("anchor", torch.float32, 100, 800).copy_(change)
        system = primal(deltas, seen, torch.float32, buffers, anchored=True, pulled=True, left=left).pull_(1.0)
        assert not system.right.any()
    system = dual(torch.cat([change] * count), 100, buffers, anchored=True, keep_gram=False)
    assert torch.equal(system.anchor, change)
    assert not system.right.any()
